"""The cache of soft targets or logits: a Zarr v3 group that records how its values were made and detects any change."""

from kdpipe.cache.encoding.logits import Softening
from kdpipe.cache.manifest import Manifest
from kdpipe.cache.reader import SoftTargetCache
from kdpipe.cache.recipe import LogitsRecipe, Recipe
from kdpipe.configs.errors import (
    CacheError,
    CacheLocked,
    CacheUnreachable,
    CorruptCache,
    IncompleteCache,
    StaleCache,
    UnknownFormat,
)

__all__ = [
    "CacheError",
    "CacheLocked",
    "CacheUnreachable",
    "CorruptCache",
    "IncompleteCache",
    "LogitsRecipe",
    "Manifest",
    "Recipe",
    "SoftTargetCache",
    "Softening",
    "StaleCache",
    "UnknownFormat",
]
