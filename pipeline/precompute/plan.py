"""
What stage one has to do, and what it did: the tiles of a configuration, those that its cache holds, and the sums at the end.

Knows no torch, whose import takes longer than to see that nothing is to do.
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
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import Tile, list_tiles
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.subjects import Stretch, Subject, subject_noun, subjects

Resolved = Callable[[CacheRecipe, list[Tile], Stretch], CacheRecipe]
"""The recipe of a new cache with `auto` precisions decided."""


@dataclass
class Summary:
    """
    What a run of stage one did; sizes in bytes, time in seconds, tiles by id.

    `teacher_seconds` are those in which the teacher answered; `online_seconds` and `crops_seconds` what a live one would take of
    an epoch: asked as `train-student --kd online` does, and about the crops alone. `workers` says how many tiles each of several
    processes stored, by its address.
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
        """Epochs after which a live teacher, asked in the cheaper way, has taken as long; None where nothing was computed."""
        cheaper = min(self.online_seconds, self.crops_seconds)
        return self.seconds * self.tiles / self.computed / cheaper if self.computed and cheaper else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "paid_after_epochs": self.paid_after_epochs}


@dataclass(frozen=True)
class Plan:
    """
    What is to do: all tiles (or recorded views, which are kept and computed as tiles are), those finished already, the manifest
    if there is one, and how the rest is computed.
    """

    tiles: list[Subject]
    finished: dict[str, TileRecord]
    manifest: Manifest | None
    recipe: CacheRecipe
    storage: Storage
    samples: int  # of an epoch of training

    @property
    def missing(self) -> list[Subject]:
        """The tiles to compute."""
        return [tile for tile in self.tiles if tile.id not in self.finished]

    @property
    def is_done(self) -> bool:
        """Whether the cache is complete with just these tiles, in this order, and its manifest is of them."""
        return (
            self.manifest is not None
            and not self.missing
            and self.manifest.recipe == self.recipe
            and self.manifest.tiles == [self.finished[tile.id] for tile in self.tiles]
        )


def make_plan(config: Config, resolved: Resolved) -> Plan:
    """
    The tiles of the configuration, and which of them the cache holds already; `resolved` is asked where there is no cache yet.

    Raises `DataError` for what is wrong with the folders, `CheckpointError` for a missing teacher, `StaleCache` for a cache
    made otherwise, `CorruptCache` for a folder that is no cache.
    """
    tiles = list_tiles(config.data, "train")
    stretch = resolve_stretch(config.data, tiles)
    asked = subjects(config, tiles, stretch)
    storage = open_storage(config.cache.path)
    recorded = read_recipe(storage)
    recipe = complete_recipe(config, stretch, recorded)
    if recorded is None:
        recipe = resolved(recipe, tiles, stretch)
    manifest = whole_manifest(storage)
    finished = finished_tiles(storage, recipe, {tile.id: tile.source for tile in asked}, manifest)
    samples = len(TrainTiles(tiles, config))
    return Plan(tiles=asked, finished=finished, manifest=manifest, recipe=recipe, storage=storage, samples=samples)


def begun(plan: Plan, config: Config) -> Summary:
    """Of a run that has computed nothing yet."""
    return Summary(
        cache=plan.storage.url,
        tiles=len(plan.tiles),
        kept=len(plan.finished),
        noun=subject_noun(config),
    )


def nothing_to_do(plan: Plan, config: Config) -> Summary:
    """Of a run that finds its cache complete; what killed runs left of files is cleared away."""
    assert plan.is_done and plan.manifest is not None
    if partial_files(plan.storage):
        with writer_lock(plan.storage):
            sweep(plan.storage)
    summary = begun(plan, config)
    summary.fingerprint = plan.manifest.fingerprint
    return summary


def already_text(summary: Summary) -> str:
    """What is said of a run that finds its cache complete."""
    return f"all {summary.tiles} {summary.noun} are in {summary.cache} already"


def finished_already(config: Config) -> Summary | None:
    """
    The sums where the cache is complete, so that nothing need be loaded to compute; None where it is not, or may not be.

    Raises what `make_plan` raises.
    """
    storage = open_storage(config.cache.path)
    manifest = whole_manifest(storage)
    tiles = list_tiles(config.data, "train")
    # Where tiles are new, a plan is made all the same, and would be made twice.
    if manifest is None or read_recipe(storage) is None or len(manifest.tiles) < len(tiles):
        return None
    plan = make_plan(config, lambda recipe, *_: recipe)
    return nothing_to_do(plan, config) if plan.is_done else None
