"""
The network that a state dict belongs to, from the names and shapes of its tensors alone.

Recognises segmentation-models-pytorch's architectures with its own encoders (and one more that the caller names), with default
options (and others that the caller names), with or without scSE attention; and FTUNetFormer and UNetFormer. Anything else is reported
as not recognised, never guessed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from kdpipe.configs.errors import ConfigError, count_text
from kdpipe.configs.schema.options import options_text
from kdpipe.pipeline.models.normalize import COLOURS
from kdpipe.pipeline.models.options import options_of, untraced_options
from kdpipe.pipeline.models.unetformer import FTUNetFormer, UNetFormer

SCSE = ".attention1.attention.cSE."  # in the names of a decoder's tensors with spatial and channel attention
FORMER_HEAD = "decoder.segmentation_head.2.0.weight"  # of FTUNetFormer and UNetFormer
MIX_TRANSFORMER = "patch_embed1.proj.weight"  # in the names of the Mix Transformers' tensors
ENCODER, HEAD = "encoder.", "segmentation_head."
# Families tried first: building all of smp's encoders takes about ten seconds, one of each family three.
USUAL = ("efficientnet", "resnet", "mobilenet_v2")
MOST_CHANNELS = 2**20  # of a tensor's axis. smp counts the bands of a candidate one by one

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Network:
    """
    A recognised network; fields that were not recognised are None.

    `attention` is `scse`, or None without it; `in_channels` is the number of bands that it sees. `options` are those that its tensors
    need beside an architecture's defaults.
    """

    architecture: str | None
    encoder: str | None
    attention: str | None
    channels: int | None
    in_channels: int = COLOURS
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """`unet with efficientnet-b4 and scSE attention, 4 bands, 9 channels`; three bands go without saying."""
        encoder = f" with {self.encoder}" if self.encoder else ""
        attention = " and scSE attention" if self.attention else ""
        channels = f", {count_text(self.in_channels, 'bands')}" if self.in_channels != COLOURS else ""
        if self.channels is not None:
            channels += f", {count_text(self.channels, 'channels')}"
        if self.architecture is None:
            unknown = " whose decoder is not recognised" if self.encoder else " that is not recognised"
            return f"a network{encoder}{unknown}{channels}"
        return f"{self.architecture}{encoder}{attention}{options_text(self.options)}{channels}"


def recognise(
    state: Mapping[str, Tensor],
    likely_encoder: str | None = None,
    likely_options: Mapping[str, Any] | None = None,
) -> Network:
    """
    The network whose every tensor has the name and shape of one in `state`, without prefixes.

    `likely_encoder` and `likely_options` of the architecture's constructor are tried first. Takes up to about five seconds for an
    unusual encoder, as each candidate is built (on the meta device).
    """
    shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    attention = attention_of(state)
    if max((size for shape in shapes.values() for size in shape), default=0) > MOST_CHANNELS:
        return Network(None, None, attention, None, COLOURS)
    if len(shapes.get(FORMER_HEAD, ())) == 4:
        return _former_of(shapes, bands_of(state), likely_encoder, likely_options)
    channels = channels_of(state)
    encoder_shapes = {name.removeprefix(ENCODER): shape for name, shape in shapes.items() if name.startswith(ENCODER)}
    bands = bands_of(state)
    encoder = _encoder_of(encoder_shapes, bands, likely_encoder) if encoder_shapes else None
    if encoder and channels:
        for options in _candidates(likely_options):
            architecture = _architecture_of(shapes, encoder, bands, channels, attention, options)
            if architecture is not None:
                return Network(architecture, encoder, attention, channels, bands, _shown(options, architecture))
    return Network(None, encoder, attention, channels, bands)


def channels_of(state: Mapping[str, Tensor]) -> int | None:
    """The number of channels that one of smp's networks predicts, None for any other."""
    heads = [tensor.shape for name, tensor in state.items() if name.startswith(HEAD) and tensor.ndim == 4]
    return heads[-1][0] if heads else None


def bands_of(state: Mapping[str, Tensor]) -> int:
    """The number of bands that a network of convolutions sees: the input channels of the first."""
    weights = (tensor.shape[1] for name, tensor in state.items() if name.endswith("weight") and tensor.ndim == 4)
    return next(weights, COLOURS)


def attention_of(state: Mapping[str, Any]) -> str | None:
    """`scse` where the decoder's tensors have spatial and channel attention, else None."""
    return "scse" if any(SCSE in str(name) for name in state) else None


def _candidates(likely_options: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    return [likely_options, {}] if likely_options else [{}]


def _shown(options: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The options without those that no tensor shows."""
    return {name: value for name, value in options.items() if name not in untraced_options(architecture)}


def _former_of(shapes: Shapes, bands: int, likely: str | None, likely_options: Mapping[str, Any] | None) -> Network:
    channels = shapes[FORMER_HEAD][0]
    for options in _candidates(likely_options):
        if _shapes_of(partial(FTUNetFormer, channels, in_channels=bands, **options)) == shapes:
            return Network("ftunetformer", None, None, channels, bands, options)
        for encoder in [likely, "resnet18"] if likely else ["resnet18"]:
            if _shapes_of(partial(UNetFormer, channels, in_channels=bands, encoder=encoder, **options)) == shapes:
                return Network("unetformer", encoder, None, channels, bands, options)
    return Network(None, None, None, channels, bands)


def _encoder_of(shapes: Shapes, bands: int, likely: str | None) -> str | None:
    names: list[str] = smp.encoders.get_encoder_names()  # type: ignore[no-untyped-call]
    names.sort(key=lambda name: not name.startswith(USUAL))
    transformer = MIX_TRANSFORMER in shapes  # a second each to build
    names = [name for name in names if name.startswith("mit_") == transformer]
    if all(name.startswith("model.") for name in shapes):
        names = []  # one of timm's hundreds, which tensors alone do not tell apart
    # By the class of an encoder, the name of its first tensor, which is the same for all depths.
    first: dict[Any, str] = {}
    for name in [likely, *names] if likely else names:
        family = smp.encoders.encoders.get(name, {}).get("encoder")
        if first.get(family, next(iter(shapes))) not in shapes:
            continue
        found = _shapes_of(partial(smp.encoders.get_encoder, name, in_channels=bands, weights=None))
        if found == shapes:
            return name
        if found and family is not None:
            first[family] = next(iter(found))
    return None


def _architecture_of(
    shapes: Shapes, encoder: str, bands: int, channels: int, attention: str | None, likely_options: Mapping[str, Any]
) -> str | None:
    names: list[str] = sorted(smp.MODEL_ARCHITECTURES_MAPPING, key=lambda name: name != "unet")
    for name in names:
        if not likely_options.keys() <= set(options_of(name)):
            continue
        options = ({"decoder_attention_type": attention} if attention else {}) | dict(likely_options)
        build = partial(
            smp.create_model, name, encoder, encoder_weights=None, in_channels=bands, classes=channels, **options
        )
        if _shapes_of(build) == shapes:
            return name.lower()
    return None


def _shapes_of(build: Callable[[], nn.Module]) -> Shapes | None:
    """Names and shapes of a network's tensors, built on the meta device, which holds no values; None where it cannot be built."""
    try:
        with warnings.catch_warnings():
            # smp warns of its encoders `timm-…`, which files still hold, and of candidates that fit no file.
            warnings.simplefilter("ignore")
            try:
                with torch.device("meta"):
                    model = build()
            except RuntimeError:  # the Mix Transformers compute with values during construction
                model = build()
    except (ConfigError, ValueError, KeyError, TypeError, RuntimeError, AttributeError):
        return None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
