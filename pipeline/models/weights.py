"""Reading weights: never code, never a tensor dropped or left out in silence."""

from __future__ import annotations

import pickle
import re
import textwrap
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kdpipe.configs.errors import CheckpointError, summarise

CLASSES_HINT = "The student answers in classes.names alone: class_map takes the teacher's classes to them"
NESTS = ("state_dict", "model")  # under which trainers save the weights
UNREADABLE = "is not a readable checkpoint: damaged, or not a file that torch.save wrote"
TORCHSCRIPT_TO_WEIGHTS = """\
import torch
model = torch.jit.load({path!r}, map_location="cpu")
torch.save(model.state_dict(), {target!r})
"""
PICKLE_TO_WEIGHTS = """\
import torch
content = torch.load({path!r}, map_location="cpu", weights_only=False)  # runs what the file says
if isinstance(content, dict):
    content = content.get("state_dict", content.get("model", content))
state = content.state_dict() if isinstance(content, torch.nn.Module) else content
torch.save(dict(state), {target!r})
"""
PREFIXES = ("net.", "model.", "module.", "student.", "teacher.", "_orig_mod.")  # of trainers, distillers, compile


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """
    What a checkpoint file holds, on the CPU, read without executing anything from it.

    Raises `CheckpointError` where the file is missing, damaged, not a mapping, a TorchScript archive, or holds more than
    weights; where the weights can be had from it, the message ends in the lines that save them.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"no checkpoint at {file.absolute()}; relative paths start at the current folder")
    if file.suffix == ".safetensors":
        try:
            return dict(safetensors.torch.load_file(file))
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{file} is not a readable safetensors file: {_first_line(err)}") from err
    if _is_torchscript(file):
        raise CheckpointError(
            f"{file} is a TorchScript archive: a compiled program with its weights, and not a file of weights. "
            "If you trust where it came from, save its weights alone where it can do no harm, and name that file:\n\n"
            + _snippet(TORCHSCRIPT_TO_WEIGHTS, file)
        )
    try:
        with warnings.catch_warnings():
            # torch warns of pickles made by other versions; what cannot be read raises all the same.
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise CheckpointError(_unsafe_text(file, err)) from err
    except KeyError as err:  # torch's for bytes that are no pickle; all that it says is a byte's number
        raise CheckpointError(f"{file} {UNREADABLE}") from err
    except (RuntimeError, EOFError, OSError, ValueError) as err:
        raise CheckpointError(f"{file} {UNREADABLE}: {_first_line(err)}") from err
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} should hold a mapping of names to tensors, found {type(content).__name__}")
    return dict(content)


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint under their own names, and the key and the prefix under which they lay (or none)."""

    state: dict[str, Any]
    nest: str | None
    prefix: str


def unwrapped(content: Mapping[str, Any]) -> Weights:
    """What lies under `state_dict` or `model`, or else the content itself, without prefixes that all names share."""
    nest = next((key for key in NESTS if isinstance(content.get(key), Mapping)), None)
    state, prefix = dict(content if nest is None else content[nest]), ""
    while found := next((p for p in PREFIXES if state and all(str(name).startswith(p) for name in state)), None):
        state = {name.removeprefix(found): value for name, value in state.items()}
        prefix += found
    return Weights(state, nest, prefix)


def bare_state(content: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint without the `state_dict` or `model` around them, and without prefixes that all names share."""
    return unwrapped(content).state


def check_tensors(state: Mapping[str, Any], origin: str) -> None:
    """Raise `CheckpointError` where `state` is not a bare state dict of tensors, saying where the tensors might be."""
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        nested = [key for key, value in state.items() if isinstance(value, Mapping)]
        raise CheckpointError(
            f"{origin} should be a bare state dict of tensors, found the keys {summarise(map(str, state))}"
            + (f"; save just its {nested[0]!r} entry" if nested else "")
        )


def load_strictly(model: nn.Module, state: Mapping[str, Any], origin: str) -> None:
    """
    Load `state` into `model`; every name and shape must fit. Floating-point values of any width become the model's.

    Raises `CheckpointError` that names what is missing, unexpected, of another shape or not floating-point.
    """
    check_tensors(state, origin)
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shared = [name for name in own if name in state]
    reshaped = [
        f"{name} ({tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model)"
        for name in shared
        if state[name].shape != own[name].shape
    ]
    # A quantised integer would be copied as if it were the number it stands for.
    retyped = [
        f"{name} ({str(state[name].dtype).removeprefix('torch.')})"
        for name in shared
        if own[name].is_floating_point() and not state[name].is_floating_point()
    ]
    problems = [
        f"{len(names)} {what}: {summarise(names, 3)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", reshaped),
            ("not floating-point", retyped),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{origin} does not fit the model; of {len(own)} tensors {'; '.join(problems)}")
    model.load_state_dict(dict(state), strict=True)


def _is_torchscript(file: Path) -> bool:
    """Whether a file is a TorchScript archive: of torch's zip files, only those have `constants.pkl`."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _unsafe_text(file: Path, err: Exception) -> str:
    """Why a pickle is not read: what else it holds, and how to have its weights all the same."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, OSError, IndexError, AttributeError):
        # torch lists them for its zip files alone; of an older file it names the first that it met.
        named = re.findall(r"GLOBAL ([\w.]+)", str(err))
    if not named:
        return f"{file} {UNREADABLE}"
    named = sorted(set(named), key=lambda name: (name.startswith(("torch.", "collections.")), name))
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


def _first_line(err: Exception) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0].rstrip(".")
