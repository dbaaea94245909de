"""The key `options` of a network: further arguments of its architecture's constructor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import JsonValue

Options = dict[str, JsonValue]

_LEAVE_OUT = "leave it out: kdpipe needs one logit for each class and pixel, and nothing else"
# The arguments that kdpipe passes itself, and what to write in their place.
SET_BY_TEACHER = {
    "encoder_name": "teacher.encoder",
    "encoder": "teacher.encoder",
    "encoder_weights": "teacher.checkpoint",
    "weights": "teacher.checkpoint",
    "classes": "teacher.classes",
    "num_classes": "teacher.classes",
    "in_channels": "teacher.bands",
    "activation": None,
    "aux_params": None,
}
SET_BY_STUDENT = SET_BY_TEACHER | {
    "encoder_name": "student.encoder",
    "encoder": "student.encoder",
    "encoder_weights": "student.encoder_weights",
    "in_channels": "student.bands",
    "weights": "student.checkpoint",
    "classes": "classes.names",
    "num_classes": "classes.names",
}


def options_text(options: Mapping[str, Any]) -> str:
    """` and options {decoder_channels: [8, 4]}`, as YAML reads them; empty where there are none."""
    if not options:
        return ""
    return f" and options {yaml.safe_dump(dict(options), default_flow_style=True, width=math.inf).strip()}"


def refuse_own(options: Options, own: Mapping[str, str | None]) -> Options:
    """The options; raises `ValueError` for one that kdpipe passes itself, with the key to use instead."""
    for name in options:
        if name in own:
            key = own[name]
            raise ValueError(f"{name} is not an option: {f'set {key} instead' if key else _LEAVE_OUT}")
    return options
