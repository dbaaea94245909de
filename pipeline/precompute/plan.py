"""
The work of stage one: the configured tiles, those that the cache already holds, and a summary of what a run did.

Does not import torch, which would take longer than finding the cache complete.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from kdpipe.cache.documents import read_recipe, whole_manifest
from kdpipe.cache.index.records import TileRecord
from kdpipe.cache.manifest import MAX_LISTED, Manifest
from kdpipe.cache.recipe import CacheRecipe
from kdpipe.cache.storage.base import Storage, open_storage
from kdpipe.cache.storage.lock import writer_lock
from kdpipe.cache.writer import finished_tiles, partial_files, sweep
from kdpipe.configs.errors import count_text, summarise
from kdpipe.configs.schema import Config
from kdpipe.data.dataset import TrainTiles
from kdpipe.data.rasters import Stretch
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import Tile, list_tiles, without_limit
from kdpipe.pipeline.inputs import MOST_BEFORE, check_headers, note_masks
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.subjects import Subject, require_predictions, subject_noun, subjects
from kdpipe.pipeline.progress import Progress

ResolvePrecision = Callable[[CacheRecipe, list[Tile], Stretch], CacheRecipe]
"""Decides the `auto` precisions in the recipe of a new cache."""


@dataclass
class Summary:
    """
    What a run of stage one did; sizes in bytes, times in seconds, tiles by id.

    `teacher_seconds` is the teacher's share of `seconds`. `online_seconds` and `crops_seconds` are what a live teacher would take in
    each epoch: predicting as `train-student --kd online` does, and predicting the crops alone. `workers` counts the tiles that each
    worker process stored, by address. With `limit`, `tiles` are those of the trial, and `configured` all of the configuration;
    `cached` is the number that a finished cache holds.
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
    limit: int | None = None
    configured: int = 0
    cached: int | None = None

    @property
    def is_partial(self) -> bool:
        """Whether the cache is finished for a trial, and lacks tiles of the configuration."""
        return self.cached is not None and self.cached < self.configured

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
    """
    The wanted tiles (or recorded views), the finished ones among them, the manifest if there is one, and the recipe of the rest.

    `configured` are the ids of all tiles of the configuration, in its order. Where `data.limit` wants some of them, `others` are those of
    the rest that the cache holds as well, and keeps.
    """

    tiles: list[Subject]
    finished: dict[str, TileRecord]
    manifest: Manifest | None
    recipe: CacheRecipe
    storage: Storage
    samples: int  # of a training epoch
    configured: list[str]
    others: dict[str, TileRecord]

    @property
    def missing(self) -> list[Subject]:
        """The tiles to compute."""
        return [tile for tile in self.tiles if tile.id not in self.finished]

    @property
    def checks_as_read(self) -> bool:
        """Whether not all headers of the missing tiles were read by `make_plan`, so that each is checked before it is predicted."""
        return len(self.missing) > MOST_BEFORE

    @cached_property  # as it compares each record
    def is_done(self) -> bool:
        """Whether the cache holds the wanted tiles, and its manifest lists exactly what it holds, in the order of the configuration."""
        if self.manifest is None or self.missing or self.manifest.recipe != self.recipe:
            return False
        listed = self.listed(self.finished)
        if self.manifest.is_indexed != (len(listed) > MAX_LISTED):  # an older kdpipe wrote it
            return False
        return self.manifest.tiles == listed and self.manifest.partial_of == self.partial_of(listed)

    def listed(self, records: Mapping[str, TileRecord]) -> list[TileRecord]:
        """The `records` of the wanted tiles and those of `others`, in the order of the configuration."""
        held = {**self.others, **records}
        return [held[tile] for tile in self.configured if tile in held]

    def partial_of(self, listed: Sequence[TileRecord]) -> int | None:
        """The number of tiles that the configuration has, if not all are `listed`."""
        return len(self.configured) if len(listed) < len(self.configured) else None


def make_plan(
    config: Config,
    resolve_precision: ResolvePrecision,
    checked: Progress | None = None,
    listed_tiles: list[Tile] | None = None,
) -> Plan:
    """
    The configured tiles and those that the cache already holds; `resolve_precision` is called where there is no cache yet.

    `listed_tiles` are those of `list_tiles`, if they are known.

    With `checked`, the headers of the tiles that are to be computed are checked first, and in a new cache those of the validation tiles
    too; it shows the progress and the notes.

    Raises `DataError` for faulty folders or headers, `CheckpointError` for a missing teacher, `StaleCache` for a cache of another
    recipe, `CorruptCache` for a folder that is not a cache.
    """
    tiles = listed_tiles or list_tiles(config.data, "train")
    # What the values depend on is decided by all tiles, so that a run without the limit goes on from a trial.
    every_tile = tiles if config.data.limit is None else list_tiles(without_limit(config.data), "train")
    storage = open_storage(config.cache.path)
    recorded = read_recipe(storage)
    if recorded is None and checked is not None:
        check_headers(config, tiles, list_tiles(config.data, "val"), checked, images_may_fail=True)
        note_masks(config, tiles, checked)
    stretch = resolve_stretch(config.data, tiles)
    wanted = subjects(config, tiles, stretch)
    every = wanted if config.data.limit is None else subjects(config, every_tile, stretch)
    recipe = complete_recipe(config, stretch, recorded, every_tile)
    if recorded is None:
        recipe = resolve_precision(recipe, every_tile, stretch)
    manifest = whole_manifest(storage)
    ids = {tile.id for tile in wanted}
    listed = set(manifest.tiles.ids()) if manifest else None
    looked_up = {tile.id: tile.source for tile in every if listed is None or tile.id in ids or tile.id in listed}
    found = finished_tiles(storage, recipe, looked_up, manifest)
    finished = {tile: record for tile, record in found.items() if tile in ids}
    others = {tile: record for tile, record in found.items() if tile not in ids}
    if recorded is not None and checked is not None:
        missing = {subject.files[0] for subject in wanted if subject.id not in finished}
        val = list_tiles(config.data, "val") if manifest is not None and manifest.partial_of is not None else []
        check_headers(config, [tile for tile in tiles if tile.image in missing], val, checked, images_may_fail=True)
    if checked is not None:
        require_predictions(config, [subject for subject in wanted if subject.id not in finished])
    samples = len(TrainTiles(tiles, config))
    return Plan(
        tiles=wanted, finished=finished, manifest=manifest, recipe=recipe, storage=storage, samples=samples,
        configured=[tile.id for tile in every], others=others,
    )  # fmt: skip


def initial_summary(plan: Plan, config: Config) -> Summary:
    """The summary of a run that has computed nothing yet."""
    return Summary(
        plan.storage.url, tiles=len(plan.tiles), kept=len(plan.finished), noun=subject_noun(config), limit=config.data.limit,
        configured=len(plan.configured),
    )  # fmt: skip


def complete_summary(plan: Plan, config: Config) -> Summary:
    """The summary of a run that finds its cache complete, after removing the partial files of killed runs."""
    assert plan.is_done and plan.manifest is not None
    if partial_files(plan.storage):
        with writer_lock(plan.storage):
            sweep(plan.storage)
    summary = initial_summary(plan, config)
    summary.fingerprint, summary.cached = plan.manifest.fingerprint, len(plan.manifest.tiles)
    return summary


def complete_text(summary: Summary) -> str:
    """The message of a run that finds its cache complete."""
    of_trial = "" if summary.limit is None else " of this trial"
    what = f"{count_text(summary.tiles, summary.noun)}{of_trial}"
    return (
        f"the {what} is in {summary.cache} already"
        if summary.tiles == 1
        else f"all {what} are in {summary.cache} already"
    )


def stopped_text(summary: Summary) -> str:
    """The message of a run that was stopped."""
    kept = summary.kept + summary.computed
    return (
        f"stopped; {kept} of {count_text(summary.tiles, summary.noun)} are finished and kept in {summary.cache}. "
        "Run the same command again to continue"
    )


def failure_report(summary: Summary) -> str:
    """One paragraph that names the unreadable tiles and what to do about them."""
    causes = "; ".join(list(summary.failed.values())[:5])
    return (
        f"{len(summary.failed)} of {count_text(summary.tiles, summary.noun)} could not be computed: {summarise(summary.failed)}. {causes}. "
        "Repair or remove these images and run the same command again; the other tiles are finished"
    )


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
    plan = make_plan(config, lambda recipe, *_: recipe, listed_tiles=tiles)
    return complete_summary(plan, config) if plan.is_done else None
