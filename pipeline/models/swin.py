"""
The Swin encoder of FTUNetFormer, in the parameter names of published checkpoints.

Source: Liu et al. 2021, arXiv 2103.14030. Where timm's differs (it shifts before it pads, and small maps not at all) this one
follows the published FTUNetFormer: pad after `norm1`, then shift, always.

Shapes: N images, H W tokens, C channels, B windows, P tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

PATCH_PX = 4
MASKED = -100.0  # added to a score, as in the published code: softmax makes it zero


class SwinEncoder(nn.Module):
    """
    The outputs of the four stages, `(N, embed_dim * 2**i, H / 4 / 2**i, W / 4 / 2**i)`, sizes rounded up.

    Each is taken before its stage's downsampling and normalised by its own LayerNorm. Takes images of any size.
    """

    def __init__(
        self,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window: int = 7,
        drop_path: float = 0.3,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.channels = [embed_dim * 2**i for i in range(len(depths))]
        self.patch_embed = _PatchEmbed(in_channels, embed_dim)
        rates = [drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        self.layers = nn.ModuleList()
        for i, (depth, heads, channels) in enumerate(zip(depths, num_heads, self.channels, strict=True)):
            first, is_last = sum(depths[:i]), i == len(depths) - 1
            self.layers.append(_Stage(channels, heads, window, rates[first : first + depth], downsample=not is_last))
            self.add_module(f"norm{i}", nn.LayerNorm(channels))
        self.apply(_initialise)

    def forward(self, images_NCHW: Tensor) -> list[Tensor]:
        """The four feature maps of normalised images `(N, in_channels, H, W)`, finest first."""
        x_NHWC = self.patch_embed(images_NCHW)
        features = []
        for i, stage in enumerate(self.layers):
            x_NHWC = stage.blocks(x_NHWC)  # type: ignore[operator]
            features.append(self.get_submodule(f"norm{i}")(x_NHWC).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x_NHWC = stage.downsample(x_NHWC)  # type: ignore[operator]
        return features


def parts(size: int, side: int) -> int:
    """`ceil(size / side)`, from positive numbers only: ONNX rounds a negative quotient up, Python down."""
    return (size + side - 1) // side


class WindowAttention(nn.Module):
    """Self-attention among the tokens of a window, with a learned bias for each relative position and head."""

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (channels // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.relative_position_index: Tensor
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x_BPC: Tensor, mask_BPP: Tensor | None) -> Tensor:
        """The windows' new tokens `(B, P, C)`; `mask_BPP` is added to the scores, for the windows of one image."""
        windows, tokens, channels = x_BPC.shape
        q, k, v = self.qkv(x_BPC).reshape(windows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        scores = scores + relative_position_bias(self.relative_position_bias_table, self.relative_position_index)
        if mask_BPP is not None:
            per_image = mask_BPP.shape[0]
            scores = scores.reshape(-1, per_image, self.heads, tokens, tokens) + mask_BPP[:, None].to(scores.dtype)
            scores = scores.reshape(windows, self.heads, tokens, tokens)
        x: Tensor = self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(windows, tokens, channels))
        return x


def relative_position_index(window: int) -> Tensor:
    """The row of the bias table for each pair of a window's tokens, int64 `(window**2, window**2)`."""
    place = torch.arange(window)
    offset = place[:, None] - place[None, :] + window - 1
    rows = offset.repeat_interleave(window, 0).repeat_interleave(window, 1)
    return rows * (2 * window - 1) + offset.repeat(window, window)


def relative_position_bias(table: Tensor, index: Tensor) -> Tensor:
    """The bias of each pair of tokens, `(heads, P, P)`."""
    return table[index.flatten()].reshape(*index.shape, -1).permute(2, 0, 1)


class _PatchEmbed(nn.Module):
    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, PATCH_PX, PATCH_PX)
        self.norm = nn.LayerNorm(channels)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        height, width = images_NCHW.shape[-2:]
        rows, columns = parts(height, PATCH_PX), parts(width, PATCH_PX)
        x = self.proj(F.pad(images_NCHW, (0, columns * PATCH_PX - width, 0, rows * PATCH_PX - height)))
        tokens_NHWC: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return tokens_NHWC


class _Stage(nn.Module):
    def __init__(self, channels: int, heads: int, window: int, rates: Sequence[float], *, downsample: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(_Block(channels, heads, window, 0 if i % 2 == 0 else window // 2, rate) for i, rate in enumerate(rates))
        )
        self.downsample = _PatchMerging(channels) if downsample else None


class _Block(nn.Module):
    def __init__(self, channels: int, heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, 4 * channels)

    def forward(self, x_NHWC: Tensor) -> Tensor:
        x_NHWC = x_NHWC + self.drop_path(self._attention(self.norm1(x_NHWC)))
        out: Tensor = x_NHWC + self.drop_path(self.mlp(self.norm2(x_NHWC)))
        return out

    def _attention(self, x_NHWC: Tensor) -> Tensor:
        side, shift = self.window, self.shift
        images, height, width, channels = x_NHWC.shape
        rows, columns = parts(height, side), parts(width, side)
        x = F.pad(x_NHWC, (0, 0, 0, columns * side - width, 0, rows * side - height))
        mask = None
        if shift:
            x = torch.roll(x, (-shift, -shift), (1, 2))
            mask = _shift_mask(rows, columns, side, shift, x.device)
        x = x.reshape(images, rows, side, columns, side, channels).transpose(2, 3).reshape(-1, side * side, channels)
        x = self.attn(x, mask)
        x = x.reshape(images, rows, columns, side, side, channels).transpose(2, 3)
        x = x.reshape(images, rows * side, columns * side, channels)
        if shift:
            x = torch.roll(x, (shift, shift), (1, 2))
        return x[:, :height, :width]


def _shift_mask(rows: int, columns: int, side: int, shift: int, device: torch.device) -> Tensor:
    """`MASKED` for pairs of tokens that only the cyclic shift brings into one window, else 0: `(rows * columns, P, P)`."""
    row, column = (torch.arange(count * side, device=device) for count in (rows, columns))
    # Three regions along each axis: windows that nothing wraps into, the last window's own part, and the part that wrapped around.
    row, column = ((place >= place.numel() - side).int() + (place >= place.numel() - shift) for place in (row, column))
    region = row[:, None] * 3 + column
    region = region.reshape(rows, side, columns, side).transpose(1, 2).reshape(-1, side * side)
    return (region[:, :, None] != region[:, None, :]) * MASKED


class _PatchMerging(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(4 * channels)

    def forward(self, x_NHWC: Tensor) -> Tensor:
        images, height, width, channels = x_NHWC.shape
        rows, columns = parts(height, 2), parts(width, 2)
        x = F.pad(x_NHWC, (0, 0, 0, columns * 2 - width, 0, rows * 2 - height))
        # Channels of each 2 × 2 tokens in published order: upper left, lower left, upper right, lower right.
        x = x.reshape(images, rows, 2, columns, 2, channels).permute(0, 1, 3, 4, 2, 5).flatten(3)
        merged: Tensor = self.reduction(self.norm(x))
        return merged


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
