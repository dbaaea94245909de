"""The batches that the teacher predicts: which tiles, the same in every run, and their images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.cache.index.records import ImageDigest, TileRecord
from kdpipe.cache.recipe import CacheRecipe
from kdpipe.cache.storage.ahead import in_order
from kdpipe.configs.errors import DataError
from kdpipe.configs.schema import Config
from kdpipe.data.tiles import Tile
from kdpipe.pipeline.inputs import refuse_unusable
from kdpipe.pipeline.precompute.subjects import Seen, Subject, WholeTile
from kdpipe.pipeline.teacher.frozen import predicts_in_bands

ACCELERATOR_BATCH = 8  # tiles of equal size in a forward pass on an accelerator
HEADER_READERS = 16  # threads that read image sizes: on a network's file system they mostly wait

Check = Callable[[Subject], None]
"""Raises `DataError` for a subject that must not be predicted."""


@dataclass(frozen=True)
class LoadedBatch:
    """
    What the teacher is given of a batch (see `Seen`), `(N, H, W, B)`; None if no tile is readable.

    Each tile has a digest or a cause of failure.

    A `scene` has neither: it is read while the teacher predicts it.
    """

    tiles: list[Subject]
    digests: dict[str, ImageDigest]
    images_NHWC: NDArray[Any] | None
    failed: dict[str, str]
    scene: WholeTile | None = None


def teacher_batch_size(config: Config, device: torch.device) -> int:
    """Tiles of equal size in a forward pass: the smallest that a teacher's configuration sets, or the device's default."""
    default = 1 if device.type == "cpu" else ACCELERATOR_BATCH
    return min(member.batch_size or default for member in config.members.values())


def make_batches(
    tiles: Sequence[Subject], finished: Mapping[str, TileRecord], batch_size: int
) -> Iterator[list[Subject]]:
    """
    Batches of equal size of all tiles, each as soon as its last header is read; the last ones may have fewer tiles.

    All tiles, not only the missing ones: a tile's last bits can depend on its neighbours in the batch, so a resumed run computes it
    beside the same ones. An image with an unreadable header is assumed to be as large as the one before it: it keeps its place,
    and fails when it is read.
    """
    if batch_size == 1:
        yield from ([tile] for tile in tiles)
        return

    def size_of(tile: Subject) -> tuple[int, int] | None:
        record = finished.get(tile.id)
        try:
            return (record.height, record.width) if record else tile.size()
        except DataError:
            return None

    filling: dict[tuple[int, int], list[Subject]] = {}
    before: tuple[int, int] | None = None
    waiting: list[Subject] = []  # until there is a size: tiles whose headers cannot be read, before the first that can
    for tile, size in zip(tiles, in_order(size_of, tiles, HEADER_READERS), strict=True):
        before = size or before
        waiting.append(tile)
        if before is None:
            continue
        for each in waiting:
            batch = filling.setdefault(before, [])
            batch.append(each)
            if len(batch) == batch_size:
                yield filling.pop(before)
        waiting = []
    yield from filling.values()
    yield from (waiting[start : start + batch_size] for start in range(0, len(waiting), batch_size))


def header_check(config: Config) -> Check:
    """A `Check` of what a subject's image and mask declare, for runs of more tiles than are looked at before the work begins."""

    def check(subject: Subject) -> None:
        # The files of a stored prediction are not the image.
        if isinstance(subject, WholeTile):
            refuse_unusable(config, subject.tile)
        else:
            refuse_unusable(config, Tile(subject.id, subject.files[0], subject.mask))

    return check


def load_batch_or_scene(batch: list[Subject], recipe: CacheRecipe, check: Check | None = None) -> LoadedBatch:
    """`load_batch`, except that a single tile larger than the teacher's window is left as a `scene`, so that memory stays flat."""
    (first, *others) = batch
    try:
        if not others and isinstance(first, WholeTile) and predicts_in_bands(recipe, (1, *first.size(), 3)):
            if check is not None:
                check(first)
            return LoadedBatch(batch, {}, None, {}, scene=first)
    except DataError:  # `load_batch` meets it again
        pass
    return load_batch(batch, check)


def load_batch(batch: list[Subject], check: Check | None = None) -> LoadedBatch:
    """
    The images and digests of a batch; `check` is called for each tile before it is read.

    An unreadable tile keeps its place, in black, and its prediction is discarded. Without it the others would be computed in a smaller
    batch than in an undisturbed run, and their last bits could differ.
    """
    images: list[Seen | None] = []
    digests, failed = {}, {}
    for tile in batch:
        try:
            if check is not None:
                check(tile)
            image_HWC, digest = tile.load()
        except (DataError, OSError) as err:
            failed[tile.id] = str(err)
            images.append(None)
            continue
        digests[tile.id] = digest
        images.append(image_HWC)
    whole = next((image for image in images if image is not None), None)
    if whole is None:
        return LoadedBatch(batch, digests, None, failed)
    if len(images) == 1:
        return LoadedBatch(batch, digests, whole[None], failed)
    images_NHWC: NDArray[Any] = np.stack([np.zeros_like(whole) if image is None else image for image in images])
    return LoadedBatch(batch, digests, images_NHWC, failed)
