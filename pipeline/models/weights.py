"""Reading weights: never code, never a tensor dropped or left out in silence."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kdpipe.cache.manifest import summarise
from kdpipe.configs.errors import CheckpointError

NESTS = ("state_dict", "model")  # under which trainers save the weights
PREFIXES = ("net.", "model.", "module.", "student.", "teacher.")  # of Lightning modules, DataParallel and distillers


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """
    What a checkpoint file holds, on the CPU, read without executing anything from it.

    Raises `CheckpointError` where the file is missing, damaged, not a mapping, or holds more than weights.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"no checkpoint at {file.absolute()}; relative paths start at the current folder")
    if file.suffix == ".safetensors":
        try:
            return dict(safetensors.torch.load_file(file))
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{file} is not a readable safetensors file: {_first_line(err)}") from err
    try:
        with warnings.catch_warnings():
            # torch warns of pickles made by other versions; what cannot be read raises all the same.
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise CheckpointError(
            f"{file} holds more than weights, or is damaged, and reading it could execute code from it: {_first_line(err)}. "
            "If you trust where it came from, load it in a process of its own and save only its state_dict with torch.save"
        ) from err
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as err:
        raise CheckpointError(f"{file} is not a readable checkpoint: {_first_line(err)}") from err
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} should hold a mapping of names to tensors, found {type(content).__name__}")
    return dict(content)


def bare_state(content: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint without the `state_dict` or `model` around them, and without prefixes that all names share."""
    inner = next((content[key] for key in NESTS if isinstance(content.get(key), Mapping)), content)
    state = dict(inner)
    while prefix := next((p for p in PREFIXES if state and all(str(name).startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load_strictly(model: nn.Module, state: Mapping[str, Any], origin: str) -> None:
    """
    Load `state` into `model`; every name and shape must fit.

    Raises `CheckpointError` that names what is missing, unexpected and of another shape, and where the tensors might be.
    """
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        nested = [key for key, value in state.items() if isinstance(value, Mapping)]
        raise CheckpointError(
            f"{origin} should be a bare state dict of tensors, found the keys {summarise(map(str, state))}"
            + (f"; save just its {nested[0]!r} entry" if nested else "")
        )
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} ({tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model)"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {summarise(names, 3)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    if problems:
        raise CheckpointError(f"{origin} does not fit the model; of {len(own)} tensors {'; '.join(problems)}")
    model.load_state_dict(dict(state), strict=True)


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(err: Exception) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0].rstrip(".")
