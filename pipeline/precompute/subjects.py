"""The subjects of stage one: the images that the teacher predicts, which are whole tiles or recorded views of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache.images import Source, digest_crop, digest_image, digest_pixels
from kdpipe.cache.index.records import ImageDigest
from kdpipe.configs.errors import DataError
from kdpipe.configs.schema import Config
from kdpipe.data.augment import views_per_sample
from kdpipe.data.dataset import read_labels
from kdpipe.data.rasters import Rows, Stretch, image_size, open_rows, read_data, read_image
from kdpipe.data.recorded_views import RecordedView, RecordedViews, tiles_of_mosaics
from kdpipe.data.tiles import Tile
from kdpipe.pipeline.teacher.predictions.files import PredictionFiles
from kdpipe.pipeline.teacher.predictions.prediction import Prediction

_FileState = tuple[int, int, int]
"""Inode, size and time of the last change of a file; a file that is written to gets another one."""


Seen = NDArray[np.uint8] | NDArray[np.float32]
"""What a teacher is given of a subject: pixels, uint8 `(H, W, B)`; or logits that were predicted before, float32 `(H, W, C)`."""


class Subject(Protocol):
    """An image that the teacher predicts; the cache holds its soft target under `id`."""

    @property
    def id(self) -> str:
        """The name in the cache."""
        ...

    @property
    def source(self) -> Source:
        """What the cache compares with its record to see whether the image has changed."""
        ...

    @property
    def files(self) -> list[Path]:
        """The files that decide its pixels, the image of its own tile first."""
        ...

    @property
    def mask(self) -> Path | None:
        """The label file of its tile, if any."""
        ...

    def size(self) -> tuple[int, int]:
        """`(H, W)` in px, without reading pixels; raises `DataError` for an unreadable header."""
        ...

    def image(self) -> NDArray[np.uint8]:
        """The pixels, uint8 `(H, W, B)`; raises `DataError` for an unreadable image."""
        ...

    def seen(self, image_HWB: NDArray[np.uint8]) -> Seen:
        """What the teacher is given: its pixels, which are `image_HWB`, or their stored prediction."""
        ...

    def load(self) -> tuple[Seen, ImageDigest]:
        """What the teacher is given, and the digest of what that was made from; raises `DataError` if that changed meanwhile."""
        ...

    def labels(self) -> NDArray[np.integer[Any]]:
        """Class indices, `(H, W)`, `ignore_index` without a label or without data, for a subject with a mask."""
        ...


def subjects(config: Config, tiles: Sequence[Tile], stretch: Stretch) -> list[Subject]:
    """The subjects of a configuration, in the order of the cache."""
    if config.distill.teacher_view == "tile":
        return list(whole_tiles(config, tiles, stretch))
    states: dict[Path, _FileState] = {}
    views = RecordedViews(tiles, config, stretch, among=tiles_of_mosaics(config)).all_views()
    return [ViewOfTile(view, view.id, config.train.crop, states, config.teachers_places) for view in views]


def whole_tiles(config: Config, tiles: Sequence[Tile], stretch: Stretch) -> list[WholeTile]:
    """The tiles as subjects; with `teacher.predictions` each with its prediction, which need not be there (see `require_predictions`)."""
    if not config.has_predictions:
        return [WholeTile(tile, config, stretch) for tile in tiles]
    predictions = PredictionFiles(config).of(tiles)
    return [PredictedTile(tile, config, stretch, found) for tile, found in zip(tiles, predictions, strict=True)]


def require_predictions(config: Config, wanted: Sequence[Subject]) -> None:
    """Raise `DataError` where `teacher.predictions` lack one of the `wanted` subjects; does nothing for networks."""
    if config.has_predictions:
        stored = ((subject.id, subject.prediction) for subject in wanted if isinstance(subject, PredictedTile))
        PredictionFiles(config).require(stored)


def predicted_tiles(config: Config, stretch: Stretch) -> Callable[[Tile], PredictedTile]:
    """A function that gives tiles their predictions one by one, for a configuration with `teacher.predictions`."""
    files = PredictionFiles(config)
    return lambda tile: PredictedTile(tile, config, stretch, next(files.of([tile])))


def subject_noun(config: Config) -> str:
    """The plural noun for subjects in messages: `tiles` or `views`."""
    return "tiles" if config.distill.teacher_view == "tile" else "views"


def predictions_per_sample(config: Config) -> float:
    """Predictions of a live teacher for a training sample: one for the tile of each of its views, on average, or one for the crop."""
    return views_per_sample(config.train) if config.distill.teacher_view == "tile" else 1


@dataclass(frozen=True, slots=True)
class WholeTile:
    """A tile as it is on disk."""

    tile: Tile
    config: Config
    stretch: Stretch

    @property
    def id(self) -> str:
        return self.tile.id

    @property
    def source(self) -> Source:
        return self.tile.image

    @property
    def files(self) -> list[Path]:
        return [self.tile.image]

    @property
    def mask(self) -> Path | None:
        return self.tile.mask

    def size(self) -> tuple[int, int]:
        return image_size(self.tile.image)

    def image(self) -> NDArray[np.uint8]:
        return read_image(self.tile.image, self.config.data.bands, self.stretch, self.config.data.alpha)

    def seen(self, image_HWB: NDArray[np.uint8]) -> Seen:
        return image_HWB

    def load(self) -> tuple[Seen, ImageDigest]:
        before = _file_state(self.tile.image)
        image_HWB = self.image()
        digest = digest_image(self.tile.image)
        _refuse_changed(self.tile.image, before)
        return image_HWB, digest

    @contextmanager
    def open_rows(self) -> Iterator[tuple[Rows, ImageDigest]]:
        """A reader of the image's rows, and the digest of its file; raises `DataError` if the file changes within the context."""
        before = _file_state(self.tile.image)
        with open_rows(self.tile.image, self.config.data.bands, self.stretch, self.config.data.alpha) as rows:
            yield rows, digest_image(self.tile.image)
        _refuse_changed(self.tile.image, before)

    def labels(self) -> NDArray[np.integer[Any]]:
        """The mask's labels, as `read_labels` returns them."""
        data_HW = read_data(self.tile.image, self.config.data.bands, self.config.data.alpha)
        return read_labels(self.tile, self.config, self.size(), data_HW)


@dataclass(frozen=True, slots=True)
class PredictedTile(WholeTile):
    """A tile whose prediction another program stored; pixels without a prediction count as unlabelled."""

    prediction: Prediction

    @property
    def source(self) -> Source:
        return self.prediction

    @property
    def files(self) -> list[Path]:
        return self.prediction.files

    def seen(self, image_HWB: NDArray[np.uint8]) -> Seen:
        return self.prediction.logits(self.prediction.read())

    def load(self) -> tuple[Seen, ImageDigest]:
        before = {file: _file_state(file) for file in self.files}
        stored = self.prediction.read()
        logits_HWC, digest = self.prediction.logits(stored), self.prediction.digest_of(stored)
        for file, state in before.items():
            _refuse_changed(file, state)
        return logits_HWC, digest

    def labels(self) -> NDArray[np.integer[Any]]:
        labels_HW = WholeTile.labels(self)  # `super()` knows no class that slots have made anew
        labels_HW[~self.prediction.read().known_HW] = self.config.classes.ignore_index
        return labels_HW


@dataclass(frozen=True, slots=True)
class ViewOfTile:
    """A recorded view; all views share `states`, the files' states when they were first read."""

    view: RecordedView
    id: str
    crop: int
    states: dict[Path, _FileState] = field(repr=False, compare=False)
    teachers_places: tuple[int, ...]

    @property
    def source(self) -> SeenByTeachers:
        return SeenByTeachers(self.view, self.teachers_places)

    @property
    def files(self) -> list[Path]:
        """The files that decide its pixels, the image of its own tile first."""
        return self.view.files

    @property
    def stretch(self) -> Stretch:
        return self.view.views.stretch

    @property
    def mask(self) -> Path | None:
        return self.view.mask

    def size(self) -> tuple[int, int]:
        return self.crop, self.crop

    def image(self) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self.view.pixels().transpose(1, 2, 0))

    def seen(self, image_HWB: NDArray[np.uint8]) -> Seen:
        return image_HWB

    def load(self) -> tuple[Seen, ImageDigest]:
        """The view, and the digest of its pixels and of the sizes of its files."""
        # Decoded tiles are kept: a file that changed since the first view would not be read again.
        before = {file: self.states.setdefault(file, _file_state(file)) for file in self.view.files}
        pixels_BHW = self.view.pixels()
        digest = digest_crop(self.view.files, seen_by_teachers(pixels_BHW, self.teachers_places))
        for file, state in before.items():
            _refuse_changed(file, state)
        return np.ascontiguousarray(pixels_BHW.transpose(1, 2, 0)), digest

    def labels(self) -> NDArray[np.integer[Any]]:
        return self.view.labels()


@dataclass(frozen=True, slots=True)
class SeenByTeachers:
    """A recorded view with the bands alone that determine its soft target."""

    view: RecordedView
    places: tuple[int, ...]

    @property
    def files(self) -> list[Path]:
        """The files that decide its pixels, the image of its own tile first."""
        return self.view.files

    def pixels(self) -> NDArray[np.uint8]:
        """The bands, uint8 `(B, H, W)`."""
        return seen_by_teachers(self.view.pixels(), self.places)

    def has(self, digest: ImageDigest) -> bool:
        """Whether the bands are those of this digest."""
        return digest_pixels(self.pixels()) == digest.sha256

    def __str__(self) -> str:
        return str(self.view)


def seen_by_teachers(image_BHW: NDArray[np.uint8], places: tuple[int, ...]) -> NDArray[np.uint8]:
    """The bands of an image at `places`, which are the `teachers_places` of a configuration; the image itself if these are all."""
    return image_BHW if places == tuple(range(len(image_BHW))) else image_BHW[list(places)]


@dataclass(frozen=True, slots=True)
class ViewReference:
    """View `number` of the tile at index `tile`, for another process, which has the list of tiles."""

    id: str
    tile: int
    number: int


@dataclass(frozen=True, slots=True)
class PredictedReference:
    """A tile and its stored prediction, found by this process, for another one."""

    tile: Tile
    prediction: Prediction

    @property
    def id(self) -> str:
        """The tile's id."""
        return self.tile.id


Reference = Tile | PredictedReference | ViewReference
"""A subject as it is sent to another process; each has an `id`."""


def reference_to(subject: Subject) -> Reference:
    """The reference from which `RemoteSubjects` makes the subject again; paths are absolute."""
    if isinstance(subject, ViewOfTile):
        return ViewReference(subject.id, subject.view.tile, subject.view.number)
    assert isinstance(subject, WholeTile)
    tile = absolute_tile(subject.tile)
    return PredictedReference(tile, subject.prediction.of(tile)) if isinstance(subject, PredictedTile) else tile


class RemoteSubjects:
    """
    The subjects of a run, made from their references in another process; views share the decoded tiles there too.

    `tiles` are all tiles of the run, which decide what a mosaic shows; None where the teacher sees whole tiles.
    """

    def __init__(self, config: Config, stretch: Stretch, tiles: Sequence[Tile] | None) -> None:
        self._config, self._stretch = config, stretch
        self._views = RecordedViews(tiles, config, stretch) if tiles is not None else None
        self._states: dict[Path, _FileState] = {}

    def subject(self, reference: Reference) -> Subject:
        """The subject whose `reference_to` was sent."""
        if isinstance(reference, Tile):
            return WholeTile(reference, self._config, self._stretch)
        if isinstance(reference, PredictedReference):
            return PredictedTile(reference.tile, self._config, self._stretch, reference.prediction)
        assert self._views is not None
        view = RecordedView(self._views, reference.tile, reference.number)
        return ViewOfTile(view, reference.id, self._config.train.crop, self._states, self._config.teachers_places)


def absolute_tile(tile: Tile) -> Tile:
    """The tile with absolute paths, for a process in another folder."""
    return replace(tile, image=tile.image.absolute(), mask=tile.mask and tile.mask.absolute())


def _file_state(file: Path) -> _FileState:
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _refuse_changed(file: Path, before: _FileState) -> None:
    if _file_state(file) != before:
        raise DataError(f"{file} changed while it was read")
