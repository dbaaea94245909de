"""Where stage two's soft targets come from: the cache, the live teacher, or nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kdpipe.cache.integrity import check_quick
from kdpipe.cache.manifest import summarise
from kdpipe.cache.reader import SoftTargetCache, read_manifest
from kdpipe.cache.storage import open_storage
from kdpipe.configs.errors import CorruptCache, IncompleteCache, StaleCache
from kdpipe.configs.schema import Config
from kdpipe.data.dataset import TargetSource
from kdpipe.data.tiles import Tile
from kdpipe.pipeline import precision
from kdpipe.pipeline.loaders import OnlineTargets
from kdpipe.pipeline.models.teacher import open_teacher
from kdpipe.pipeline.recipe import (
    complete_recipe,
    configured_softening,
    expected_fields,
    library_note,
    refuse_unexpected,
)

Stretch = Sequence[tuple[float, float]] | None


@dataclass(frozen=True)
class Targets:
    """
    A source of soft targets (None without distillation), and of the cache behind it, if one is, the fingerprint and a line on
    libraries that have another version now.
    """

    source: TargetSource | None
    fingerprint: str | None = None
    note: str | None = None


def open_targets(config: Config, tiles: Sequence[Tile], stretch: Stretch, device: torch.device) -> Targets:
    """
    The soft targets that `distill.mode` asks for.

    `cached` needs no teacher, neither in memory nor on disk; where its file is there, its digest is compared. Raises
    `IncompleteCache`, `StaleCache` or `CorruptCache` where the cache does not hold what the configuration describes.
    """
    if config.distill.mode == "none":
        return Targets(None)
    if config.distill.mode == "online":
        recipe = precision.resolved(config, complete_recipe(config, stretch, None), tiles, stretch, device)
        teacher = open_teacher(config, recipe, device)
        return Targets(OnlineTargets(teacher, tiles, config, stretch))
    cache = open_fresh_cache(config, tiles, stretch)
    return Targets(cache, cache.manifest.fingerprint, library_note(cache.manifest.libraries))


def open_fresh_cache(config: Config, tiles: Sequence[Tile], stretch: Stretch) -> SoftTargetCache:
    """The cache of a configuration, refused where it is unfinished, made otherwise, or lacks a tile as it is now."""
    storage = open_storage(config.cache.path)
    manifest = read_manifest(storage)
    refuse_unexpected(manifest.recipe, expected_fields(config, stretch), storage.url)
    findings = check_quick(storage, manifest, {tile.id: tile.image for tile in tiles})
    edited = [finding.message for finding in findings if finding.code == "damaged-manifest"]
    if edited:
        raise CorruptCache(
            f"{storage.url}: {edited[0]}; restore it, or delete it and run `kdpipe precompute-teacher` again: finished tiles are kept"
        )
    advice = "run `kdpipe precompute-teacher` again: it computes just these"
    for code, error in (("missing-tile", IncompleteCache), ("stale-tile", StaleCache), ("damaged-tile", CorruptCache)):
        found = [finding for finding in findings if finding.code == code]
        if found:
            names = summarise(finding.tile or "" for finding in found)
            raise error(
                f"{storage.url}: {len(found)} {code.replace('-', ' ')}s: {names} ({found[0].message}); {advice}"
            )
    return SoftTargetCache(storage, manifest, configured_softening(config))
