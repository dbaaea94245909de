"""Networks of segmentation-models-pytorch by name, with errors that name the configuration's key."""

from __future__ import annotations

import difflib
from typing import Any

import segmentation_models_pytorch as smp
from torch import nn

from kdpipe.configs.errors import ConfigError


def create_smp_model(
    architecture: str,
    encoder: str,
    num_classes: int,
    *,
    key: str,
    encoder_weights: str | None = None,
    attention: str | None = None,
) -> nn.Module:
    """
    `smp.create_model`, with random weights unless `encoder_weights` names some; errors name `key`, the section of the configuration.

    `attention` is the decoder's (`scse`), for architectures that have one. Raises `ConfigError` for an unknown architecture or encoder,
    with the nearest known one.
    """
    known = sorted(name.lower() for name in smp.MODEL_ARCHITECTURES_MAPPING)
    if architecture.lower() not in known:
        raise ConfigError(
            f"{key}.architecture: {architecture!r} is unknown{_nearest(architecture, known)}; known: {', '.join(known)}"
        )
    encoders = smp.encoders.get_encoder_names()  # type: ignore[no-untyped-call]
    if encoder not in encoders and not encoder.startswith("tu-"):
        raise ConfigError(
            f"{key}.encoder: {encoder!r} is unknown{_nearest(encoder, encoders)}; any timm model works as tu-NAME, "
            "the others are listed in the documentation of segmentation-models-pytorch"
        )
    options: dict[str, Any] = {"encoder_weights": encoder_weights, "classes": num_classes}
    if attention is not None:
        options["decoder_attention_type"] = attention
    try:
        model: nn.Module = smp.create_model(architecture, encoder_name=encoder, **options)
    except (ValueError, KeyError, RuntimeError, TypeError) as err:
        raise ConfigError(
            f"{key}: segmentation-models-pytorch cannot build {architecture} with {encoder}: {err}"
        ) from err
    return model


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f", did you mean {near[0]}?" if near else ""
