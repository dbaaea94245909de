"""What a cache holds the teacher's answers to: every whole tile, or every recorded view of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache.images import Source, digest_crop, digest_image
from kdpipe.cache.records import ImageDigest
from kdpipe.configs.errors import DataError
from kdpipe.configs.schema import Config
from kdpipe.data.augment import views_per_sample
from kdpipe.data.rasters import Rows, image_size, open_rows, read_image, read_mask
from kdpipe.data.recorded_views import RecordedView, RecordedViews
from kdpipe.data.tiles import Tile

Stretch = Sequence[tuple[float, float]] | None


class Subject(Protocol):
    """An image that the teacher answers; the answer lies under `id` in the cache."""

    @property
    def id(self) -> str:
        """Its name in the cache."""
        ...

    @property
    def source(self) -> Source:
        """What the cache compares with its records to see whether the image has changed."""
        ...

    @property
    def mask(self) -> Path | None:
        """The file of its tile's labels, None if it has none."""
        ...

    def size(self) -> tuple[int, int]:
        """`(H, W)` in px, without reading pixels; `DataError` where it cannot be known."""
        ...

    def image(self) -> NDArray[np.uint8]:
        """The pixels, uint8 `(H, W, 3)`; `DataError` where they cannot be had."""
        ...

    def load(self) -> tuple[NDArray[np.uint8], ImageDigest]:
        """The pixels as `image` gives them, and the digest of what they were made from; `DataError` if that changed meanwhile."""
        ...

    def labels(self) -> NDArray[np.integer[Any]]:
        """Class indices or `ignore_index` `(H, W)`, of a subject with a mask."""
        ...


def subjects(config: Config, tiles: Sequence[Tile], stretch: Stretch) -> list[Subject]:
    """What the teacher is asked about, in the order of the cache."""
    if config.distill.teacher_view == "tile":
        return [WholeTile(tile, config, stretch) for tile in tiles]
    states: dict[Path, _State] = {}
    views = RecordedViews(tiles, config, stretch).all_views()
    return [ViewOfTile(view, view.id, config.train.crop, states) for view in views]


def subject_noun(config: Config) -> str:
    """What subjects are called: tiles, or views."""
    return "tiles" if config.distill.teacher_view == "tile" else "views"


def predictions_per_sample(config: Config) -> float:
    """How often a live teacher is asked about a sample: about the tile of each of its views, a mean, or once about the crop."""
    return views_per_sample(config.train) if config.distill.teacher_view == "tile" else 1


@dataclass(frozen=True, slots=True)
class WholeTile:
    """A tile as it is on disk."""

    tile: Tile
    config: Config
    stretch: Stretch

    @property
    def id(self) -> str:
        """The tile's."""
        return self.tile.id

    @property
    def source(self) -> Path:
        """The image's file."""
        return self.tile.image

    @property
    def files(self) -> list[Path]:
        """The image's file, of which it is made."""
        return [self.tile.image]

    @property
    def mask(self) -> Path | None:
        """The file of labels."""
        return self.tile.mask

    def size(self) -> tuple[int, int]:
        """From the file's header."""
        return image_size(self.tile.image)

    def image(self) -> NDArray[np.uint8]:
        """With the configured bands and stretch."""
        return read_image(self.tile.image, self.config.data.bands, self.stretch)

    def load(self) -> tuple[NDArray[np.uint8], ImageDigest]:
        """The digest is of the image's file."""
        before = _state(self.tile.image)
        image_HW3 = self.image()
        digest = digest_image(self.tile.image)
        _refuse_changed(self.tile.image, before)
        return image_HW3, digest

    @contextmanager
    def open_rows(self) -> Iterator[tuple[Rows, ImageDigest]]:
        """The image to be read row by row, and the digest of its file; `DataError` if that changed until the block ends."""
        before = _state(self.tile.image)
        with open_rows(self.tile.image, self.config.data.bands, self.stretch) as rows:
            yield rows, digest_image(self.tile.image)
        _refuse_changed(self.tile.image, before)

    def labels(self) -> NDArray[np.integer[Any]]:
        """As the mask's file has them; `DataError` where it is not of the image's size."""
        tile, classes = self.tile, self.config.classes
        assert tile.mask is not None
        labels_HW = read_mask(tile.mask, len(classes.names), classes.ignore_index)
        (height, width), (of_image_h, of_image_w) = labels_HW.shape, self.size()
        if (height, width) != (of_image_h, of_image_w):
            raise DataError(
                f"the mask {tile.mask} is {height} x {width} px, and its image {tile.image} {of_image_h} x {of_image_w}"
            )
        return labels_HW


_State = tuple[int, int, int]
"""Inode, size and time of the last change of a file: another one, and it was written to."""


@dataclass(frozen=True, slots=True)
class ViewOfTile:
    """A recorded view; `states` holds, for all views together, the files' states when they were first read."""

    view: RecordedView
    id: str
    crop: int
    states: dict[Path, _State] = field(repr=False, compare=False)

    @property
    def source(self) -> RecordedView:
        """The view, which can be made again."""
        return self.view

    @property
    def files(self) -> list[Path]:
        """The files that decide what it shows, the image of its own tile first."""
        return self.view.files

    @property
    def stretch(self) -> Stretch:
        """Of its tiles' images."""
        return self.view.views.stretch

    @property
    def mask(self) -> Path | None:
        """The file of labels of the view's own tile."""
        return self.view.mask

    def size(self) -> tuple[int, int]:
        """That of every crop."""
        return self.crop, self.crop

    def image(self) -> NDArray[np.uint8]:
        """The view, made anew."""
        return np.ascontiguousarray(self.view.pixels().transpose(1, 2, 0))

    def load(self) -> tuple[NDArray[np.uint8], ImageDigest]:
        """The digest is of the view's pixels, and of the sizes of the files that they were made of."""
        # Decoded tiles are kept and used again: a file that changed since the first view would not be read again.
        before = {file: self.states.setdefault(file, _state(file)) for file in self.view.files}
        pixels_3HW = self.view.pixels()
        digest = digest_crop(self.view, pixels_3HW)
        for file, state in before.items():
            _refuse_changed(file, state)
        return np.ascontiguousarray(pixels_3HW.transpose(1, 2, 0)), digest

    def labels(self) -> NDArray[np.integer[Any]]:
        """Those of the view, `ignore_index` over padding."""
        return self.view.labels()


@dataclass(frozen=True, slots=True)
class ViewSent:
    """View `number` of tile number `tile`, as it goes to another process, which has the list of tiles."""

    id: str
    tile: int
    number: int


Sent = Tile | ViewSent
"""What goes to another process for a subject: each has an `id`."""


def sent(subject: Subject) -> Sent:
    """What `Elsewhere` makes the subject from again; paths are absolute."""
    if isinstance(subject, ViewOfTile):
        return ViewSent(subject.id, subject.view.tile, subject.view.number)
    assert isinstance(subject, WholeTile)
    return absolute_tile(subject.tile)


class Elsewhere:
    """
    The subjects of a run in another process: those of views share the tiles that are decoded, as in the first one.

    `tiles` are all of the run, which decide what a mosaic shows; None where the teacher sees whole tiles.
    """

    def __init__(self, config: Config, stretch: Stretch, tiles: Sequence[Tile] | None) -> None:
        self._config, self._stretch = config, stretch
        self._views = RecordedViews(tiles, config, stretch) if tiles is not None else None
        self._states: dict[Path, _State] = {}

    def subject(self, found: Sent) -> Subject:
        """The subject that `sent` was called with in the first process."""
        if isinstance(found, Tile):
            return WholeTile(found, self._config, self._stretch)
        assert self._views is not None
        view = RecordedView(self._views, found.tile, found.number)
        return ViewOfTile(view, found.id, self._config.train.crop, self._states)


def absolute_tile(tile: Tile) -> Tile:
    """A tile as a process in another folder finds it."""
    return replace(tile, image=tile.image.absolute(), mask=tile.mask and tile.mask.absolute())


def _state(file: Path) -> _State:
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _refuse_changed(file: Path, before: _State) -> None:
    if _state(file) != before:
        raise DataError(f"{file} changed while it was read")
