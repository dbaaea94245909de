"""
The work of stage one: the configured tiles, those that the cache already holds, and a summary of what a run did.

Does not import torch, which would take longer than finding the cache complete.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from kdpipe.cache.manifest import Manifest
from kdpipe.cache.reader import read_recipe
from kdpipe.cache.recipe import CacheRecipe
from kdpipe.cache.records import TileRecord
from kdpipe.cache.storage.base import Storage, open_storage
from kdpipe.cache.storage.lock import writer_lock
from kdpipe.cache.writer import finished_tiles, partial_files, sweep, whole_manifest
from kdpipe.configs.schema import Config
from kdpipe.data.dataset import TrainTiles
from kdpipe.data.rasters import Stretch
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import Tile, list_tiles
from kdpipe.pipeline.inputs import check_headers
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.subjects import Subject, subject_noun, subjects
from kdpipe.pipeline.progress import Progress

ResolvePrecision = Callable[[CacheRecipe, list[Tile], Stretch], CacheRecipe]
"""Decides the `auto` precisions in the recipe of a new cache."""


@dataclass
class Summary:
    """
    What a run of stage one did; sizes in bytes, times in seconds, tiles by id.

    `teacher_seconds` is the teacher's share of `seconds`. `online_seconds` and `crops_seconds` are what a live teacher would take in
    each epoch: predicting as `train-student --kd online` does, and predicting the crops alone. `workers` counts the tiles that each
    worker process stored, by address.
    """

    cache: str
    tiles: int
    computed: int = 0
    kept: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    pixels: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    teacher_seconds: float = 0.0
    online_seconds: float = 0.0
    crops_seconds: float = 0.0
    noun: str = "tiles"
    fingerprint: str | None = None
    workers: dict[str, int] = field(default_factory=dict)

    @property
    def paid_after_epochs(self) -> float | None:
        """Epochs after which the cheaper live teacher has taken as long as this cache; None where nothing was computed."""
        cheaper = min(self.online_seconds, self.crops_seconds)
        return self.seconds * self.tiles / self.computed / cheaper if self.computed and cheaper else None

    def as_dict(self) -> dict[str, Any]:
        """The fields and `paid_after_epochs` as plain values, for JSON."""
        return {**asdict(self), "paid_after_epochs": self.paid_after_epochs}


@dataclass(frozen=True)
class Plan:
    """All tiles (or recorded views), the finished ones, the manifest if there is one, and the recipe of the rest."""

    tiles: list[Subject]
    finished: dict[str, TileRecord]
    manifest: Manifest | None
    recipe: CacheRecipe
    storage: Storage
    samples: int  # of a training epoch

    @property
    def missing(self) -> list[Subject]:
        """The tiles to compute."""
        return [tile for tile in self.tiles if tile.id not in self.finished]

    @property
    def is_done(self) -> bool:
        """Whether the cache is complete with exactly these tiles in this order, as its manifest says."""
        return (
            self.manifest is not None
            and not self.missing
            and self.manifest.recipe == self.recipe
            and self.manifest.tiles == [self.finished[tile.id] for tile in self.tiles]
        )


def make_plan(config: Config, resolve_precision: ResolvePrecision, checked: Progress | None = None) -> Plan:
    """
    The configured tiles and those that the cache already holds; `resolve_precision` is called where there is no cache yet.

    With `checked`, the headers of the tiles that are to be computed are checked first, and in a new cache those of the validation tiles
    too; it shows the progress and the notes.

    Raises `DataError` for faulty folders or headers, `CheckpointError` for a missing teacher, `StaleCache` for a cache of another
    recipe, `CorruptCache` for a folder that is not a cache.
    """
    tiles = list_tiles(config.data, "train")
    storage = open_storage(config.cache.path)
    recorded = read_recipe(storage)
    if recorded is None and checked is not None:
        check_headers(config, tiles, list_tiles(config.data, "val"), checked, images_may_fail=True)
    stretch = resolve_stretch(config.data, tiles)
    wanted = subjects(config, tiles, stretch)
    recipe = complete_recipe(config, stretch, recorded, tiles)
    if recorded is None:
        recipe = resolve_precision(recipe, tiles, stretch)
    manifest = whole_manifest(storage)
    finished = finished_tiles(storage, recipe, {tile.id: tile.source for tile in wanted}, manifest)
    if recorded is not None and checked is not None:
        missing = {subject.files[0] for subject in wanted if subject.id not in finished}
        check_headers(config, [tile for tile in tiles if tile.image in missing], [], checked, images_may_fail=True)
    samples = len(TrainTiles(tiles, config))
    return Plan(tiles=wanted, finished=finished, manifest=manifest, recipe=recipe, storage=storage, samples=samples)


def initial_summary(plan: Plan, config: Config) -> Summary:
    """The summary of a run that has computed nothing yet."""
    return Summary(plan.storage.url, tiles=len(plan.tiles), kept=len(plan.finished), noun=subject_noun(config))


def complete_summary(plan: Plan, config: Config) -> Summary:
    """The summary of a run that finds its cache complete, after removing the partial files of killed runs."""
    assert plan.is_done and plan.manifest is not None
    if partial_files(plan.storage):
        with writer_lock(plan.storage):
            sweep(plan.storage)
    summary = initial_summary(plan, config)
    summary.fingerprint = plan.manifest.fingerprint
    return summary


def complete_text(summary: Summary) -> str:
    """The message of a run that finds its cache complete."""
    return f"all {summary.tiles} {summary.noun} are in {summary.cache} already"


def find_complete(config: Config) -> Summary | None:
    """
    The summary if the cache is complete, found without loading what computes; None if it is not, or might not be.

    Raises what `make_plan` raises.
    """
    storage = open_storage(config.cache.path)
    manifest = whole_manifest(storage)
    tiles = list_tiles(config.data, "train")
    # With new tiles a plan is needed anyway, and would be made twice.
    if manifest is None or read_recipe(storage) is None or len(manifest.tiles) < len(tiles):
        return None
    plan = make_plan(config, lambda recipe, *_: recipe)
    return complete_summary(plan, config) if plan.is_done else None
