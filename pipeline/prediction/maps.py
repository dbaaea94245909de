"""
Maps of scenes of any size, from overlapping windows whose logits are blended.

Memory does not grow with the height of a scene: a strip of one row of windows is held, a byte per pixel and band, and its logits, 4 bytes
per pixel and class. Classes are the argmax of the blended logits, probabilities their softmax. A network that answers with classes has
no logits to blend: each pixel takes the class of one window, and two neighbours part in the middle of what they share.

Shapes: N windows, C classes, B bands, H W pixels of a scene, h w of a strip or a window.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.configs.errors import ConfigError, DataError, Interrupted, KdpipeError, count_text
from kdpipe.configs.outputs import output_path
from kdpipe.data.maps import NO_PROBABILITY, Layer, RowWriter, as_bytes, class_layer, new_map, probability_layer
from kdpipe.data.scenes import Scene, list_scenes, open_scene
from kdpipe.data.tiles import limited
from kdpipe.pipeline.memory import fits_in_memory, sized
from kdpipe.pipeline.models.windows import Span, blended_rows
from kdpipe.pipeline.prediction.cutting import (
    advice_on_memory,
    is_blended,
    require_memory,
    sizes_of_windows,
    windows_over,
)
from kdpipe.pipeline.prediction.notes import range_note, say_notes
from kdpipe.pipeline.progress import Advance, Progress, Silent

if TYPE_CHECKING:
    from kdpipe.pipeline.prediction.model import Card, Predictor

GPU_BATCH = 4  # windows of 1024 px fill a GPU; a CPU gains nothing from more than one
ROWS_AT_ONCE = 64  # rows of a strip whose classes and probabilities are computed together

CLASSES, CONFIDENCE, PROBABILITIES = "classes", "confidence", "probabilities"
SUFFIXES = {CLASSES: ".tif", CONFIDENCE: ".confidence.tif", PROBABILITIES: ".probabilities.tif"}


@dataclass
class Map:
    """
    A written map: its scene, its files by kind, and the number of pixels of each class and without data.

    `notes` tell in what the scene is unlike the images of the training.
    """

    scene: str
    files: dict[str, str]
    height: int
    width: int
    pixels: dict[str, int]
    no_data: int
    seconds: float
    notes: list[str] = field(default_factory=list)


@dataclass
class MapSummary:
    """The result of `predict`; `failed` holds the reason for each scene without a map. With `limit`, some of the `scenes` are mapped."""

    model: str
    device: str
    tta: str
    window: int
    overlap: int
    classes: list[str]
    blended: bool = True
    maps: list[Map] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    scenes: int = 0


def predict(
    predictor: Predictor,
    inputs: Sequence[str],
    out: str | Path,
    *,
    window: int | None = None,
    overlap: int | None = None,
    batch_size: int | None = None,
    confidence: bool = False,
    probabilities: bool = False,
    overwrite: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> MapSummary:
    """
    Write a map of each scene in `inputs` (see `list_scenes`) into the folder `out`.

    Windows have `window` px and share `overlap` px (see `sizes_of_windows`); `batch_size` of them are predicted at once. With `limit`, so
    many of the scenes are mapped (see `tiles.limited`). A scene that cannot be read is named in the result, and the others go on. Raises
    `ConfigError` for invalid sizes, and for probabilities of a network that answers with classes; `DataError` if an input names nothing,
    two maps would have the same name, or a map exists and `overwrite` is false; `KdpipeError` if a map cannot be written or a logit is not
    finite; `Interrupted` if `stop` was set.
    """
    window, overlap = sizes_of_windows(predictor, window, overlap)
    card = predictor.card
    if (confidence or probabilities) and not is_blended(card):
        raise ConfigError(
            f"{predictor.origin} answers with classes, and has no probabilities for --confidence or --probabilities: leave them out, or "
            "take a file that was exported without --argmax"
        )
    progress, stop = progress or Silent(), stop or threading.Event()
    folder = output_path(out, "--out")
    kinds = [CLASSES, *([CONFIDENCE] if confidence else []), *([PROBABILITIES] if probabilities else [])]
    scenes = list_scenes(inputs)
    targets = _targets(limited(scenes, limit), folder, kinds, overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConfigError(f"--out {folder} cannot be made: {err.strerror}") from err
    summary = MapSummary(
        predictor.origin, predictor.device, predictor.tta, window, overlap, list(card.classes), is_blended(card),
        limit=limit, scenes=len(scenes),
    )  # fmt: skip
    counts, bands_notes = _look_at(targets, card, window, overlap, summary)
    say_notes(bands_notes, "note", progress)
    range_notes = {}
    mapper = _SceneMapper(
        predictor, window, overlap, batch_size or (GPU_BATCH if predictor.device != "cpu" else 1), stop
    )
    with progress.bar("predict", sum(counts.values()), "windows") as advance:
        for scene_path, total in counts.items():
            counted = _Counted(advance)
            try:
                map_, range_note = mapper.map_scene(scene_path, targets[scene_path], counted)
                map_.notes = [note for note in (bands_notes.get(scene_path), range_note) if note]
                summary.maps.append(map_)
                if range_note:
                    range_notes[scene_path] = range_note
            except DataError as err:
                summary.failed[scene_path] = str(err)
                advance(total - counted.done)
            except Interrupted as err:
                raise Interrupted(
                    f"stopped in {scene_path}, which has no map yet; {len(summary.maps)} of {count_text(len(targets), 'scenes')} have "
                    "their map in "
                    f"{folder}: name the others to go on"
                ) from err
    say_notes(range_notes, "warning", progress)
    return summary


def _look_at(
    scenes: Iterable[str], card: Card, window: int, overlap: int, summary: MapSummary
) -> tuple[dict[str, int], dict[str, str]]:
    """The number of windows of each scene that opens, and the notes on their bands; the others are `failed` in `summary`."""
    counts, bands_notes = {}, {}
    for scene_path in scenes:
        try:
            with _open(scene_path, card) as scene:
                require_memory(scene, window, len(card.bands), len(card.classes))
                rows, columns = windows_over(scene, window, overlap, card)
                counts[scene_path] = len(rows) * len(columns)
                if scene.bands_note:
                    bands_notes[scene_path] = scene.bands_note
        except DataError as err:
            summary.failed[scene_path] = str(err)
    return counts, bands_notes


def _open(path: str, card: Card) -> AbstractContextManager[Scene]:
    """The scene as the student of the card sees it; see `open_scene`."""
    return open_scene(path, card.bands, card.stretch, card.colours, card.alpha, card.image_bands)


class _SceneMapper:
    """Writes the maps of one scene after another."""

    def __init__(self, predictor: Predictor, window: int, overlap: int, batch_size: int, stop: threading.Event) -> None:
        self._predictor, self._window, self._overlap = predictor, window, overlap
        self._batch_size, self._stop = batch_size, stop

    def map_scene(self, path: str, files: dict[str, Path], advance: Advance) -> tuple[Map, str | None]:
        """The map of a scene, and a warning if its values are out of the student's range."""
        card, start = self._predictor.card, time.monotonic()
        counts = np.zeros(len(card.classes), np.int64)
        no_data = 0
        with ExitStack() as stack:
            scene = stack.enter_context(_open(path, card))
            # The map of classes is opened first, so that it is renamed last: if it exists, the others do.
            writers = {
                kind: stack.enter_context(
                    new_map(file, self._layer(kind), scene.height, scene.width, scene.georeference)
                )
                for kind, file in files.items()
            }
            for logits_ChW, data_hW in self._finished_rows(scene, advance):
                classes_hW = _write_rows(logits_ChW, data_hW, writers, card.ignore_index)
                counts += np.bincount(classes_hW[data_hW], minlength=len(counts))
                no_data += int(data_hW.size - np.count_nonzero(data_hW))
        map_ = Map(
            scene=path,
            files={kind: str(file) for kind, file in files.items()},
            height=scene.height,
            width=scene.width,
            pixels=dict(zip(card.classes, counts.tolist(), strict=True)),
            no_data=no_data,
            seconds=round(time.monotonic() - start, 3),
        )
        return map_, range_note(scene.seen, card.stretch)

    def _finished_rows(self, scene: Scene, advance: Advance) -> Iterator[tuple[Tensor, NDArray[np.bool_]]]:
        """
        Final logits float32 `(C, h, W)` from top to bottom, and where the scene has data, bool `(h, W)`.

        Logits are zero where no window has data.
        """
        rows, columns = windows_over(scene, self._window, self._overlap, self._predictor.card)
        waiting_hW = np.empty((0, scene.width), np.bool_)  # of rows whose logits are not final

        def logits_of(row: Span) -> Iterator[tuple[Span, Tensor]]:
            nonlocal waiting_hW
            bottom = min(row.start + len(row.shares), scene.height)
            image_hWB, waiting_hW = scene.read_with_data(row.start, bottom)
            return self._windows(scene, row.start, image_hWB, waiting_hW, columns, advance)

        for logits_1ChW in blended_rows(logits_of, rows, scene.height, scene.width):
            height = logits_1ChW.shape[-2]
            yield logits_1ChW[0], waiting_hW[:height]
            waiting_hW = waiting_hW[height:]

    def _windows(
        self, scene: Scene, top: int, image_hWB: NDArray[np.uint8], data_hW: NDArray[np.bool_], columns: Sequence[Span],
        advance: Advance,
    ) -> Iterator[tuple[Span, Tensor]]:  # fmt: skip
        """The windows over the rows from `top`, and their logits `(1, C, h, w)`; windows without data are not predicted."""
        height, total_width = data_hW.shape
        side = len(columns[0].shares)
        widths = [min(side, total_width - column.start) for column in columns]
        wanted = [
            (column, width)
            for column, width in zip(columns, widths, strict=True)
            if data_hW[:, column.start : column.start + width].any()
        ]
        advance(len(columns) - len(wanted))
        if not wanted:
            yield columns[0], torch.zeros(1, len(self._predictor.card.classes), height, widths[0])
        image_BhW = torch.from_numpy(image_hWB).permute(2, 0, 1)
        for batch in _batches(wanted, self._batch_size):
            if self._stop.is_set():
                raise Interrupted("stopped")
            width = batch[0][1]
            images_NBhw = torch.stack([image_BhW[..., column.start : column.start + width] for column, _ in batch])
            with fits_in_memory(
                f"while predicting {sized('window', len(batch), height, width)}",
                advice_on_memory(self._window, self._predictor.side),
            ):
                logits_NChw = self._predictor.logits(images_NBhw)
            if not torch.isfinite(logits_NChw).all():
                raise KdpipeError(
                    f"{self._predictor.origin} gives logits that are not finite for {scene.path}, near row {top}, column "
                    f"{batch[0][0].start}: there is no map of it"
                )
            for number, (column, _) in enumerate(batch):
                yield column, logits_NChw[number : number + 1]
            advance(len(batch))

    def _layer(self, kind: str) -> Layer:
        card = self._predictor.card
        tags = {
            "model": f"{card.run} after step {card.step}, {card.network}",
            "checkpoint_sha256": card.checkpoint_sha256,
            "windows": f"{self._window} px, {self._overlap} px shared, TTA {self._predictor.tta}"
            + ("" if is_blended(card) else ", not blended"),
            "TIFFTAG_SOFTWARE": f"kdpipe {card.kdpipe}",
        }
        if kind == CLASSES:
            return class_layer(card.classes, card.palette, card.ignore_index, tags)
        return probability_layer(["confidence"] if kind == CONFIDENCE else card.classes, tags)


class _Counted:
    """Advances the bar and counts the steps, in case the scene ends early."""

    def __init__(self, advance: Advance) -> None:
        self._advance, self.done = advance, 0

    def __call__(self, steps: int = 1) -> None:
        self.done += steps
        self._advance(steps)


def _write_rows(
    logits_ChW: Tensor, data_hW: NDArray[np.bool_], writers: dict[str, RowWriter], no_class: int
) -> NDArray[np.int64]:
    """The classes of finished rows, `(h, W)`, also where there is no data; writes the rows to all maps."""
    classes_hW = np.empty(data_hW.shape, np.int64)
    for top in range(0, len(data_hW), ROWS_AT_ONCE):
        rows = slice(top, top + ROWS_AT_ONCE)
        logits, data = logits_ChW[:, rows], data_hW[rows]
        classes_hW[rows] = logits.argmax(dim=0).numpy()
        if len(writers) == 1:
            continue
        stored = np.where(data, as_bytes(torch.softmax(logits, dim=0).numpy()), np.uint8(NO_PROBABILITY))
        if PROBABILITIES in writers:
            writers[PROBABILITIES].write(stored)
        if CONFIDENCE in writers:
            # From stored probabilities, so that 255, no data, stays 255.
            writers[CONFIDENCE].write(stored.max(axis=0, keepdims=True))
    dtype = np.uint8 if max(no_class, len(logits_ChW) - 1) <= np.iinfo(np.uint8).max else np.uint16
    writers[CLASSES].write(np.where(data_hW, classes_hW, no_class).astype(dtype)[None])
    return classes_hW


def _batches(windows: Sequence[tuple[Span, int]], batch_size: int) -> Iterator[list[tuple[Span, int]]]:
    """Batches of at most `batch_size` windows of equal width; the last window may be cut off by the scene's border."""
    for _, same in groupby(windows, key=lambda window: window[1]):
        group = list(same)
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _targets(scenes: Sequence[str], folder: Path, kinds: Sequence[str], overwrite: bool) -> dict[str, dict[str, Path]]:
    """The files of each scene's maps by kind; raises `DataError` if two coincide, one exists, or one is an input."""
    targets = {scene: {kind: folder / (_stem(scene) + SUFFIXES[kind]) for kind in kinds} for scene in scenes}
    taken: dict[Path, str] = {}
    sources = {Path(scene).resolve() for scene in scenes}
    for scene, files in targets.items():
        for file in files.values():
            if file in taken:
                raise DataError(
                    f"{taken[file]} and {scene} would both have the map {file}: map them in two runs with different --out, or rename one"
                )
            if file.resolve() in sources:
                raise DataError(f"the map {file} would replace a scene that it is made from: choose another --out")
            taken[file] = scene
    present = [file for file in taken if file.exists()]
    if present and not overwrite:
        more = f" and {len(present) - 1} more maps exist" if len(present) > 1 else " exists"
        raise DataError(f"{present[0]}{more} already: choose another --out, or add --overwrite to replace them")
    return targets


def _stem(scene: str) -> str:
    """The name of a scene, a path or a URL, without its folder and last suffix."""
    return Path(scene.rstrip("/").rpartition("/")[2]).stem
