"""
Published weights of UNetFormer and FTUNetFormer, and of their encoders: found under whatever prefix, loaded strictly.

Nothing is left out in silence: what a caller may leave out is named here, and everything else is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kdpipe.configs.errors import CheckpointError, summarise
from kdpipe.pipeline.models.weights import CLASSES_HINT, bare_state, load_strictly

ENCODER = "backbone."


def load_published(
    model: nn.Module, content: Mapping[str, Any], heads: tuple[str, ...], *, replace_head: bool, origin: str
) -> None:
    """
    Load published weights; `heads` names the tensors whose first axis is the classes.

    With `replace_head`, heads for another number of classes keep the model's own weights. Raises `CheckpointError` that
    names what is missing, unexpected or of another shape.
    """
    state, own = bare_state(content), model.state_dict()
    other = [
        name
        for name in heads
        if isinstance(state.get(name), Tensor)
        and state[name].shape[1:] == own[name].shape[1:]
        and len(state[name]) != len(own[name])
    ]
    if other and not replace_head:
        raise CheckpointError(
            f"{origin} answers in {len(state[other[0]])} classes and the model in {len(own[other[0]])}; "
            f"set student.replace_head: true to start from a new head and its other weights. {CLASSES_HINT}"
        )
    load_strictly(model, {**state, **{name: own[name] for name in other}}, origin=origin)


def load_encoder(encoder: nn.Module, content: Mapping[str, Any], *, origin: str) -> list[str]:
    """
    Load an encoder's weights from its own file, timm's naming or the published one, or from a whole network's.

    Returns a sentence on each thing that was not taken as it is: parts of the file that the encoder does not have, such as a
    classifier or a decoder, are left; output norms (`norm0` …) that a classifier's file lacks keep their own weights. What is
    computed and not learnt (masks and position indices) may be missing or left over. Raises `CheckpointError` for the rest.
    """
    state = bare_state(content)
    own = encoder.state_dict()
    left: list[str] = []
    if any(name.startswith(ENCODER) for name in state):
        left += [name for name in state if not name.startswith(ENCODER)]
        state = {name.removeprefix(ENCODER): value for name, value in state.items() if name.startswith(ENCODER)}
    if any(name.startswith("layers.3.downsample.") for name in state):
        # timm counts a downsampling to the stage after it, published names to the stage before.
        state = {re.sub(r"^layers\.(\d)\.downsample\.", _stage_before, name): value for name, value in state.items()}
    # timm's feature extractors flatten `stages.0` to `stages_0`.
    renamed = {re.sub(r"_(\d+)\.", r".\1.", name, count=1): name for name in own}
    state = {renamed.get(name, name): value for name, value in state.items() if not name.endswith("attn_mask")}
    parts = {name.split(".")[0] for name in own}
    left += [name for name in state if name.split(".")[0] not in parts]
    state = {name: value for name, value in state.items() if name.split(".")[0] in parts}
    fresh = [name for name in own if name not in state and re.match(r"norm\d\.", name)]
    computed = [name for name in own if name not in state and name.endswith("relative_position_index")]
    load_strictly(encoder, {**state, **{name: own[name] for name in fresh + computed}}, origin=origin)
    notes = []
    if left:
        notes.append(f"{origin}: {len(left)} tensors are not of the encoder and were left: {summarise(left, 3)}")
    if fresh:
        notes.append(f"{origin} lacks {len(fresh)} tensors, which start anew: {summarise(fresh, 3)}")
    return notes


def _stage_before(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) - 1}.downsample."
