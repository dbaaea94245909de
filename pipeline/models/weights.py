"""
Reading weights and loading them into networks: no code is executed, and no tensor is dropped or left out in silence.

Published weights of UNetFormer, FTUNetFormer and their encoders load under any usual prefix. What a caller may leave out is named here;
everything else that does not fit is an error that names it.
"""

from __future__ import annotations

import pickle
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import safetensors.torch
import torch
from torch import Tensor, nn

from kdpipe.configs.errors import CheckpointError, count_text, summarise
from kdpipe.pipeline.models.container import UNREADABLE, load_pickled, names_in_archive, readable
from kdpipe.pipeline.models.normalize import adapted_to_bands, other_bands_text
from kdpipe.pipeline.models.unwrap import bare_state

CLASSES_HINT = "The student predicts classes.names; class_map maps the teacher's classes to them"
COUNTER = "num_batches_tracked"  # the last part of a counter's name
BACKBONE = "backbone."  # of the encoder's tensors in published weights
TORCHSCRIPT_TO_WEIGHTS = """\
import torch
model = torch.jit.load({path!r}, map_location="cpu")
torch.save(model.state_dict(), {target!r})
"""
PICKLE_TO_WEIGHTS = """\
import torch
def kept(value):
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if not isinstance(value, dict):
        return value if type(value) in (torch.Tensor, torch.nn.Parameter, int, float, str) else None
    parts = {{name: kept(each) for name, each in value.items() if isinstance(name, str)}}
    return {{name: each for name, each in parts.items() if each is not None}}
content = torch.load({path!r}, map_location="cpu", weights_only=False)  # executes code in the file
torch.save(kept(content), {target!r})
"""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """
    The content of a checkpoint file, on the CPU, read without executing anything from it.

    Raises `CheckpointError` where the file is missing, damaged, not a mapping, a TorchScript archive, or holds more than
    weights; if the weights can be extracted, the message ends with the lines of Python that do so.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"no checkpoint at {file.absolute()}; relative paths start at the current folder")
    if file.suffix == ".safetensors":
        with readable(file, "is not a readable safetensors file"):
            return dict(safetensors.torch.load_file(file))
    with readable(file):
        # Only the archives of torch.jit have this record.
        if any(name.endswith("/constants.pkl") for name in names_in_archive(file)):
            raise CheckpointError(
                f"{file} is a TorchScript archive: a compiled program with its weights, not a file of weights. "
                "If you trust where it came from, save its weights alone where it can do no harm, and name that file:\n\n"
                + _snippet(TORCHSCRIPT_TO_WEIGHTS, file)
            )
        try:
            content = load_pickled(file)
        except pickle.UnpicklingError as err:
            raise CheckpointError(_unsafe_text(file, err)) from err
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} should hold a mapping of names to tensors, found {type(content).__name__}")
    return dict(content)


@runtime_checkable
class Explains(Protocol):
    """A network that knows from names why weights do not fit it."""

    def explain_misfit(self, state: Mapping[str, Any]) -> str:
        """A sentence on the reason; empty where the names do not tell."""
        ...


def check_tensors(state: Mapping[str, Any], origin: str) -> None:
    """Raise `CheckpointError` where `state` is not a bare state dict of tensors, naming the key that may hold them."""
    is_named = all(isinstance(name, str) for name in state)
    if not state or not is_named or not all(isinstance(value, Tensor) for value in state.values()):
        nested = [key for key, value in state.items() if isinstance(value, Mapping)]
        raise CheckpointError(
            f"{origin} should be a bare state dict of tensors, found the keys {summarise(map(str, state))}"
            + (f"; save just its {nested[0]!r} entry" if nested else "")
        )


class Misfit(CheckpointError):
    """Weights of another network than the one they are loaded into."""


def load_strictly(model: nn.Module, state: Mapping[str, Any], origin: str) -> list[str]:
    """
    Load `state` into `model`; every name and shape must fit. Floating-point values of any width become the model's type.

    Returns a sentence if the file lacks the counters of batch norms, which no prediction uses: they stay as they are. Raises `Misfit`
    that names what is missing, unexpected, of another shape or not floating-point, and `CheckpointError` for numbers that are not
    finite.
    """
    check_tensors(state, origin)
    own = model.state_dict()
    counters = _unused_counters(model) if not any(name.endswith(COUNTER) for name in state) else {}
    state = {**counters, **state}
    shared = [name for name in own if name in state]
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} ({tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model)"
            for name in shared
            if state[name].shape != own[name].shape
        ],
        # A quantised integer would be copied as if it were the number that it stands for.
        "not floating-point": [
            f"{name} ({str(state[name].dtype).removeprefix('torch.')})"
            for name in shared
            if own[name].is_floating_point() and not state[name].is_floating_point()
        ],
    }
    found = [f"{len(names)} {problem}: {summarise(names, 3)}" for problem, names in problems.items() if names]
    if found:
        reason = (isinstance(model, Explains) and model.explain_misfit(state)) or other_bands_text(own, state)
        raise Misfit(
            f"{origin} does not fit the model; of {count_text(len(own), 'tensors')} {'; '.join(found)}"
            + (f". {reason}" if reason else "")
        )
    _refuse_not_finite(own, state, origin)
    model.load_state_dict(dict(state), strict=True)
    if not counters:
        return []
    return [f"{origin} lacks the {len(counters)} counters {COUNTER} of batch norms, which no prediction uses"]


def _unused_counters(model: nn.Module) -> dict[str, Tensor]:
    """The counters of batch norms that do not use them, as a momentum says how fast their statistics follow."""
    return {
        f"{name}.{COUNTER}": module.num_batches_tracked
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.num_batches_tracked is not None
        and module.momentum is not None
    }


def _refuse_not_finite(own: Mapping[str, Tensor], state: Mapping[str, Any], origin: str) -> None:
    """Raise `CheckpointError` for numbers that are NaN or infinite in the model's type, where its own are finite."""
    found = []
    for name, value in state.items():
        finite = torch.isfinite(value.to(own[name].dtype))
        if not finite.all() and torch.isfinite(own[name]).all():
            found.append(f"{name} ({int((~finite).sum())} of {value.numel()})")
    if found:
        raise CheckpointError(
            f"{origin} holds numbers that are NaN or infinite, with which a network predicts nothing, in {len(found)} of {len(own)} "
            f"tensors: {summarise(found, 3)}. Its training diverged: take an earlier checkpoint of it"
        )


def load_published(
    model: nn.Module, content: Mapping[str, Any], heads: tuple[str, ...], *, replace_head: bool, origin: str
) -> None:
    """
    Load published weights; `heads` names the tensors whose first axis is the classes.

    With `replace_head`, heads for another number of classes keep the model's own weights. Raises what `load_strictly` raises,
    and `CheckpointError` for another number of classes without `replace_head`.
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
            f"{origin} predicts {len(state[other[0]])} classes and the model {len(own[other[0]])}; "
            f"set student.replace_head: true to start from a new head and its other weights. {CLASSES_HINT}"
        )
    load_strictly(model, {**state, **{name: own[name] for name in other}}, origin=origin)


def load_encoder(encoder: nn.Module, content: Mapping[str, Any], *, origin: str) -> list[str]:
    """
    Load an encoder's weights from its own file, in timm's or the published naming, or from a whole network's.

    Returns a sentence on each thing that was not taken as it is: tensors of other parts, such as a classifier or a decoder, are
    ignored; output norms (`norm0` …) that a classifier's file lacks keep their own weights. Computed tensors (masks and position
    indices) may be missing or left over. Raises `CheckpointError` for the rest.
    """
    state, own = bare_state(content), encoder.state_dict()
    ignored: list[str] = []
    if any(name.startswith(BACKBONE) for name in state):
        ignored += [name for name in state if not name.startswith(BACKBONE)]
        state = {name.removeprefix(BACKBONE): value for name, value in state.items() if name.startswith(BACKBONE)}
    if any(name.startswith("layers.3.downsample.") for name in state):
        # timm counts a downsampling to the stage after it, published names to the stage before.
        state = {re.sub(r"^layers\.(\d)\.downsample\.", _stage_before, name): value for name, value in state.items()}
    # timm's feature extractors flatten `stages.0` to `stages_0`.
    renamed = {re.sub(r"_(\d+)\.", r".\1.", name, count=1): name for name in own}
    state = {renamed.get(name, name): value for name, value in state.items() if not name.endswith("attn_mask")}
    parts = {name.split(".")[0] for name in own}
    ignored += [name for name in state if name.split(".")[0] not in parts]
    state = {name: value for name, value in state.items() if name.split(".")[0] in parts}
    initial = [name for name in own if name not in state and re.match(r"norm\d\.", name)]
    computed = [name for name in own if name not in state and name.endswith("relative_position_index")]
    notes: list[str] = []
    state = adapted_to_bands(encoder, state, origin, notes.append)
    load_strictly(encoder, {**state, **{name: own[name] for name in initial + computed}}, origin=origin)
    if ignored:
        count = count_text(len(ignored), "tensors")
        were = "was" if len(ignored) == 1 else "were"
        notes.append(f"{origin}: {count} outside the encoder {were} ignored: {summarise(ignored, 3)}")
    if initial:
        count = count_text(len(initial), "tensors")
        keep = "keeps" if len(initial) == 1 else "keep"
        notes.append(f"{origin} lacks {count}, which {keep} initial values: {summarise(initial, 3)}")
    return notes


def _stage_before(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) - 1}.downsample."


def _unsafe_text(file: Path, err: Exception) -> str:
    """The message for a refused pickle: what it holds beside weights, and how to extract them."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # the pickle is damaged
        named = []
    # torch lists only the globals of its zip files that it refuses itself; the error names the first.
    named = named or re.findall(r"GLOBAL ([\w.]+)", str(err))
    if not named:
        return f"{file} {UNREADABLE}"
    named = sorted({name[:100] for name in named}, key=lambda name: (name.startswith(("torch.", "collections.")), name))
    what = (
        "is a whole pickled model (nn.Module)"
        if any(name.startswith("torch.nn.modules.") for name in named)
        else "holds more than weights"
    )
    return (
        f"{file} {what}: reading it could execute code that it names ({summarise(named, 3)}), so it is refused. "
        "If you trust where it came from, save its weights alone in a container without network, and name that file:\n\n"
        + _snippet(PICKLE_TO_WEIGHTS, file)
    )


def _snippet(template: str, file: Path) -> str:
    lines = template.format(path=str(file), target=str(file.with_name(f"{file.stem}_weights.pth")))
    return textwrap.indent(lines.rstrip(), "    ")
