"""
The recipe: everything that determines the values in a cache except the source images, and nothing else.

A cache is stale if its recipe, an image or a view is no longer what the configuration asks for. This is decided in

- `differences`, here: the fields in which two recipes differ;
- `writer.refuse_stale`: stage one, before it writes;
- `known_images`: whether a tile's image is the one that it was computed from;
- `pipeline/precompute/expected_recipe.py`: the recipe that a configuration asks for, and `refuse_unexpected` for readers;
- `pipeline/training/targets.py`: training, which also refuses tiles and recorded views that have changed;
- `pipeline/runs/checkpoint.py`: `--resume`, by the cache's fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    TypeAdapter,
    ValidationInfo,
    model_validator,
)

from kdpipe.cache.encoding import many_classes, simplex
from kdpipe.cache.encoding.row_deltas import KEY_ROW_PX
from kdpipe.cache.index.records import Sha256, digest_of


class Record(BaseModel):
    """A model that refuses unknown fields; in a manifest of a newer minor version it keeps them, so that digests stay equal."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="after")
    def _refuse_unknown_fields(self, info: ValidationInfo) -> Self:
        if self.model_extra and not (info.context or {}).get("newer"):
            raise ValueError(f"unknown fields {sorted(self.model_extra)}")
        return self


def is_none(value: object) -> bool:
    """Whether a field is left out of the JSON, which is so where it is None."""
    return value is None


class TeacherRecord(Record):
    """A teacher's weights and how it predicts; fields have the names of configuration keys where there is one."""

    # The network: an architecture and its weights; a callable of the user's own, the file that defines it (with the version of its
    # package) and its weights; or whole files. Fields of the other kinds are left out.
    checkpoint_sha256: Annotated[Sha256 | None, Field(exclude_if=is_none)] = None
    architecture: Annotated[str | None, Field(exclude_if=is_none)] = None
    encoder: Annotated[str | None, Field(exclude_if=is_none)] = None
    model: Annotated[str | None, Field(exclude_if=is_none)] = None
    source_sha256: Annotated[Sha256 | None, Field(exclude_if=is_none)] = None
    source_version: Annotated[str | None, Field(exclude_if=is_none)] = None
    files_sha256: Annotated[dict[str, Sha256] | None, Field(exclude_if=is_none)] = None
    # What files of predictions hold, whose content is in each tile's digest; the user's name of a network that was passed in Python.
    predictions: Annotated[Literal["logits", "probabilities", "classes"] | None, Field(exclude_if=is_none)] = None
    given: Annotated[str | None, Field(exclude_if=is_none)] = None
    # What a program of the user's own said of itself (see `writer.own_recipe`).
    made_by: Annotated[dict[str, str] | None, Field(exclude_if=is_none)] = None
    classes: list[str]
    drop_channels: list[int]
    weight: float
    normalize_mean: list[float]
    normalize_std: list[float]
    precision: Literal["fp32", "bf16", "fp16"]
    tta: str
    scales: list[float]
    window: int | None
    # Further arguments of the architecture's constructor. Left out where there are none, so that older digests do not change.
    options: Annotated[dict[str, JsonValue], Field(exclude_if=lambda options: not options)] = {}
    # The bands that it sees; left out where all teachers see the same, which are the recipe's.
    bands: Annotated[list[int] | None, Field(exclude_if=lambda bands: bands is None)] = None
    # Which of a file's weights, where the configuration says it. Left out otherwise, for the same reason.
    weights: Annotated[Literal["raw", "ema"] | None, Field(exclude_if=lambda weights: weights is None)] = None


LEFT_OUT = [name for name, field in TeacherRecord.model_fields.items() if not field.is_required()]


class ViewsRecord(Record):
    """How recorded views are drawn from the tiles; fields have the names of configuration keys."""

    crop: int
    scales: list[float]
    max_class_share: float
    mosaic: float
    photometric: float
    ignore_index: int
    # The bands whose colours are changed, as red, green and blue or as grey; left out where they are the recipe's.
    visible: Annotated[list[int] | None, Field(exclude_if=lambda bands: bands is None)] = None


class _Recipe(Record):
    """What soft targets and logits have in common."""

    teachers: Annotated[list[TeacherRecord], Field(min_length=1)]
    bands: list[int]
    stretch: list[list[float]] | None
    kind: Literal["soft", "logits"]
    bits: int
    chunk_px: int
    # Minor version 0 knows neither of these fields, and its digests must not change: they are left out where they are None.
    views: Annotated[ViewsRecord | None, Field(exclude_if=is_none)] = None
    decoder: Annotated[Literal["pillow"] | None, Field(exclude_if=is_none)] = None

    @property
    def teacher_classes(self) -> list[str]:
        """The classes that the teachers predict, in the order of the class map's rows."""
        first = self.teachers[0]
        return [name for channel, name in enumerate(first.classes) if channel not in first.drop_channels]

    @property
    def format_version(self) -> str:
        """`MAJOR.MINOR` of a cache with this recipe; minor versions 0 and 1 say neither the decoder nor the order of T and map."""
        is_own = any(record.made_by is not None for record in self.teachers)
        minor = 2 if is_own or self.decoder is not None else int(self.views is not None)
        return f"{self.major_version}.{minor}"

    @property
    def has_chunk_digests(self) -> bool:
        """Whether receipts hold digests of chunks; caches of older minor versions go on as they are, for their readers."""
        return self.format_version.endswith(".2")

    @property
    def major_version(self) -> int:
        """The major version of the format."""
        raise NotImplementedError

    @property
    def has_parts(self) -> bool:
        """Whether levels have parts, as 8 bits of many classes have since format 5 (see `many_classes`)."""
        return False

    @property
    def dtype(self) -> np.dtype[Any]:
        """The data type of the stored integers."""
        return np.dtype(np.uint16) if self.has_parts else simplex.storage_type(self.bits)

    def digest(self) -> str:
        """The sha256 of the recipe alone, which every tile carries."""
        return digest_of(self.model_dump())


class Recipe(_Recipe):
    """Everything that determines soft targets; the class map has a row for each class of the first teacher that is kept."""

    classes: Annotated[list[str], Field(min_length=2)]
    class_map: list[list[float]]
    temperature: float
    temperature_applied: Annotated[Literal["after class_map"] | None, Field(exclude_if=is_none)] = None
    kind: Literal["soft"]
    bits: Literal[4, 6, 8, 16]
    levels: int
    key_row_px: int

    @property
    def has_parts(self) -> bool:
        return self.levels != simplex.levels_of(self.bits, len(self.classes))

    @property
    def major_version(self) -> int:
        """The major version of the format."""
        return 5 if self.has_parts else 4

    @property
    def channels(self) -> list[str]:
        """The names of the arrays' axis 0."""
        return self.classes

    @model_validator(mode="after")
    def _refuse_other_levels_and_key_rows(self) -> Self:
        written = many_classes.levels_of(self.bits, len(self.classes))
        if self.levels not in (written, simplex.levels_of(self.bits, len(self.classes))):
            raise ValueError(
                f"{self.bits} bits of {len(self.classes)} classes have {written} levels, not {self.levels}"
            )
        if self.key_row_px != KEY_ROW_PX:
            raise ValueError(f"every {KEY_ROW_PX}th row is a key row, not every {self.key_row_px}th")
        return self


class LogitsRecipe(_Recipe):
    """Everything that determines logits; temperature, class map and student classes are chosen when they are read."""

    kind: Literal["logits"]
    bits: Literal[8, 16]

    @property
    def major_version(self) -> int:
        """The major version of the format."""
        return 2

    @property
    def channels(self) -> list[str]:
        """The names of the arrays' axis 0."""
        return self.teacher_classes


def _kind(fields: Any) -> str | None:
    """The tag of a recipe in `AnyRecipe`; None for anything else."""
    kind = fields.get("kind") if isinstance(fields, Mapping) else getattr(fields, "kind", None)
    return kind if kind in ("soft", "logits") else None


CacheRecipe = Recipe | LogitsRecipe
AnyRecipe = Annotated[
    Annotated[Recipe, Tag("soft")] | Annotated[LogitsRecipe, Tag("logits")],
    Discriminator(_kind),
]
_ANY_RECIPE: TypeAdapter[CacheRecipe] = TypeAdapter(AnyRecipe)


def parse_recipe(fields: Any) -> CacheRecipe:
    """The recipe with these fields, of either kind; `ValidationError` for anything that is not a recipe."""
    return _ANY_RECIPE.validate_python(fields)


def differences(recipe: CacheRecipe, expected: Mapping[str, Any]) -> list[str]:
    """
    One line for each field in which the recipe differs from `expected`, naming the field and both values.

    A field that only a newer kdpipe knows counts as a difference, because it determines the values in some way.
    A teacher's fields are named `teacher.tta`, or `teachers.1.tta` where there are several.
    """
    found, wanted = _flat(recipe.model_dump(), filled=True), _flat(expected)
    known = {*Recipe.model_fields, *TeacherRecord.model_fields, *ViewsRecord.model_fields, "teacher_view"}
    unknown = [
        f"{field}: the cache has {_short(value)}, and this kdpipe does not know that field: install the one that wrote the cache"
        for field, value in found.items()
        if field.rpartition(".")[2] not in known
    ]
    if found["teachers"] != wanted["teachers"]:  # another number of teachers: nothing says which corresponds to which
        found, wanted = ({k: v for k, v in fields.items() if "." not in k} for fields in (found, wanted))
    return unknown + [
        _OLDER[field] if found[field] is None and field in _OLDER
        else f"{field}: the cache has {_short(found[field])}, the configuration says {_short(value)}"
        for field, value in wanted.items()
        if field in found  # a field of the other kind of cache has no counterpart
        and found[field] != value
    ]  # fmt: skip


_OLDER = {
    "decoder": (
        "decoder: an older kdpipe computed the cache from JPEGs that GDAL had decoded, whose colours differ from Pillow's at edges"
    ),
    "temperature_applied": (
        "temperature_applied: an older kdpipe applied the temperature before the class map, which favours student classes that several "
        "teacher classes map to"
    ),
}
"""What a field says where an older recipe lacks it and needs it."""


def _flat(fields: Mapping[str, Any], *, filled: bool = False) -> dict[str, Any]:
    """
    A recipe's fields and, by dotted names beside them, those of its teachers and views.

    `teachers` becomes the number of teachers, and `teacher_view` what they saw. With `filled`, fields of a teacher that a recipe
    leaves out are None.
    """
    teachers = fields["teachers"]
    flat: dict[str, Any] = {"teachers": len(teachers)}
    for i, teacher in enumerate(teachers):
        key = "teacher" if len(teachers) == 1 else f"teachers.{i}"
        left_out: dict[str, Any] = dict.fromkeys(LEFT_OUT) | {"options": {}} if filled else {}
        flat |= {f"{key}.{name}": value for name, value in (left_out | teacher).items()}
    flat["decoder"] = None  # left out of older recipes, as is the next field
    if fields["kind"] == "soft":
        flat["temperature_applied"] = None
    views = fields.get("views")
    flat["teacher_view"] = "tile" if views is None else "crop"
    flat |= {} if views is None else {"views.visible": None}
    flat |= {f"views.{name}": value for name, value in (views or {}).items()}
    return flat | {name: value for name, value in fields.items() if name not in ("teachers", "views")}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."
