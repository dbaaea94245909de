"""
The check of a run's tiles before its work begins, by what their files declare, and by the labels in the masks.

What is certainly wrong is refused, what probably is wrong is said once. Headers are opened by threads; after a first check, only those
of files that have changed since, and a sample of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from kdpipe.configs.errors import DataError, count_text
from kdpipe.configs.schema import Config
from kdpipe.data.declared.check import (
    THREADS,
    Comparison,
    Findings,
    Headers,
    headers_of,
    read_headers,
    refuse,
    tile_faults,
)
from kdpipe.data.rasters import read_mask
from kdpipe.data.survey import alpha_notes, evenly
from kdpipe.data.tiles import Tile
from kdpipe.pipeline.progress import Advance, Progress, Silent

SHOWN_FROM = 500  # tiles, whose headers take about a second
FIRST = 3  # training images whose alpha is looked at
MOST_BEFORE = 10_000  # tiles that stage one looks at before it begins, in ten seconds or so
MOST_AGAIN = 2000  # unchanged tiles, read again in two or three seconds: new validation tiles may lie on them


def check_headers(
    config: Config,
    train: Sequence[Tile],
    val: Sequence[Tile],
    progress: Progress,
    *,
    since: float | None = None,
    val_since: float | None = None,
    images_may_fail: bool = False,
) -> None:
    """
    Check what tiles to train on and to validate on declare, against `config` and against each other; notes are said.

    Args:
        config: `data` and `classes` are used.
        train: tiles to train on.
        val: tiles to validate on.
        progress: where notes and the progress are shown.
        since: time of an earlier check of `train`, in seconds since the epoch. Of files that have not changed after it, a sample is read.
        val_since: the same for `val`.
        images_may_fail: whether an unreadable image is left to stage one, which names it and computes the other tiles. Of more than
            `MOST_BEFORE` tiles to train on, only so many are read: stage one refuses the others by `refuse_unusable`.

    Raises `DataError` for what is certainly wrong, such as an alpha band among `data.bands` or a mask with lossy compression.
    """
    read_now = evenly(train, MOST_BEFORE) if images_may_fail else _to_read(train, since)
    if len(read_now) < len(train) and images_may_fail:
        progress.say(
            f"note: of {len(train):,} tiles the headers of {len(read_now):,} are read now, evenly spread, the others' as their tiles come"
        )
    chosen = [*((tile, False) for tile in read_now), *((tile, True) for tile in _to_read(val, val_since))]
    if not chosen:
        return
    data = config.data
    comparison = Comparison(data.bands, "bands" in data.model_fields_set, len(config.classes.names))
    faults: list[str] = []
    first: list[Headers] = []
    with _bar(progress, "headers", len(chosen), "tiles") as advance:
        read = read_headers([tile for tile, _ in chosen], lambda: advance(1))
        for (_, is_val), as_declared in zip(chosen, read, strict=True):
            if not is_val and len(first) < FIRST:
                first.append(as_declared)
            headers = as_declared.called(data.alpha)
            faults += _faults_of(headers, config, images_may_fail=images_may_fail and not is_val)
            comparison.add(headers, is_val=is_val)
    findings = comparison.findings()
    refuse(Findings(findings.faults + faults))  # what is wrong with all comes first: it decides what to do about each
    misread = [] if data.alpha == "band" else alpha_notes(first)
    for note in [*findings.notes, *misread]:
        progress.say(f"note: {note}")


def refuse_unusable(config: Config, tile: Tile) -> None:
    """Raise `DataError` for a tile whose image or mask cannot be used as configured by its header, or cannot be read."""
    faults = _faults_of(headers_of(tile).called(config.data.alpha), config, images_may_fail=False)
    if faults:
        raise DataError(faults[0])


def check_labels(
    config: Config, train: Sequence[Tile], val: Sequence[Tile], progress: Progress, *, since: float | None = None
) -> None:
    """
    Read the masks of all validation tiles, and of training tiles until one holds a label.

    Raises `DataError` for a mask that cannot be read or holds a value that is no class, and where not one pixel of the training masks,
    or of the validation masks, is labelled. Masks of `val` that have not changed after `since` are not read.
    """
    labelled = [tile.mask for tile in train if tile.mask is not None]
    if since is None and labelled and not any(_has_labels(labelled, config)):
        raise DataError(_no_label_text("training", labelled, config))
    masks = [tile.mask for tile in val if tile.mask is not None and (since is None or _changed(tile.mask) > since)]
    if not masks:
        return
    found = False
    with _bar(progress, "validation masks", len(masks), "masks") as advance, ThreadPoolExecutor(THREADS) as threads:
        for has_labels in threads.map(lambda path: next(_has_labels([path], config)), masks):
            found |= has_labels
            advance(1)
    if not found and since is None:
        raise DataError(_no_label_text("validation", masks, config))


def note_masks(config: Config, train: Sequence[Tile], progress: Progress) -> None:
    """Say if the first training mask cannot be read as configured: stage one needs no masks, but training refuses them, hours later."""
    mask = next((tile.mask for tile in train if tile.mask is not None), None)
    try:
        if mask is not None:
            next(_has_labels([mask], config))
    except DataError as err:
        progress.say(f"warning: stage one needs no masks, and training will refuse these: {err}")


def _bar(progress: Progress, title: str, total: int, unit: str) -> AbstractContextManager[Advance]:
    return (progress if total >= SHOWN_FROM else Silent()).bar(title, total, unit)


def _faults_of(headers: Headers, config: Config, *, images_may_fail: bool) -> list[str]:
    faults = tile_faults(
        headers, config.data.bands, has_stretch=config.data.stretch is not None, of_colours=bool(config.data.colours)
    )
    if headers.image_error is not None and not images_may_fail:
        faults.append(headers.image_error)
    return faults


def _to_read(tiles: Sequence[Tile], since: float | None) -> list[Tile]:
    """The tiles with a file that has changed after `since`, and a sample of the others."""
    if since is None:
        return list(tiles)
    changed = [tile for tile in tiles if max(map(_changed, filter(None, (tile.image, tile.mask)))) > since]
    known = {tile.id for tile in changed}
    return changed + evenly([tile for tile in tiles if tile.id not in known], MOST_AGAIN)


def _changed(path: Path) -> float:
    """When a file was last changed, moved or copied here; now for one that is missing, so that it is opened and named."""
    try:
        return path.stat().st_ctime
    except OSError:
        return float("inf")


def _has_labels(masks: Sequence[Path], config: Config) -> Iterator[bool]:
    """Whether each mask holds a pixel of a class."""
    classes, codes = config.classes, config.mask_codes
    for path in masks:
        labels_HW = read_mask(path, len(classes.names), classes.ignore_index, codes)
        yield bool((labels_HW != classes.ignore_index).any())


def _no_label_text(kind: str, masks: Sequence[Path], config: Config) -> str:
    return (
        f"all pixels of the {count_text(len(masks), f'{kind} masks')} are {config.classes.ignore_index}, classes.ignore_index, so that "
        "not one is labelled "
        f"(the first is {masks[0]}): correct classes.ignore_index, or recode the masks"
    )
