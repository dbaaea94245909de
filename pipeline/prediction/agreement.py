"""
How far an exported file agrees with the float32 one on real tiles, and how long each takes for an image.

Shapes: B bands, C classes, H W pixels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdpipe.configs.errors import ConfigError, DataError
from kdpipe.configs.schema import Data
from kdpipe.data.dataset import ValTiles
from kdpipe.data.scenes import list_scenes
from kdpipe.data.tiles import Tile, folders_of, limited, list_tiles
from kdpipe.pipeline.evaluation.confusion import count_pairs, scores
from kdpipe.pipeline.progress import Progress
from kdpipe.pipeline.runs.checkpoint import Trained

MOST_TILES = 32  # on the same pixels, the mIoU of two files differs by little else than the files
MOST_PX = 1024  # of a side; of larger images, the middle
ROUNDS, LEAST_ROUNDS, MOST_SECONDS = 15, 5, 30.0  # of a measurement of latency

Classify = Callable[[NDArray[np.uint8]], NDArray[Any]]
"""From an image, uint8 `(B, H, W)`, to its classes, integers `(H, W)`."""
Values = TypeVar("Values", bound=np.generic)


def tiles_to_verify(data: Data, paths: Sequence[str], most: int) -> list[Tile]:
    """
    At most `most` tiles of `paths`, by default of `data.val`, spread evenly; those with masks, if there are any.

    A path is a root of tiles, an image, or a folder of images. Raises `ConfigError` where there is no tile.
    """
    every = {"train": [], "unlabelled": [], "allow_missing_masks": True, "limit": most}
    roots = [path for path in paths if folders_of(path, data)[0].is_dir()]
    tiles: list[Tile] = []
    try:
        if roots:
            tiles = list_tiles(data.model_copy(update={**every, "val": roots, "split": None}), "val")
        elif not paths and data.val:
            tiles = list_tiles(data.model_copy(update=every), "val")
        images = [path for path in paths if path not in roots]
        tiles += [Tile(path, Path(path), None) for path in (list_scenes(images) if images else [])]
    except DataError as err:
        raise ConfigError(f"there are no tiles to verify the file on: {err}; name images with --tiles") from err
    if not tiles:
        raise ConfigError("there are no tiles to verify the file on, as data.val is empty: name images with --tiles")
    return limited([tile for tile in tiles if tile.mask is not None] or tiles, most)


def tiles_to_calibrate(data: Data, folder: str | None, most: int) -> list[Tile]:
    """At most `most` tiles of `folder`, by default of `data.train`, spread evenly. Raises `ConfigError` where there is none."""
    try:
        if folder is None:
            return list_tiles(data.model_copy(update={"allow_missing_masks": True, "limit": most}), "train")
        images = folders_of(folder, data)[0]
        paths = list_scenes([str(images) if images.is_dir() else folder])
    except DataError as err:
        raise ConfigError(
            f"there are no tiles to calibrate on: {err}; name a folder of images with --calibrate"
        ) from err
    return [Tile(path, Path(path), None) for path in limited(paths, most)]


def pixels_of(
    trained: Trained, tiles: Sequence[Tile], most_px: int
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """The middle of each tile, of at most `most_px` a side: its image uint8 `(B, H, W)`, and its labels int64 `(H, W)`."""
    dataset = ValTiles(tiles, trained.config, trained.stretch)
    for number in range(len(tiles)):
        sample = dataset[number]
        yield middle(sample["image"], most_px), middle(sample["mask"], most_px)


@dataclass
class Agreement:
    """
    Counts over pixels: `same` of all `pixels` have the same class in a file as in the reference.

    `reference_CC` counts pairs of a label and a class of the reference, `confusion_CC` of a label and a class of the file.
    """

    num_classes: int
    pixels: int = 0
    same: int = 0
    reference_CC: NDArray[np.int64] = field(init=False)
    confusion_CC: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.reference_CC, self.confusion_CC = np.zeros((2, self.num_classes, self.num_classes), np.int64)

    def add(
        self, expected_HW: NDArray[Any], found_HW: NDArray[Any], labels_HW: NDArray[np.int64], ignore_index: int
    ) -> None:
        """Count the pixels of one image."""
        size = self.num_classes
        self.pixels += found_HW.size
        self.same += int((found_HW == expected_HW).sum())
        self.reference_CC += count_pairs(labels_HW, expected_HW, size, size, ignore_index)
        self.confusion_CC += count_pairs(labels_HW, found_HW, size, size, ignore_index)


def agreements(
    trained: Trained, tiles: Sequence[Tile], reference: Classify, others: Mapping[str, Classify], progress: Progress
) -> dict[str, Agreement]:
    """The agreement of each of `others` with `reference` on all tiles."""
    classes = trained.config.classes
    found = {name: Agreement(len(classes.names)) for name in others}
    with progress.bar("verify", len(tiles), "tiles") as advance:
        for image_BHW, labels_HW in pixels_of(trained, tiles, MOST_PX):
            expected_HW = reference(image_BHW)
            for name, classify in others.items():
                found[name].add(expected_HW, classify(image_BHW), labels_HW, classes.ignore_index)
            advance(1)
    return found


def miou(trained: Trained, confusion_CC: NDArray[np.int64]) -> float | None:
    """The mIoU in percent; None where no label is scored."""
    classes = trained.config.classes
    found = scores(confusion_CC, classes.names, classes.not_scored).miou
    return None if np.isnan(found) else 100 * found


def latencies(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """
    The median of the milliseconds that each of `runs` takes, after a run that does not count.

    They take turns, so that all are slowed down alike by what else the machine does.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    start = time.monotonic()
    for number in range(1, ROUNDS + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            taken[name].append(1000 * (time.perf_counter() - began))
        if number >= LEAST_ROUNDS and time.monotonic() - start > MOST_SECONDS:
            break
    return {name: statistics.median(values) for name, values in taken.items()}


def middle(array: NDArray[Values], most_px: int) -> NDArray[Values]:
    """The middle of an array `(…, H, W)`, of at most `most_px` a side."""
    top, left = (max(0, (size - most_px) // 2) for size in array.shape[-2:])
    return array[..., top : top + most_px, left : left + most_px]
