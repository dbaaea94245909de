"""
UNetFormer and FTUNetFormer, in the parameter names of published checkpoints.

Source: Wang et al., "UNetFormer", ISPRS J. 2022, arXiv 2109.08417; written from the paper and the layout of its checkpoints. Takes images
of any size from 32 px up: where the published code's reflection padding fails, the border is repeated instead.

Shapes: N images, H W pixels or positions, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdpipe.configs.errors import ConfigError
from kdpipe.pipeline.models.swin import SwinEncoder, parts, relative_position_bias, relative_position_index
from kdpipe.pipeline.models.weights import load_published

WINDOW = 8
EARLIER_NORM = (
    "decoder.p1.proj.2.running_var"  # a tensor of UNetFormers as kdpipe built them before it read published ones
)


class _Published(nn.Module):
    heads: tuple[str, ...]
    """The tensors whose first axis is the classes."""

    def explain_misfit(self, state: Mapping[str, Any]) -> str:
        """A sentence on why weights do not fit, where their names tell it; empty for all others."""
        return ""

    def load_published_state_dict(
        self, state: Mapping[str, Any], *, replace_head: bool = False, origin: str = "the state dict"
    ) -> None:
        """Load published weights strictly, under any usual prefix (see `weights.load_published`)."""
        load_published(self, state, self.heads, replace_head=replace_head, origin=origin)


class FTUNetFormer(_Published):
    """A Swin encoder and the UNetFormer decoder, from normalised images `(N, in_channels, H, W)` to logits `(N, num_classes, H, W)`."""

    heads = ("decoder.segmentation_head.2.0.weight",)

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        width: int = 256,
        heads: int = 16,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        encoder_heads: Sequence[int] = (4, 8, 16, 32),
        drop_path: float = 0.3,
    ) -> None:
        super().__init__()
        self.backbone = SwinEncoder(embed_dim, depths, encoder_heads, drop_path=drop_path, in_channels=in_channels)
        self.decoder = Decoder(self.backbone.channels, num_classes, width, heads, transformer=True, dropout=0.2)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits at the images' size."""
        logits: Tensor = self.decoder(self.backbone(images_NCHW), images_NCHW.shape[-2:])[0]
        return logits


class UNetFormer(_Published):
    """
    A convolutional encoder from timm and the UNetFormer decoder, from normalised images `(N, in_channels, H, W)` to logits `(N,
    num_classes, H, W)`.

    In training mode it also returns the logits of the auxiliary head (see `distillation_loss`). `encoder` is any of timm's with
    feature maps at strides 4, 8, 16 and 32.
    """

    heads = ("decoder.segmentation_head.2.0.weight", "decoder.aux_head.conv_out.0.weight")

    def __init__(
        self, num_classes: int, *, encoder: str = "resnet18", in_channels: int = 3, width: int = 64, heads: int = 8
    ) -> None:
        super().__init__()
        self.backbone = _timm_encoder(encoder, in_channels)
        channels = self.backbone.feature_info.channels()  # type: ignore[operator, union-attr]
        self.decoder = Decoder(channels, num_classes, width, heads, transformer=False, dropout=0.1, auxiliary=True)

    def explain_misfit(self, state: Mapping[str, Any]) -> str:
        """Says so where the weights are those of an earlier kdpipe's UNetFormer, whose `proj` had another order."""
        if EARLIER_NORM not in state:
            return ""
        return (
            "These are the weights of a UNetFormer that an earlier kdpipe trained: its proj was depthwise conv, 1x1 conv, norm, and "
            "published UNetFormers have the norm between the two convs. No weights make one compute what the other does: train the "
            "student again, which its cache still serves, or use these weights with the kdpipe that trained them"
        )

    def forward(self, images_NCHW: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits at the images' size; in training mode a pair, the second from the auxiliary head."""
        logits, auxiliary = self.decoder(self.backbone(images_NCHW), images_NCHW.shape[-2:])
        return (logits, auxiliary) if self.training else logits


class Decoder(nn.Module):
    """
    The decoder, from the encoder's four feature maps, finest first, to logits.

    Behind a `transformer`, as FTUNetFormer has it, skips are 3x3 convs with a norm and every `proj` ends in its norm; UNetFormer's
    skips are plain 1x1 convs, and the norm of its `proj` lies between the depthwise conv and the 1x1 conv.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: int,
        heads: int,
        *,
        transformer: bool,
        dropout: float,
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        self.pre_conv = _conv_norm(channels[3], width, 1)
        self.b4 = _Block(width, heads, transformer)
        self.b3 = _Block(width, heads, transformer)
        self.p3 = _Fusion(channels[2], width, transformer)
        self.b2 = _Block(width, heads, transformer)
        self.p2 = _Fusion(channels[1], width, transformer)
        self.p1 = _Refinement(channels[0], width, transformer)
        if auxiliary:
            self.aux_head = _AuxiliaryHead(width, num_classes)
        self.auxiliary = auxiliary
        self.segmentation_head = nn.Sequential(
            _conv_norm_act(width, width), nn.Dropout2d(dropout), _conv(width, num_classes, 1)
        )
        self.apply(_initialise)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Logits at `size`, and those of the auxiliary head, if there is one and the model is in training mode."""
        stride4, stride8, stride16, stride32 = features
        x4 = self.b4(self.pre_conv(stride32))
        x3 = self.b3(self.p3(x4, stride16))
        x2 = self.b2(self.p2(x3, stride8))
        logits = _resized(self.segmentation_head(self.p1(x2, stride4)), size)
        if not (self.auxiliary and self.training):
            return logits, None
        at_stride8 = [F.interpolate(x, x2.shape[-2:], mode="bilinear", align_corners=True) for x in (x4, x3)]
        return logits, _resized(self.aux_head(at_stride8[0] + at_stride8[1] + x2), size)


class _Block(nn.Module):
    def __init__(self, channels: int, heads: int, norm_last: bool) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.attn = _GlobalLocalAttention(channels, heads, norm_last)
        self.norm2 = nn.BatchNorm2d(channels)
        self.mlp = _Mlp(channels, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class _Mlp(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.relu6(self.fc1(x)))
        return out


class _GlobalLocalAttention(nn.Module):
    """Window attention beside a convolution (paper, section 3.2)."""

    def __init__(self, channels: int, heads: int, norm_last: bool) -> None:
        super().__init__()
        self.heads, self.scale = heads, (channels // heads) ** -0.5
        self.qkv = _conv(channels, 3 * channels, 1)
        self.local1 = _conv_norm(channels, channels, 3)
        self.local2 = _conv_norm(channels, channels, 1)
        self.proj = _separable(channels, WINDOW, norm_last)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, heads))
        self.relative_position_index: Tensor
        self.register_buffer("relative_position_index", relative_position_index(WINDOW))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        height, width = x_NCHW.shape[-2:]
        local = self.local2(x_NCHW) + self.local1(x_NCHW)
        out = self._window_attention(x_NCHW)[..., :height, :width]
        pad = WINDOW // 2 - 1
        down = F.avg_pool2d(_extended(out, height + 1, width), (WINDOW, 1), 1, (pad, 0))
        across = F.avg_pool2d(_extended(out, height, width + 1), (1, WINDOW), 1, (0, pad))
        mixed: Tensor = self.proj(_extended(down + across + local, height + 1, width + 1))
        return mixed[..., :height, :width]

    def _window_attention(self, x_NCHW: Tensor) -> Tensor:
        images, channels, height, width = x_NCHW.shape
        rows, columns = parts(height, WINDOW), parts(width, WINDOW)
        qkv = self.qkv(_extended(x_NCHW, rows * WINDOW, columns * WINDOW))
        qkv = qkv.reshape(images, 3, self.heads, channels // self.heads, rows, WINDOW, columns, WINDOW)
        # To (3, N, rows, columns, heads, P, dim).
        q, k, v = qkv.permute(1, 0, 4, 6, 2, 5, 7, 3).flatten(5, 6).unbind(0)
        bias = relative_position_bias(self.relative_position_bias_table, self.relative_position_index)
        x = ((q * self.scale) @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v
        x = x.reshape(images, rows, columns, self.heads, WINDOW, WINDOW, channels // self.heads)
        back: Tensor = x.permute(0, 3, 6, 1, 4, 2, 5)
        return back.reshape(images, channels, rows * WINDOW, columns * WINDOW)


class _Fusion(nn.Module):
    """The coarser map, upsampled by 2, and the encoder's, weighted by two learned shares."""

    def __init__(self, skip_channels: int, channels: int, transformer: bool) -> None:
        super().__init__()
        self.pre_conv = _conv_norm(skip_channels, channels, 3) if transformer else _conv(skip_channels, channels, 1)
        self.weights = nn.Parameter(torch.ones(2))
        self.post_conv = _conv_norm_act(channels, channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        # Halving rounds an odd size up, so that doubling gives one pixel too many.
        x = x[..., : skip.shape[-2], : skip.shape[-1]]
        shares = F.relu(self.weights)
        shares = shares / (shares.sum() + 1e-8)
        out: Tensor = self.post_conv(shares[0] * self.pre_conv(skip) + shares[1] * x)
        return out


class _Refinement(_Fusion):
    """The last fusion, with attention over positions and over channels (the paper's feature refinement head)."""

    def __init__(self, skip_channels: int, channels: int, transformer: bool) -> None:
        super().__init__(skip_channels, channels, transformer)
        self.pa = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.Sigmoid())
        self.ca = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            _conv(channels, channels // 16, 1),
            nn.ReLU6(),
            _conv(channels // 16, channels, 1),
            nn.Sigmoid(),
        )
        self.shortcut = _conv_norm(channels, channels, 1)
        self.proj = _separable(channels, 3, transformer)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = super().forward(x, skip)
        refined = self.pa(x) * x + self.ca(x) * x
        return F.relu6(self.proj(refined) + self.shortcut(x))


class _AuxiliaryHead(nn.Module):
    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv = _conv_norm_act(channels, channels)
        self.drop = nn.Dropout(0.1)
        self.conv_out = _conv(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(self.drop(self.conv(x)))
        return out


def _extended(x: Tensor, height: int, width: int) -> Tensor:
    """`x` extended below and on the right: mirrored where the map is large enough, else with its border repeated."""
    for dim, size in ((-2, height), (-1, width)):
        x = x.index_select(dim, _mirrored(x.shape[dim], size, x.device))
    return x


def _mirrored(size: int, target: int, device: torch.device) -> Tensor:
    """
    The indices `0..target-1` reflected at `size - 1`, or clamped to it where reflection would go below zero.

    It does not branch on sizes, so that one exported graph is right at all of them.
    """
    last = size - 1
    position = torch.arange(target, device=device)
    mirrored = last - (position - last).abs()
    return torch.where(mirrored[-1] >= 0, mirrored, position.clamp(max=last))


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def _conv(channels: int, out: int, kernel: int) -> nn.Sequential:
    # In a sequence, because published names have its index.
    return nn.Sequential(nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False))


def _conv_norm(channels: int, out: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(out))


def _conv_norm_act(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(*_conv_norm(channels, out, 3), nn.ReLU6())


def _separable(channels: int, kernel: int, norm_last: bool) -> nn.Sequential:
    """A depthwise conv, a 1x1 conv and a norm, which comes last, or between the two."""
    depthwise = nn.Conv2d(channels, channels, kernel, padding=(kernel - 1) // 2, groups=channels, bias=False)
    pointwise, norm = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
    return nn.Sequential(depthwise, pointwise, norm) if norm_last else nn.Sequential(depthwise, norm, pointwise)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, a=1)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _timm_encoder(name: str, in_channels: int) -> nn.Module:
    every: nn.Module = timm.create_model(name, features_only=True)
    strides = every.feature_info.reduction()  # type: ignore[operator, union-attr]
    wanted = [strides.index(stride) for stride in (4, 8, 16, 32) if stride in strides]
    if len(wanted) != 4:
        raise ConfigError(
            f"student.encoder: {name} has feature maps at strides {strides}, and 4, 8, 16 and 32 are needed"
        )
    chosen: nn.Module = timm.create_model(name, features_only=True, out_indices=wanted, in_chans=in_channels)
    return chosen
