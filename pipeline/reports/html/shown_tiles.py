"""Which tiles a page shows, and what a student and its teacher say of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache.reader import SoftTargetCache
from kdpipe.configs.errors import CacheError
from kdpipe.configs.schema import Config
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.evaluation.evaluate import Model, Stretch
from kdpipe.pipeline.precompute.expected_recipe import configured_softening
from kdpipe.pipeline.precompute.subjects import Subject, WholeTile, subject_noun, subjects
from kdpipe.pipeline.reports.html.layers import TilePictures, draw_tile
from kdpipe.pipeline.runs.record import Run

T = TypeVar("T")
Targets = Callable[[Subject, NDArray[np.uint8]], NDArray[np.float32]]
"""From a subject and its image, uint8 `(H, W, 3)`, to its soft target, float32 `(C, H, W)`."""


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of `items`, spread evenly over their order: the first and the last are among them if two are."""
    if count >= len(items):
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def validation_subjects(config: Config, stretch: Stretch) -> list[Subject]:
    """The validation tiles that have labels. Raises `DataError` where they cannot be listed."""
    tiles = list_tiles(config.data, "val")
    return [WholeTile(tile, config, stretch) for tile in tiles if tile.mask is not None]


def run_cache(run: Run, config: Config) -> tuple[SoftTargetCache | None, str]:
    """The cache that a run learnt from, or None and why its soft targets cannot be shown."""
    if run.cache is None:
        without = {
            "none": "it was trained without a teacher",
            "online": "its teacher was asked live, and nothing was stored",
        }
        return None, f"No soft targets: {without.get(run.mode, run.mode)}."
    try:
        cache = SoftTargetCache.open(run.cache.path, configured_softening(config))
    except CacheError as err:
        return None, f"No soft targets: {err}"
    if cache.manifest.fingerprint != run.cache.fingerprint:
        return None, (
            f"No soft targets: {run.cache.path} has the fingerprint {cache.manifest.fingerprint} now, and the run learnt from "
            f"{run.cache.fingerprint}."
        )
    return cache, ""


def cached_targets(cache: SoftTargetCache) -> Targets:
    """The soft targets of a cache."""
    return lambda subject, image_HWC: cache.read(subject.id)


def training_subjects(config: Config, stretch: Stretch, cache: SoftTargetCache) -> list[Subject]:
    """What the cache has soft targets of: training tiles, or recorded views of them."""
    there = set(cache.tile_ids)
    return [subject for subject in subjects(config, list_tiles(config.data, "train"), stretch) if subject.id in there]


def training_noun(config: Config) -> str:
    """What a training subject is called on a page."""
    return "training tile" if subject_noun(config) == "tiles" else "recorded view"


def draw_subject(
    subject: Subject, group: str, config: Config, models: Mapping[str, Model], targets: Targets | None, **live: Any
) -> TilePictures:
    """The layers of a subject; `models` answer under their names, "" for the only one, and `live` goes to `draw_tile`."""
    image_HWC = subject.image()
    return draw_tile(
        subject.id,
        group,
        image_HWC,
        len(config.classes.names),
        config.classes.ignore_index,
        labels_HW=subject.labels() if subject.mask is not None else None,
        target_CHW=targets(subject, image_HWC) if targets is not None else None,
        answers={name: model.answer(image_HWC).argmax(axis=0) for name, model in models.items()},
        **live,
    )
