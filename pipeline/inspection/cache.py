"""The manifest of a cache, and where it differs from a configuration. No tile is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.cache.documents import read_manifest
from kdpipe.cache.integrity import check_tiles_listed
from kdpipe.cache.manifest import Manifest, dump_manifest
from kdpipe.cache.packing.pack import SUFFIX
from kdpipe.cache.recipe import differences
from kdpipe.cache.storage.base import open_storage
from kdpipe.configs.schema import Config
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.inspection.external import is_external
from kdpipe.pipeline.precompute.expected_recipe import expected_fields
from kdpipe.pipeline.precompute.subjects import subjects
from kdpipe.pipeline.versions import other_libraries


@dataclass(frozen=True)
class CacheInspection:
    """
    A cache's manifest, and its differences from a configuration (None if there is nothing to compare with).

    `other_libraries` holds libraries whose version differed when the cache was computed: then and now.
    """

    url: str
    manifest: Manifest
    differences: list[str] | None
    other_libraries: dict[str, tuple[str, str]]

    @property
    def pixels(self) -> int:
        """Pixels of all tiles."""
        return self.manifest.tiles.pixels

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return self.manifest.tiles.shard_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "url": self.url,
            "pixels": self.pixels,
            "size_bytes": self.size_bytes,
            "differences": self.differences,
            "other_libraries": self.other_libraries,
            "manifest": {
                name: value for name, value in json.loads(dump_manifest(self.manifest)).items() if name != "checksum"
            },
        }


def is_cache(path: str) -> bool:
    """Whether `kdpipe inspect PATH` means a cache: a folder, a pack or a URL, and no other file nor a folder of transformers."""
    return "://" in path or path.endswith(SUFFIX) or (Path(path).is_dir() and not is_external(path))


def inspect_cache(path: str, config: Config | None = None) -> CacheInspection:
    """
    The manifest of the cache at a folder, pack or URL, compared with `config` if one is given.

    Raises `IncompleteCache` where there is no finished cache, `CorruptCache` where its manifest was changed, and `DataError` where the
    configuration's tiles cannot be listed.
    """
    storage = open_storage(path)
    manifest = read_manifest(storage)
    found = None
    if config is not None:
        tiles = list_tiles(config.data, "train")
        stretch = resolve_stretch(config.data, tiles)
        expected = expected_fields(config, stretch, manifest.recipe, tiles)
        asked = {subject.id: subject.source for subject in subjects(config, tiles, stretch)}
        listed = check_tiles_listed(manifest, asked, only_these=config.data.limit is not None)
        found = [*differences(manifest.recipe, expected), *(f"{finding.tile}: {finding.message}" for finding in listed)]
    others = other_libraries(manifest.libraries)
    return CacheInspection(storage.url, manifest, found, others)
