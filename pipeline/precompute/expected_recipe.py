"""The recipe that a configuration expects of its cache, and whether a cache on disk still follows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdpipe.cache.encoding.logits import Softening, is_one_to_one
from kdpipe.cache.encoding.many_classes import levels_of
from kdpipe.cache.encoding.row_deltas import KEY_ROW_PX
from kdpipe.cache.recipe import CacheRecipe, Recipe, differences, parse_recipe
from kdpipe.cache.tile import CHUNK_PX
from kdpipe.configs.errors import StaleCache
from kdpipe.configs.schema import Config, Teacher
from kdpipe.data.rasters import Stretch
from kdpipe.data.tiles import Tile, is_jpeg
from kdpipe.pipeline.models.normalize import mean_std
from kdpipe.pipeline.teacher.sources import source_fields


def expected_fields(
    config: Config,
    stretch: Stretch,
    recorded: CacheRecipe | None,
    tiles: Sequence[Tile],
    *,
    teachers_required: bool = False,
) -> dict[str, Any]:
    """
    The fields of a cache's recipe that the configuration decides; for logits without temperature, class map and student classes.

    A teacher's `precision` is left out where it is `auto` (any recorded one fits), and the digests of its files where they are not on
    this disk (training from the cache does not need them; with `teachers_required` they raise `CheckpointError`). Two fields that the
    `recorded` recipe of an older kdpipe lacks are left out where they change no value: `decoder` if none of `tiles` is a JPEG, and
    `temperature_applied` if T is 1 or the class map is one-to-one.
    """
    mapped = {
        "classes": config.classes.names,
        "class_map": config.class_map_matrix().tolist(),
        "temperature": config.distill.temperature,
        "temperature_applied": "after class_map",
        "levels": _levels(config, recorded),
        "key_row_px": KEY_ROW_PX,
    }
    fields = {
        "teachers": [
            _teacher_fields(key, member, len(config.data.places(member.bands)), teachers_required)
            for key, member in config.members.items()
        ],
        "bands": [config.data.bands[place] for place in config.teachers_places],
        "stretch": [list(stretch[place]) for place in config.teachers_places] if stretch else None,
        **(mapped if config.cache.kind == "soft" else {}),
        "kind": config.cache.kind,
        "bits": config.cache.bits,
        "chunk_px": CHUNK_PX,
        "views": _views_fields(config),
        "decoder": "pillow",
    }
    if recorded is not None and recorded.decoder is None and not any(is_jpeg(tile.image) for tile in tiles):
        del fields["decoder"]
    if config.has_predictions:  # they depend on no band that is read here
        fields |= {"bands": [], "stretch": None}
    differ = len({config.data.places(member.bands) for member in config.members.values()}) > 1
    for teacher, member in zip(fields["teachers"], config.members.values(), strict=True):
        teacher["bands"] = list(config.data.numbers(member.bands)) if differ else None
    commutes = config.distill.temperature == 1 or is_one_to_one(config.class_map_matrix())
    if isinstance(recorded, Recipe) and recorded.temperature_applied is None and commutes:
        fields.pop("temperature_applied", None)
    return fields


def _levels(config: Config, recorded: CacheRecipe | None) -> int:
    """The levels of the configured bits and classes; a recorded cache of as many, also of an older kdpipe, goes on with its own."""
    bits, count = config.cache.bits, len(config.classes.names)
    if isinstance(recorded, Recipe) and (recorded.bits, len(recorded.classes)) == (bits, count):
        return recorded.levels
    return levels_of(bits, count)


def complete_recipe(
    config: Config, stretch: Stretch, recorded: CacheRecipe | None, tiles: Sequence[Tile] = ()
) -> CacheRecipe:
    """
    The recipe to compute by; an `auto` precision is the one that an existing cache recorded, else fp32 (see `precision.resolve`).

    `tiles` are only needed with a `recorded` recipe (see `expected_fields`). Raises `CheckpointError` where a teacher's file is missing.
    """
    fields = expected_fields(config, stretch, recorded, tiles, teachers_required=True)
    before = recorded.teachers if recorded and len(recorded.teachers) == len(fields["teachers"]) else None
    for i, teacher in enumerate(fields["teachers"]):
        teacher.setdefault("precision", before[i].precision if before else "fp32")
    return parse_recipe(fields)


def configured_softening(config: Config) -> Softening | None:
    """The temperature and class map by which a cache of logits is read; None for a cache of soft targets."""
    if config.cache.kind == "soft":
        return None
    return Softening(config.distill.temperature, config.class_map_matrix())


def refuse_unexpected(recipe: CacheRecipe, expected: dict[str, Any], url: str) -> None:
    """Raise `StaleCache` with every field in which a cache's recipe differs from the expected one."""
    changed = differences(recipe, expected)
    if changed:
        raise StaleCache(
            f"{url} was made with another configuration: {'; '.join(changed)}. "
            "Restore the configuration, or run `kdpipe precompute-teacher` into another cache.path"
        )


def _teacher_fields(key: str, teacher: Teacher, num_bands: int, required: bool) -> dict[str, Any]:
    if teacher.architecture is not None and teacher.options:  # only then, because it imports torch and smp
        from kdpipe.pipeline.models.options import check_options

        check_options(teacher.architecture, teacher.options, key=key)
    is_network = teacher.predictions is None
    mean, std = mean_std(teacher.normalize, num_bands) if is_network else ([], [])
    fields: dict[str, Any] = {
        **source_fields(teacher, key, required=required),
        "classes": teacher.classes,
        "drop_channels": sorted(teacher.drop_channels),
        "weight": teacher.weight,
        "normalize_mean": mean,
        "normalize_std": std,
        "tta": teacher.tta,
        "scales": teacher.scales,
        "window": teacher.window,
    }
    if teacher.precision != "auto" or not is_network:
        fields["precision"] = teacher.precision if is_network else "fp32"
    return fields


def _views_fields(config: Config) -> dict[str, Any] | None:
    """
    How recorded views are drawn; None where the teacher sees whole tiles.

    The number of views is left out, as further views are further tiles, and so is the number that an epoch shows.
    """
    if config.distill.teacher_view == "tile":
        return None
    train, data = config.train, config.data
    visible, seen = (
        [data.bands[place] for place in places] for places in (data.visible_places, config.teachers_places)
    )
    return {
        "crop": train.crop,
        "scales": train.scales,
        "max_class_share": train.max_class_share,
        "mosaic": train.mosaic,
        "photometric": train.photometric,
        "ignore_index": config.classes.ignore_index,
        "visible": None if visible == seen or not train.photometric else visible,
    }
