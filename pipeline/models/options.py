"""Options of an architecture: the arguments of its constructor, and those among them that no tensor of its weights shows."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import segmentation_models_pytorch as smp
from torch import nn

from kdpipe.configs.errors import ConfigError
from kdpipe.configs.schema.options import SET_BY_STUDENT, SET_BY_TEACHER
from kdpipe.pipeline.models.unetformer import FTUNetFormer, UNetFormer

FORMERS: dict[str, type[nn.Module]] = {"ftunetformer": FTUNetFormer, "unetformer": UNetFormer}

# Options that change what a network computes, and neither names nor shapes of its tensors: weights that were trained with one value
# load with another. `tests/models/test_options.py` builds every architecture with other values and compares. Of `decoder_use_norm`
# only further settings of the norm, such as `{type: batchnorm, eps: 0.001}`, leave no trace.
UNTRACED = {
    "unet": ("decoder_use_norm", "decoder_interpolation"),
    "unetplusplus": ("decoder_use_norm", "decoder_interpolation"),
    "manet": ("decoder_use_norm", "decoder_interpolation"),
    "linknet": ("decoder_use_norm",),
    "fpn": ("decoder_interpolation",),
    "pspnet": ("decoder_use_norm",),
    "deeplabv3": ("encoder_output_stride", "decoder_atrous_rates"),
    "deeplabv3plus": ("encoder_output_stride", "decoder_atrous_rates"),
    "pan": ("encoder_output_stride", "decoder_interpolation"),
    "upernet": ("decoder_use_norm",),
    "segformer": (),
    "dpt": ("encoder_output_indices", "decoder_readout"),
    "ftunetformer": (),
    "unetformer": (),
}


def options_of(architecture: str) -> list[str]:
    """The options that an architecture has, in its constructor's order; none for an unknown architecture."""
    known: dict[str, type[nn.Module]] = smp.MODEL_ARCHITECTURES_MAPPING | FORMERS
    if architecture.lower() not in known:
        return []
    parameters = inspect.signature(known[architecture.lower()]).parameters.values()
    own = SET_BY_TEACHER.keys() | SET_BY_STUDENT.keys()
    return [each.name for each in parameters if each.kind is not each.VAR_KEYWORD and each.name not in own]


def untraced_options(architecture: str | None) -> list[str]:
    """The options of an architecture that its weights do not show although they change what it computes."""
    return list(UNTRACED.get(architecture.lower(), ())) if architecture else []


def check_options(architecture: str, options: Mapping[str, Any], *, key: str) -> None:
    """Raise `ConfigError` for an option that the architecture lacks, with the nearest that it has; `key` is its section."""
    known = options_of(architecture)
    for name in options if known else ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ConfigError(f"{key}.options: {architecture} has no option {name}; {hint}")
