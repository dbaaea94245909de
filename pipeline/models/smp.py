"""Networks of segmentation-models-pytorch by name, with errors that name the configuration's key."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import nn

from kdpipe.configs.errors import ConfigError
from kdpipe.configs.schema.options import options_text
from kdpipe.pipeline.models.options import check_options

# Encoders that smp itself takes as `tu-…` today.
ALIASES = ("timm-regnet", "timm-res2", "timm-resnest", "timm-mobilenetv3", "timm-gernet")
DERIVED = ("regnet", "res2", "resnest", "gernet")  # timm's names of those whose tensors older versions named otherwise
TRIAL_PX = 256  # side of the image on which options are tried: the smallest that all of smp's decoders take


def create_smp_model(
    architecture: str,
    encoder: str,
    num_classes: int,
    *,
    key: str,
    in_channels: int = 3,
    encoder_weights: str | None = None,
    attention: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """
    `smp.create_model` for images of `in_channels` bands, with random weights unless `encoder_weights` names some, which smp adapts to the
    number of bands. Errors name `key`, the section of the configuration.

    `options` are further arguments of the architecture's constructor. `attention` is the decoder's (`scse`), for architectures that
    have one, unless `options` names it. Raises `ConfigError` for an unknown architecture, encoder or option, with the nearest known one,
    and for options with which no logits of the image's size come out.
    """
    known = sorted(name.lower() for name in smp.MODEL_ARCHITECTURES_MAPPING)
    if architecture.lower() not in known:
        raise ConfigError(
            f"{key}.architecture: {architecture!r} is unknown{_nearest(architecture, known)}; known: {', '.join(known)}"
        )
    encoders = smp.encoders.get_encoder_names()  # type: ignore[no-untyped-call]
    if encoder not in encoders and not encoder.startswith(("tu-", *ALIASES)):
        raise ConfigError(
            f"{key}.encoder: {encoder!r} is unknown{_nearest(encoder, encoders)}; any timm model works as tu-NAME, "
            "the others are listed in the documentation of segmentation-models-pytorch"
        )
    given = dict(options or {})
    check_options(architecture, given, key=key)
    arguments: dict[str, Any] = {"encoder_weights": encoder_weights, "classes": num_classes, "in_channels": in_channels}
    if attention is not None:
        arguments["decoder_attention_type"] = attention
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # smp's, of all encoders `timm-…`
            model: nn.Module = smp.create_model(architecture, encoder_name=encoder, **arguments | given)
    except OSError:  # weights that cannot be downloaded: the caller's to explain
        raise
    except Exception as err:  # smp checks few of its arguments: what a wrong value raises is anything
        if not given and not isinstance(err, (ValueError, KeyError, RuntimeError, TypeError)):
            raise
        raise ConfigError(
            f"{key}: segmentation-models-pytorch cannot build {architecture} with {encoder}{options_text(given)}: {err}"
        ) from err
    if given:
        _check_logits(
            model, in_channels, num_classes, f"{key}.options: {architecture} with {encoder}{options_text(given)}"
        )
    return model


def named_as_today(state: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    """
    Tensors for one of smp's networks under the names that smp gives them today.

    Older versions derived some encoders from timm's classes, which newer ones hold as `model`; the computation is the same.
    """
    derived = str(getattr(getattr(network, "encoder", None), "name", "")).startswith(DERIVED)
    if not derived or any(name.startswith("encoder.model.") for name in state):
        return dict(state)
    # timm's feature extractors flatten `stages.0` to `stages_0`.
    renamed = {name: re.sub(r"^encoder\.", "encoder.model.", name) for name in state}
    return {re.sub(r"(?<=^encoder\.model\.stages)\.", "_", renamed[name]): value for name, value in state.items()}


def _check_logits(model: nn.Module, in_channels: int, num_classes: int, what: str) -> None:
    """Raise `ConfigError` unless the network gives logits of its image's size."""
    training, expected = model.training, (1, num_classes, TRIAL_PX, TRIAL_PX)
    try:
        with torch.inference_mode():
            found = tuple(model.eval()(torch.zeros(1, in_channels, TRIAL_PX, TRIAL_PX)).shape)
    except AssertionError:  # an encoder of timm that takes one size of image only
        return
    except Exception as err:  # a decoder checks its interpolation, for one, only when it runs
        raise ConfigError(f"{what} cannot predict an image: {err}") from err
    finally:
        model.train(training)
    if found != expected:
        raise ConfigError(
            f"{what} gives logits of {found[-2]} x {found[-1]} px for an image of {TRIAL_PX} x {TRIAL_PX} px, and kdpipe needs them "
            "at the image's size: set upsampling to fit, or leave it out"
        )


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f", did you mean {near[0]}?" if near else ""
