"""The source of stage two's soft targets: the cache, the live teacher, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.cache.documents import partial_text, read_manifest
from kdpipe.cache.images import digest_pixels
from kdpipe.cache.integrity import check_quick
from kdpipe.cache.reader import SoftTargetCache
from kdpipe.cache.storage.base import open_storage
from kdpipe.configs.errors import CorruptCache, IncompleteCache, StaleCache, count_text, summarise
from kdpipe.configs.schema import Config
from kdpipe.data.dataset import TrainTiles
from kdpipe.data.rasters import Stretch
from kdpipe.data.recorded_views import RecordedViews, tiles_of_mosaics
from kdpipe.data.tiles import Tile, list_tiles
from kdpipe.pipeline.precompute.costs import StageOneCosts, read_costs
from kdpipe.pipeline.precompute.expected_recipe import (
    complete_recipe,
    configured_softening,
    expected_fields,
    refuse_unexpected,
)
from kdpipe.pipeline.precompute.subjects import seen_by_teachers, subjects
from kdpipe.pipeline.teacher import precision
from kdpipe.pipeline.teacher.frozen import open_teacher
from kdpipe.pipeline.teacher.predictions.gaps import WithoutGaps
from kdpipe.pipeline.training.loaders import OnlineTargets
from kdpipe.pipeline.versions import library_note


@dataclass(frozen=True)
class Targets:
    """
    A source of soft targets (None without distillation).

    For a cache also its fingerprint, a note on libraries whose version differs now, and the cost of stage one, where it is recorded.
    """

    source: SoftTargetCache | WithoutGaps | CachedViews | OnlineTargets | None
    fingerprint: str | None = None
    note: str | None = None
    costs: StageOneCosts | None = None


def open_targets(config: Config, tiles: Sequence[Tile], stretch: Stretch, device: torch.device) -> Targets:
    """
    The soft targets that `distill.mode` asks for.

    `cached` needs no teacher, neither in memory nor on disk; if its file exists, its digest is compared. Raises `IncompleteCache`,
    `StaleCache` or `CorruptCache` where the cache does not hold what the configuration describes.
    """
    if config.distill.mode == "none":
        return Targets(None)
    if config.distill.mode == "online":
        recipe = precision.resolve(config, complete_recipe(config, stretch, None), tiles, stretch, device)
        teacher = open_teacher(config, recipe, device)
        return Targets(OnlineTargets(teacher, tiles, config, stretch))
    cache = open_fresh_cache(config, tiles, stretch)
    source: SoftTargetCache | WithoutGaps | CachedViews
    source = cache if config.distill.teacher_view == "tile" else CachedViews(cache, config.teachers_places)
    if config.has_predictions:
        source = WithoutGaps(cache)
    manifest = cache.manifest
    costs = read_costs(config.cache.path, manifest.recipe.digest())
    if costs:  # a repaired tile is paid for twice and stored once
        costs = costs.model_copy(update={"bytes": manifest.tiles.shard_bytes})
    return Targets(source, manifest.fingerprint, library_note(manifest.libraries), costs)


def training_samples(
    config: Config,
    tiles: Sequence[Tile],
    stretch: Stretch,
    source: SoftTargetCache | WithoutGaps | CachedViews | OnlineTargets | None,
) -> TrainTiles:
    """
    The samples to train on, with the soft targets of `source`: fresh crops of the tiles, or recorded views.

    `distill.teacher_view` alone decides, so that runs with and without a teacher see the same crops. Without a teacher, labelled tiles take
    the turns of those without a mask, so that an epoch has as many samples as with one.
    """
    every_tile = list_tiles(config.data, "train") if config.distill.mode == "none" else tiles
    samples = len(TrainTiles(every_tile, config)) if len(every_tile) > len(tiles) else 0
    if config.distill.teacher_view == "tile":
        assert not isinstance(source, CachedViews)
        return TrainTiles(tiles, config, stretch, source, samples=samples)
    assert not isinstance(source, SoftTargetCache | WithoutGaps)
    among = tiles_of_mosaics(config, labelled_only=config.distill.mode == "none")
    return RecordedViews(tiles, config, stretch, source, among=among, samples=samples)


class CachedViews:
    """The soft targets of recorded views in a cache, each for exactly the crop that the teacher saw."""

    def __init__(self, cache: SoftTargetCache, teachers_places: tuple[int, ...]) -> None:
        self._cache, self._teachers_places = cache, teachers_places

    def read_view(
        self, view_id: str, image_BHW: NDArray[np.uint8], inside_HW: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], float]:
        """
        The soft target of a view, float32 `(C, H, W)`, and the entropy that it lost to rounding, mean over the pixels inside.

        Raises `StaleCache` where the crop differs in any bit from the one that the teacher predicted.
        """
        if digest_pixels(seen_by_teachers(image_BHW, self._teachers_places)) != self._cache.image_sha256(view_id):
            note = library_note(self._cache.manifest.libraries)
            raise StaleCache(
                f"the crop that view {view_id} shows now is not the one that the teacher predicted: an image or a mask has changed, or "
                "this machine or its libraries resample or change colours differently"
                + (f" ({note.removeprefix('note: ').partition(';')[0]})" if note else "")
                + "; run `kdpipe precompute-teacher --repair`, which computes only such views again"
            )
        return self._cache.read(view_id), self._cache.entropy_error_over(view_id, inside_HW)


def open_fresh_cache(config: Config, tiles: Sequence[Tile], stretch: Stretch) -> SoftTargetCache:
    """The cache of a configuration; refused if it is unfinished, stale or damaged, or lacks a tile as it is now."""
    storage = open_storage(config.cache.path)
    manifest = read_manifest(storage)
    refuse_unexpected(manifest.recipe, expected_fields(config, stretch, manifest.recipe, tiles), storage.url)
    findings = check_quick(
        storage, manifest, {subject.id: subject.source for subject in subjects(config, tiles, stretch)}
    )
    edited = [finding.message for finding in findings if finding.code == "damaged-manifest"]
    if edited:
        raise CorruptCache(
            f"{storage.url}: {edited[0]}; restore it, or delete it and run `kdpipe precompute-teacher` again: finished tiles are kept"
        )
    limit = config.data.limit
    if (
        manifest.partial_of is not None
        and limit is None
        and any(finding.code == "missing-tile" for finding in findings)
    ):
        raise IncompleteCache(
            f"{storage.url} is the cache of a trial: {partial_text(manifest)}; run `kdpipe precompute-teacher` without --limit, which goes "
            "on from it, or train with the same --limit"
        )
    again = "again" if limit is None else f"with --limit {limit}"
    advice = f"run `kdpipe precompute-teacher` {again}: it computes only these"
    for code, error in (("missing", IncompleteCache), ("stale", StaleCache), ("damaged", CorruptCache)):
        found = [finding for finding in findings if finding.code == f"{code}-tile"]
        if found:
            names = summarise(finding.tile or "" for finding in found)
            raise error(
                f"{storage.url}: {count_text(len(found), f'{code} tiles')}: {names} ({found[0].message}); {advice}"
            )
    return SoftTargetCache(storage, manifest, configured_softening(config))
