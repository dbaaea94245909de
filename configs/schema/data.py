"""The sections `classes` and `data`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from kdpipe.configs.errors import count_text
from kdpipe.configs.schema.affixes import Affixes
from kdpipe.configs.schema.bands import COLOURS, Bands, Choice, Names, numbers_of
from kdpipe.configs.schema.labels import Colour
from kdpipe.configs.schema.section import Section, is_none, refuse_repeats

Alpha = Literal["opacity", "band"]


class Classes(Section):
    """The student's classes."""

    names: list[str] = Field(min_length=2)
    """Class names, in the order of the indices in the masks."""
    ignore_index: int = Field(255, ge=0, le=65535)
    """Mask value of pixels without a label. Maps hold it where a scene has no data."""
    not_scored: list[str] = Field([])
    """Classes that are learnt but left out of the mean scores."""

    @model_validator(mode="after")
    def _check(self) -> Classes:
        refuse_repeats(self.names, "classes.names")
        if self.ignore_index < len(self.names):
            raise ValueError(
                f"ignore_index {self.ignore_index} is also the index of class {self.names[self.ignore_index]}"
            )
        unknown = [name for name in self.not_scored if name not in self.names]
        if unknown:
            raise ValueError(f"not_scored names {unknown}, which are not among names: {self.names}")
        if set(self.not_scored) == set(self.names):
            raise ValueError("not_scored names every class, which leaves nothing to score")
        return self


class FixedRange(Section):
    """A linear stretch of `low..high`, in the files' own units, to 0..255."""

    range: tuple[float, float] | list[tuple[float, float]]
    """`[low, high]` for all bands, or a list of such pairs, one for each of `data.bands`."""

    @model_validator(mode="after")
    def _check(self) -> FixedRange:
        for low, high in self.pairs(None):
            if not low < high:
                raise ValueError(f"a range needs low < high, found {low}, {high}")
        return self

    def pairs(self, num_bands: int | None) -> list[tuple[float, float]]:
        """The pairs as configured; a single pair is repeated for each of `num_bands` bands."""
        if isinstance(self.range, list):
            return list(self.range)
        return [self.range] * (num_bands or 1)


class Percentiles(Section):
    """A linear stretch of each band between two of its percentiles over all training and unlabelled images."""

    percentiles: tuple[float, float]
    """Low and high percentile, 0 to 100, such as `[2, 98]`."""

    @model_validator(mode="after")
    def _check(self) -> Percentiles:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles need 0 <= low < high <= 100, found {low}, {high}")
        return self


class Split(Section):
    """Text files that list which tiles of the roots belong to a split, one name per line."""

    train: str | None = None
    """Names of the tiles of `data.train`. Null takes all."""
    val: str | None = None
    """Names of the tiles of `data.val`. Null takes all."""
    unlabelled: str | None = None
    """Names of the tiles of `data.unlabelled`. Null takes all."""


class Data(Section):
    """
    Roots of tiles. A root holds a folder of images and, if labelled, a folder of masks; image and mask share their stem.

    In a root with a `*`, such as `mine/*/train`, the `*` stands for the name of either folder: `mine/images/train`, `mine/masks/train`.
    """

    train: list[str] = Field(min_length=1)
    """Roots of labelled tiles to train on."""
    val: list[str] = Field([])
    """Roots of labelled tiles to validate on, and the default of `evaluate`. May be empty."""
    unlabelled: list[str] = Field([])
    """Roots of tiles that train from their soft targets alone. Masks in them are ignored."""
    images: str = "images"
    """Name of the folder of images in each root."""
    masks: str = "masks"
    """Name of the folder of masks in each root."""
    image_prefix: str = Field("", exclude_if=lambda prefix: not prefix)
    """Beginning of the stems of images, such as `img_`, without which image and mask share their stem. Files without it are left out."""
    mask_prefix: str = Field("", exclude_if=lambda prefix: not prefix)
    """Beginning of the stems of masks, such as `mask_`, likewise."""
    image_suffix: str = Field("", exclude_if=lambda suffix: not suffix)
    """End of the stems of images, such as `_sat`, without which image and mask share their stem. Files without it are left out."""
    mask_suffix: str = Field("", exclude_if=lambda suffix: not suffix)
    """End of the stems of masks, such as `_mask`, likewise."""
    nested: bool = Field(False, exclude_if=lambda nested: not nested)
    """Whether tiles also lie in folders within the folders of images and masks, by the same names in both."""
    split: Split | None = Field(None, exclude_if=lambda split: split is None)
    """Lists of the tiles that each split takes of its roots. Splits with lists may share a root."""
    limit: int | None = Field(None, ge=1, exclude_if=is_none)
    """For a trial: at most this many tiles to train on, and as many to validate on, spread evenly over all; `--limit N` sets it."""
    colours: dict[str, Colour | list[Colour]] = Field({}, exclude_if=lambda colours: not colours)
    """For masks of colours: the red, green and blue of each class, such as `{Forest: [34, 139, 34]}`, or several; `ignore` is no label."""
    remap: dict[int, int | str] = Field({}, exclude_if=lambda remap: not remap)
    """For masks of other codes: the class of each value, by name or index, such as `{41: Forest, 42: Forest, 0: ignore}`."""
    allow_missing_masks: bool = False
    """Whether tiles of `train` and `val` may lack a mask. If false, a missing mask is an error."""
    bands: Bands = (1, 2, 3)
    """Bands to read, by their numbers in the files, counted from 1. A network sees all of them, in this order, or its own `bands`."""
    band_names: Names = Field({}, exclude_if=lambda names: not names)
    """Names for bands of the files, such as `{red: 1, green: 2, blue: 3, nir: 4}`, to choose bands by."""
    visible: Choice | None = Field(None, exclude_if=lambda choice: choice is None)
    """The three bands that pictures show and training recolours; one is grey. Null: those named red, green and blue, or the first."""
    alpha: Alpha = "opacity"
    """What a band that the files call alpha is: `opacity`, where 0 means no data, or an ordinary `band`, such as infrared."""
    stretch: FixedRange | Percentiles | None = None
    """How values become 0..255. Null takes 8-bit images as they are and refuses all others."""

    @model_validator(mode="after")
    def _check(self) -> Data:
        for key in ("train", "val", "unlabelled"):
            refuse_repeats(getattr(self, key), f"data.{key}")
        if min(self.bands) < 1:
            raise ValueError(f"bands are counted from 1, found {list(self.bands)}")
        if self.images == self.masks and self.image_affixes == self.mask_affixes:
            raise ValueError(
                f"images and masks are both {self.images!r}, and nothing tells their files apart: give image_suffix or mask_suffix, or "
                "image_prefix or mask_prefix"
            )
        if self.colours and self.remap:
            raise ValueError("colours are for masks of colours, and remap for masks of numbers: leave one of them out")
        for name in self.band_names:
            if not name or name.isdecimal():
                raise ValueError(f"band_names: {name!r} is no name, as numbers stand for themselves; choose a word")
        refuse_repeats(list(self.band_names.values()), "data.band_names")
        if isinstance(self.stretch, FixedRange) and len(self.stretch.pairs(len(self.bands))) != len(self.bands):
            raise ValueError(
                f"stretch.range needs one pair, or one for each of the {count_text(len(self.bands), 'bands')}, found {self.stretch.range}"
            )
        if self.visible is not None and len(self.visible) not in (1, 3):
            raise ValueError(f"visible needs three bands, or one that is shown as grey, found {self.visible}")
        try:
            self.numbers(self.visible)
        except ValueError as err:
            raise ValueError(f"visible {err}") from err
        return self

    @property
    def image_affixes(self) -> Affixes:
        """What surrounds a tile's name in the stem of its image."""
        return Affixes(self.image_prefix, self.image_suffix)

    @property
    def mask_affixes(self) -> Affixes:
        """What surrounds a tile's name in the stem of its mask."""
        return Affixes(self.mask_prefix, self.mask_suffix)

    def numbers(self, choice: Sequence[int | str] | None) -> tuple[int, ...]:
        """The file's numbers of the bands of a `teacher.bands`, `student.bands` or `visible`, in its order; all of `bands` for None."""
        return numbers_of(choice, self.bands, self.band_names)

    def places(self, choice: Sequence[int | str] | None) -> tuple[int, ...]:
        """Where the bands of `numbers(choice)` lie in an image that was read, counted from 0."""
        if choice is None:  # one band may be read several times
            return tuple(range(len(self.bands)))
        return tuple(self.bands.index(number) for number in self.numbers(choice))

    @property
    def visible_places(self) -> tuple[int, ...]:
        """Where the three visible bands lie in an image that was read, as red, green and blue, or the one that is shown as grey."""
        if self.visible is not None:
            return self.places(self.visible)
        if all(self.band_names.get(colour) in self.bands for colour in COLOURS):
            return self.places(COLOURS)
        return (0, 1, 2) if len(self.bands) >= 3 else (0,)
