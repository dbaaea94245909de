"""
The tensors of a network in a checkpoint as a trainer saved it, and what lies beside them.

A network of smp, FTUNetFormer or UNetFormer is found by its two ends, the encoder and the head, under whatever keys and prefix they
lie. A tensor whose name does not begin with that prefix belongs to another part of what was saved, such as a loss or the trainer's own
module. It is left out and named. Every tensor under the prefix has to fit the network, as `weights.load_strictly` checks.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kdpipe.configs.errors import CheckpointError, summarise

Choice = Literal["raw", "ema"]
"""Which of a file's weights: those of the last step, or their average over steps."""

# The first and the last part of a network, by the beginnings of their tensors' names: smp's, and FTUNetFormer's and UNetFormer's.
ENDS = (("encoder.", "segmentation_head."), ("backbone.", "decoder.segmentation_head."))
# Modules that wrap another without changing what it computes: of torch.compile, FSDP and activation checkpointing.
TRANSPARENT = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|averaged?|avg|shadow)(?:[._]|$)", re.IGNORECASE)  # in a key or a prefix
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, beside the `module.` that it averages
DEEPEST = 3  # keys from the top of a file to its tensors
MOST_SHOWN = 4  # numbers of a tensor that is left out, such as a mean of three bands
# Where weights lie whose ends are not known, such as those of an encoder alone.
NESTS = ("state_dict", "model", "model_state_dict", "model_state")
PREFIXES = ("net.", "model.", "module.", "network.", "student.", "teacher.", "_orig_mod.")
ONE_OF_SEVERAL = """\
import torch
content = torch.load({path!r}, map_location="cpu", weights_only=True)
prefix = {prefix!r}
state = {{name[len(prefix):]: value for name, value in content{keys}.items() if name.startswith(prefix)}}
torch.save(state, {target!r})
"""


@dataclass(frozen=True)
class Weights:
    """
    The tensors of a network under their own names, and where they lay.

    Args:
        state: the tensors by name.
        nest: the key that they lay under, None for none, several joined by dots.
        prefix: what all their names began with.
        left_out: the tensors beside them, by name.
        averaged: whether they are an average over steps.
        other: where the file's raw weights lie if these are averaged, and the reverse; None without any.
    """

    state: dict[str, Any]
    nest: str | None
    prefix: str
    left_out: dict[str, Tensor] = field(default_factory=dict)
    averaged: bool = False
    other: str | None = None

    def notes(self, origin: str, key: str | None = None) -> list[str]:
        """A sentence on each thing that was not taken; `key` is the section of the configuration that has `weights`, if one has."""
        found = []
        if self.other is not None:
            taken, left = ("averaged", "raw") if self.averaged else ("raw", "averaged")
            choice = f"; {key}.weights: {'raw' if self.averaged else 'ema'} takes the {left} ones" if key else ""
            found.append(f"{origin} holds raw and averaged (EMA) weights, and the {taken} ones are taken{choice}")
        elif self.averaged:
            found.append(f"{origin} holds averaged (EMA) weights alone, and they are taken")
        if self.left_out:
            shown = summarise([name + _numbers(value) for name, value in self.left_out.items()])
            text = (
                f"{origin}: left out, as they are not in the network, which is {self.prefix.removesuffix('.')}: {shown}"
            )
            if key and {"mean", "std"} & {name.rpartition(".")[2] for name in self.left_out}:
                text += f". If the trainer normalised images by mean and std, {key}.normalize has to do so too"
            found.append(text)
        return found


@dataclass(frozen=True)
class _Place:
    """Where a network lies in a file: the keys down to its tensors, and what their names begin with."""

    keys: tuple[str, ...]
    prefix: str
    averaged: bool

    def __str__(self) -> str:
        return ".".join(part for part in (*self.keys, self.prefix.removesuffix(".")) if part) or "the file itself"


def unwrapped(
    content: Mapping[str, Any], origin: str = "the file", choice: Choice | None = None, key: str = "teacher"
) -> Weights:
    """
    The network in the content of a file; `choice` None takes the raw weights where there are any, else the averaged ones, and of a
    student that kdpipe trained the averaged ones first.

    Where no network is found, its tensors are those under `state_dict` or the like, without the prefixes that all names share. Raises
    `CheckpointError` where the file lacks the chosen weights, and where it holds several networks.
    """
    places = _places(content)
    if not places and choice is None:
        return _without_shared_prefixes(content)
    raw, averaged = ([place for place in places if place.averaged == value] for value in (False, True))
    if choice is None and "kdpipe" in content:  # a student's checkpoint, which predicts with the average
        choice = "ema" if averaged else None
    wanted = averaged if choice == "ema" else raw if choice == "raw" or raw else averaged
    if not wanted:
        there = f"only {summarise(map(str, places))}" if places else "and no network that kdpipe recognises"
        raise CheckpointError(
            f"{key}.weights is {choice}, and {origin} holds no {'averaged' if choice == 'ema' else 'raw'} weights, {there}: leave "
            f"{key}.weights out"
        )
    states = {place: _state_at(place, places, content) for place in wanted}
    (place, state), *others = states.items()
    different = [other for other, found in others if not _equal(found, state)]
    if different:
        raise CheckpointError(_several_text(origin, [place, *different]))
    rest = averaged if place in raw else raw
    return Weights(
        state,
        nest=".".join(place.keys) or None,
        prefix=place.prefix,
        left_out=_beside(place, places, content),
        averaged=place.averaged,
        other=str(rest[0]) if rest else None,
    )


def bare_state(content: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of `unwrapped`, raw where a file has both."""
    return unwrapped(content).state


def _places(content: Mapping[str, Any]) -> list[_Place]:
    """Every network in a file, in its order."""
    # Lightning's WeightAveraging and MMEngine's EMAHook save the average in place of the weights, and the weights beside it.
    swapped = "averaging_state" in content or {"ema_state_dict", "message_hub"} <= content.keys()
    found = []
    for keys, names in _mappings(content, ()):
        for prefix in _prefixes(names):
            counted = prefix.endswith("module.") and prefix.removesuffix("module.") + COUNTER in names
            named = any(AVERAGED.search(part) for part in (*keys, prefix))
            found.append(_Place(keys, prefix, keys == ("state_dict",) if swapped else counted or named))
    return found


def _mappings(content: Mapping[Any, Any], keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """The mappings with tensors in a file: the keys down to each, and the tensors' names."""
    names = [name for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)]
    if names:
        yield keys, names
    if len(keys) < DEEPEST:
        for name, value in content.items():
            if isinstance(name, str) and isinstance(value, Mapping):
                yield from _mappings(value, (*keys, name))


def _prefixes(names: Sequence[str]) -> list[str]:
    """The prefixes under which both ends of a network lie, in the order of the names."""
    found: dict[str, None] = {}
    for first, last in ENDS:
        end = re.compile(rf"(?:^|(?<=\.)){re.escape(first)}")
        possible = dict.fromkeys(name[: match.start()] for name in names for match in end.finditer(name))
        found |= {prefix: None for prefix in possible if any(name.startswith(prefix + last) for name in names)}
    return list(found)


def _state_at(place: _Place, places: Sequence[_Place], content: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a place by their names in the network, without those of a network within it, such as its average."""
    start, inner = len(place.prefix), tuple(other.prefix for other in places if _is_within(other, place))
    return {
        TRANSPARENT.sub("", name[start:]): value
        for name, value in _tensors(place, content)
        if name.startswith(place.prefix) and not (inner and name.startswith(inner))
    }


def _is_within(place: _Place, other: _Place) -> bool:
    return place != other and place.keys == other.keys and place.prefix.startswith(other.prefix)


def _tensors(place: _Place, content: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key in place.keys:
        content = content[key]
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            yield name, value


def _beside(place: _Place, places: Sequence[_Place], content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors beside a place that belong to no network."""
    known = tuple(other.prefix for other in places if other.keys == place.keys)
    return {name: value for name, value in _tensors(place, content) if not name.startswith(known)}


def _equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in some.items())


def _without_shared_prefixes(content: Mapping[str, Any]) -> Weights:
    nest = next((key for key in NESTS if isinstance(content.get(key), Mapping)), None)
    state, prefix = dict(content if nest is None else content[nest]), ""
    while found := next((p for p in PREFIXES if state and all(str(name).startswith(p) for name in state)), None):
        state = {name.removeprefix(found): value for name, value in state.items()}
        prefix += found
    return Weights(state, nest, prefix)


def _numbers(value: Tensor) -> str:
    """` (0.485, 0.456, 0.406)` for a tensor of few numbers, else nothing."""
    if value.numel() > MOST_SHOWN or value.is_complex():
        return ""
    return f" ({', '.join(f'{number:g}' for number in value.flatten().tolist())})"


def _several_text(origin: str, places: Sequence[_Place]) -> str:
    file, first = Path(origin), places[0]
    lines = ONE_OF_SEVERAL.format(
        path=origin,
        keys="".join(f"[{key!r}]" for key in first.keys),
        prefix=first.prefix,
        target=str(file.with_name(f"{file.stem}_weights.pth")),
    )
    return (
        f"{origin} holds the weights of {len(places)} networks: {summarise(map(str, places))}. Save those of one alone, and name that "
        f"file; for {first}:\n\n{textwrap.indent(lines.rstrip(), '    ')}"
    )
