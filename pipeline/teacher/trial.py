"""A look at a teacher before stage one: whether its networks take the sizes of the tiles, and predict finite numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from kdpipe.cache.recipe import CacheRecipe, TeacherRecord
from kdpipe.configs.errors import ConfigError, DataError, KdpipeError
from kdpipe.configs.schema import Config, MeanStd, Teacher
from kdpipe.pipeline.models.limits.sizes import fixed_side
from kdpipe.pipeline.models.limits.trial import refusal, smallest_side
from kdpipe.pipeline.models.normalize import normalized
from kdpipe.pipeline.models.views import STRIDE, padded_logits
from kdpipe.pipeline.teacher.frozen import FrozenTeacher, computing_in, not_finite_text

Sizes = Callable[[], Iterable[tuple[str, Callable[[], tuple[int, int]]]]]
"""For each image its name, and a function that reads its `(H, W)` and raises `DataError` where that cannot be read."""


def try_teacher(teacher: FrozenTeacher, config: Config, recipe: CacheRecipe, sizes: Sizes) -> None:
    """
    Raise `ConfigError` where a network does not take an image's size, and `KdpipeError` where it predicts numbers that are not finite.

    The errors name the keys to set. Most networks take all sizes, which one pass without values shows; only for others are the headers
    of the images read.
    """
    members = list(config.members.items())
    for number, network in enumerate(teacher.networks):
        (key, member), record = members[number], recipe.teachers[number]
        channels = len(config.data.places(member.bands))
        side = fixed_side(network) or smallest_side(network, 1, channels, training=False)
        if member.architecture is not None and side != STRIDE:
            for name, size in _readable(sizes):
                _refuse_size(key, member, network, channels, name, size)
        if side is not None:
            _refuse_not_finite(network, record, channels, side, teacher.device)


def _refuse_size(
    key: str, member: Teacher, network: nn.Module, channels: int, name: str, size: tuple[int, int]
) -> None:
    height, width = size
    side = fixed_side(network)
    for seen in _seen(height, width, member):
        if side is not None and max(seen) > side:
            raise ConfigError(_fixed_text(key, member, side, name, height, width))
        if side is None and (text := refusal(network, (1, channels, *seen))):
            smallest = smallest_side(network, 1, channels, training=False, above=min(seen))
            needs = f" (at least {smallest} px on each side)" if smallest else ""
            raise ConfigError(
                f"{key}: {_network_text(member)} {text}{needs}, for {name} of {height} x {width} px: leave such images out, or take a "
                "teacher that predicts them"
            )


def _refuse_not_finite(
    network: nn.Module, record: TeacherRecord, channels: int, side: int, device: torch.device
) -> None:
    """Raise `KdpipeError` unless a network predicts finite numbers of an image with all values of 8 bits."""
    ramp = torch.arange(side, device=device) * 255 // max(1, side - 1)
    image_1BHW = ramp.to(torch.uint8).expand(1, channels, side, side)
    normalize = MeanStd(mean=tuple(record.normalize_mean), std=tuple(record.normalize_std))
    with torch.inference_mode(), computing_in(record.precision, device):
        logits = padded_logits(network, normalized(image_1BHW, normalize))
    if not torch.isfinite(logits).all():
        raise KdpipeError(not_finite_text(record.precision))


def _readable(sizes: Sizes) -> Iterator[tuple[str, tuple[int, int]]]:
    """The images of different sizes."""
    known = set()
    for name, read in sizes():
        try:
            size = read()
        except DataError:  # named when it is predicted
            continue
        if size not in known:
            known.add(size)
            yield name, size


def _seen(height: int, width: int, member: Teacher) -> Iterator[tuple[int, int]]:
    """The sizes that the network is given of an image: windows at each scale, padded to multiples of `STRIDE`."""
    for scale in member.scales:
        yield (_side(height, scale, member.window), _side(width, scale, member.window))


def _side(size: int, scale: float, window: int | None) -> int:
    seen = min(_padded(size), window) if window is not None else size
    return _padded(max(1, round(seen * scale)))


def _padded(size: int) -> int:
    return -(-size // STRIDE) * STRIDE


def _fixed_text(key: str, member: Teacher, side: int, name: str, height: int, width: int) -> str:
    window = side // STRIDE * STRIDE
    keys = [] if member.window is not None and member.window <= window else [f"{key}.window: {window}"]
    if max(member.scales) > 1:
        keys.append(f"{key}.scales of at most 1, as larger ones enlarge the windows")
    return (
        f"{key}: {_network_text(member)} takes images of {side} x {side} px only, and {name} has {height} x {width} px: set "
        f"{' and '.join(keys)}"
    )


def _network_text(member: Teacher) -> str:
    return f"{member.architecture} with {member.encoder}" if member.architecture else "the network"
