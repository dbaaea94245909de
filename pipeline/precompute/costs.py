"""
The cost of stage one so far, in a file beside a local cache, so that a training run can report what the cache saved.

The file is not part of the cache, whose bytes do not depend on how long they took. Only reports read it.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from kdpipe.cache.storage.beside import beside, open_beside
from kdpipe.configs.errors import KdpipeError
from kdpipe.configs.files import open_file
from kdpipe.configs.schema import Config
from kdpipe.configs.urls import is_url, local_folder
from kdpipe.pipeline.precompute.plan import Summary

SUFFIX = ".costs.json"


class StageOneCosts(BaseModel):
    """Sums over all runs that stored tiles of one recipe: seconds, those of the teacher, tiles (or views), pixels and bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe_sha256: str
    seconds: PositiveFloat
    teacher_seconds: PositiveFloat
    tiles: PositiveInt
    pixels: PositiveInt
    bytes: PositiveInt


def costs_file(cache_path: str) -> Path | None:
    """The file of a cache's costs; None for a remote cache."""
    return None if is_url(cache_path) else beside(local_folder(cache_path), SUFFIX)


def read_costs(cache_path: str, recipe_sha256: str) -> StageOneCosts | None:
    """The recorded costs of a cache of this recipe; None if there are none, or they cannot be read."""
    file = costs_file(cache_path)
    if file is None:
        return None
    with suppress(OSError, ValidationError), open_file(file) as opened:
        found = StageOneCosts.model_validate_json(opened.read())
        return found if found.recipe_sha256 == recipe_sha256 else None
    return None


def record_costs(cache_path: str, recipe_sha256: str, summary: Summary) -> None:
    """
    Add a run to the recorded costs; a run that stored nothing changes nothing, and a failing write is ignored.

    A file of that name that is not kdpipe's stays as it is.
    """
    file = costs_file(cache_path)
    if file is None or not summary.computed or not summary.teacher_seconds:
        return
    before = read_costs(cache_path, recipe_sha256) if summary.kept else None  # else of a cache that was deleted since
    total = StageOneCosts(
        recipe_sha256=recipe_sha256,
        seconds=summary.seconds + (before.seconds if before else 0),
        teacher_seconds=summary.teacher_seconds + (before.teacher_seconds if before else 0),
        tiles=summary.computed + (before.tiles if before else 0),
        pixels=summary.pixels + (before.pixels if before else 0),
        bytes=summary.bytes_written + (before.bytes if before else 0),
    )
    with suppress(OSError, KdpipeError):
        opened = open_beside(file, _is_a_record, create=True)
        assert opened is not None
        with opened:
            opened.truncate(0)
            opened.write(total.model_dump_json() + "\n")


def _is_a_record(text: str) -> bool:
    """Whether a file's text is a record of costs, or one that was cut short."""
    return text.startswith('{"recipe_sha256":')


def teacher_seconds(config: Config, total: float, tiles: int, pixels: int) -> tuple[float, float]:
    """
    Seconds of a live teacher for a tile of mean size and for a crop, from its `total` for so many tiles (or views) and pixels.

    Where the teacher sees recorded crops, both are those of a crop.
    """
    tile = total / tiles
    return tile, tile if config.distill.teacher_view == "crop" else total / pixels * config.train.crop**2
