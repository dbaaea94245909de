"""
The recipe: everything that determines the values in a cache but the source images, and nothing else.

Not covered: which recipe a configuration asks for (see `pipeline/recipe.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationInfo, model_validator

from kdpipe.cache.encoding.row_deltas import KEY_ROW_PX
from kdpipe.cache.encoding.simplex import levels_of, storage_type, total
from kdpipe.cache.records import Sha256, digest_of


class Record(BaseModel):
    """Closed, except in a manifest of a newer minor version: what that adds is kept, so that digests come out the same."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="after")
    def _refuse_unknown_fields(self, info: ValidationInfo) -> Self:
        if self.model_extra and not (info.context or {}).get("newer"):
            raise ValueError(f"unknown fields {sorted(self.model_extra)}")
        return self


class TeacherRecord(Record):
    """One teacher: its weights, and how it was asked; the names are those of the config's keys where there is one."""

    checkpoint_sha256: Sha256
    architecture: str
    encoder: str
    classes: list[str]
    drop_channels: list[int]
    weight: float
    normalize_mean: list[float]
    normalize_std: list[float]
    precision: Literal["fp32", "bf16", "fp16"]
    tta: str
    scales: list[float]
    window: int | None


class ViewsRecord(Record):
    """How recorded views are drawn of the tiles; the names are those of the config's keys."""

    crop: int
    scales: list[float]
    max_class_share: float
    mosaic: float
    photometric: float
    ignore_index: int


class _Recipe(Record):
    """What determines the values of a tile, given its image, whatever is stored of the teacher's answer."""

    teachers: Annotated[list[TeacherRecord], Field(min_length=1)]
    bands: list[int]
    stretch: list[list[float]] | None
    kind: Literal["soft", "logits"]
    bits: int
    chunk_px: int
    # Left out where the teacher saw whole tiles: minor version 0 does not know it, and its digests must stay what they are.
    views: Annotated[ViewsRecord | None, Field(exclude_if=lambda views: views is None)] = None
    major_version: ClassVar[int]

    @property
    def teacher_classes(self) -> list[str]:
        """What the teachers answer in, in the order of the class map's rows."""
        first = self.teachers[0]
        return [name for channel, name in enumerate(first.classes) if channel not in first.drop_channels]

    @property
    def format_version(self) -> str:
        """Of a cache with this recipe."""
        return f"{self.major_version}.{int(self.views is not None)}"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored integers."""
        return storage_type(self.bits)

    def digest(self) -> str:
        """The sha256 of the recipe alone, which every tile carries."""
        return digest_of(self.model_dump())


class _SoftRecipe(_Recipe):
    """Everything that determines soft targets; class map rows are of the first teacher's kept classes."""

    classes: Annotated[list[str], Field(min_length=2)]
    class_map: list[list[float]]
    temperature: float
    kind: Literal["soft"]

    @property
    def channels(self) -> list[str]:
        """The names of the arrays' axis 0."""
        return self.classes


class ThirdRecipe(_SoftRecipe):
    """Of soft targets as format 3 has them: their integers sum to `levels`, one of them left unsaid (see `rest.py`); only read."""

    bits: Literal[4, 6, 8, 16]
    levels: int
    major_version = 3

    @model_validator(mode="after")
    def _refuse_other_levels(self) -> Self:
        fewest = levels_of(self.bits, len(self.classes))
        if self.levels != fewest:
            raise ValueError(f"{self.bits} bits of {len(self.classes)} classes have {fewest} levels, not {self.levels}")
        return self


class Recipe(ThirdRecipe):
    """Of soft targets as they are written: in differences from row to row, but for key rows (see `key_rows.py`)."""

    key_row_px: int
    major_version = 4

    @model_validator(mode="after")
    def _refuse_other_key_rows(self) -> Self:
        if self.key_row_px != KEY_ROW_PX:
            raise ValueError(f"every {KEY_ROW_PX}th row is a key row, not every {self.key_row_px}th")
        return self


class FirstRecipe(_SoftRecipe):
    """Of soft targets as format 1 has them, all of whose integers are stored; only read."""

    bits: Literal[8, 16]
    major_version = 1

    @property
    def levels(self) -> int:
        """What the integers of a pixel sum to."""
        return total(self.bits)


class LogitsRecipe(_Recipe):
    """Everything that determines logits: temperature, class map and the student's classes come when they are read."""

    kind: Literal["logits"]
    bits: Literal[8, 16]
    major_version = 2

    @property
    def channels(self) -> list[str]:
        """The names of the arrays' axis 0."""
        return self.teacher_classes


def _major_version(fields: Any) -> str | None:
    """Which format's recipe it is: soft targets have `levels` since format 3, and key rows since format 4."""
    if isinstance(fields, _Recipe):
        return str(fields.major_version)
    kind = fields.get("kind") if isinstance(fields, Mapping) else None
    if kind == "soft":
        return "4" if "key_row_px" in fields else "3" if "levels" in fields else "1"
    return "2" if kind == "logits" else None


CacheRecipe = Recipe | ThirdRecipe | FirstRecipe | LogitsRecipe
AnyRecipe = Annotated[
    Annotated[Recipe, Tag("4")]
    | Annotated[ThirdRecipe, Tag("3")]
    | Annotated[FirstRecipe, Tag("1")]
    | Annotated[LogitsRecipe, Tag("2")],
    Discriminator(_major_version),
]
_ANY_RECIPE: TypeAdapter[CacheRecipe] = TypeAdapter(AnyRecipe)


def parse_recipe(fields: Any) -> CacheRecipe:
    """The recipe of its kind; `ValidationError` for what is none."""
    return _ANY_RECIPE.validate_python(fields)


def differences(recipe: CacheRecipe, expected: Mapping[str, Any]) -> list[str]:
    """
    One line for each field of `expected` that the recipe answers otherwise, naming the field and both values.

    So does a field that only a newer kdpipe knows: whatever it is, it determines the values.
    A teacher's fields are named `teacher.tta`, or `teachers.1.tta` where there are several.
    """
    found, wanted = _flat(recipe.model_dump()), _flat(expected)
    known = {*Recipe.model_fields, *TeacherRecord.model_fields, *ViewsRecord.model_fields, "teacher_view"}
    unknown = [
        f"{field}: the cache has {_short(value)}, and this kdpipe does not know that field: install the one that wrote the cache"
        for field, value in found.items()
        if field.rpartition(".")[2] not in known
    ]
    if found["teachers"] != wanted["teachers"]:  # their number: which is which cannot be said
        found, wanted = ({k: v for k, v in fields.items() if "." not in k} for fields in (found, wanted))
    return unknown + [
        f"{field}: the cache has {_short(found[field])}, the configuration says {_short(value)}"
        for field, value in wanted.items()
        if field in found  # those of another kind of cache have nothing to be compared with
        and found[field] != value
    ]


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """
    A recipe's fields with those of its teachers and of its views beside them, under `teachers` the number of these, and under
    `teacher_view` what they saw.
    """
    teachers = fields["teachers"]
    flat: dict[str, Any] = {"teachers": len(teachers)}
    for i, teacher in enumerate(teachers):
        key = "teacher" if len(teachers) == 1 else f"teachers.{i}"
        flat |= {f"{key}.{name}": value for name, value in teacher.items()}
    views = fields.get("views")
    flat["teacher_view"] = "tile" if views is None else "crop"
    flat |= {f"views.{name}": value for name, value in (views or {}).items()}
    return flat | {name: value for name, value in fields.items() if name not in ("teachers", "views")}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."
