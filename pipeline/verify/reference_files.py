"""The files that a teacher's owner saves of their own script: which tile each belongs to, and the scores it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdpipe.configs.errors import DataError, summarise
from kdpipe.data.declared.header import read_declared
from kdpipe.data.rasters import read_bands
from kdpipe.data.tiles import Tile
from kdpipe.pipeline.teacher.predictions.arrays import (
    ARRAYS,
    SUM_TOLERANCE,
    most_bytes,
    read_array,
    same_name,
    shape_hint,
)

SUFFIXES = (*ARRAYS, ".tif", ".tiff")
FLOAT16_STEP = 2.0**-11  # the largest relative error of a number stored in float16

Kind = Literal["logits", "probabilities", "log-probabilities", "values in 0..1"]


@dataclass(frozen=True)
class Scores:
    """
    What a file holds of a tile, float32 `(C, H, W)`, and of which kind it is.

    `rounding` is the most that storing in float16 may have moved a probability; 0 for wider types. `computed_in` is the precision
    whose numbers a wider type holds, fp16 or bf16: the script must have computed in it.
    """

    path: Path
    values_CHW: NDArray[np.float32]
    kind: Kind
    rounding: float
    computed_in: str | None


def match_files(folder: Path, tiles: Sequence[Tile]) -> tuple[list[tuple[Tile, Path]], list[Path]]:
    """
    Each tile that has a file in `folder`, with that file, and the files that belong to no tile.

    A file is named after a tile's stem (`t1.npy`) or id (`Train/t1.npy`). Raises `DataError` if no file belongs to a tile, if two
    belong to one, or if a stem is that of several tiles.
    """
    by_name: dict[str, list[Tile]] = {}
    for tile in tiles:
        for name in {same_name(tile.id), same_name(tile.id.rpartition("/")[2])}:
            by_name.setdefault(name, []).append(tile)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    found: dict[str, tuple[Tile, Path]] = {}
    strangers = []
    for path in files:
        name = same_name(path.relative_to(folder).with_suffix("").as_posix())
        named = by_name.get(name, [])
        if not named:
            strangers.append(path)
            continue
        if len(named) > 1:
            raise DataError(
                f"{path} may belong to any of {summarise(tile.id for tile in named)}: name it by the tile's id, as "
                f"{folder / named[0].id}{path.suffix}"
            )
        (tile,) = named
        if tile.id in found:
            raise DataError(f"two files hold the scores of {tile.id}: {found[tile.id][1]} and {path}; keep one")
        found[tile.id] = (tile, path)
    if not found:
        have = f"found {summarise(path.name for path in files)}" if files else f"found no {', '.join(SUFFIXES)}"
        raise DataError(
            f"no file in {folder} is named as a tile: expected scores such as {tiles[0].id.rpartition('/')[2]}.npy or "
            f"{tiles[0].id}.npy; {have}"
        )
    return list(found.values()), strangers


def read_scores(path: Path, classes: Sequence[str], height: int, width: int) -> Scores:
    """
    The scores in a file, of a tile of `height` x `width` px and the teacher's channels `classes`.

    One channel, of a sigmoid, becomes two. Raises `DataError` if the file is unreadable or holds anything but one finite float array
    `(C, H, W)`; exchanged height and width are let through, as a script that turns images leaves them.
    """
    if path.suffix.lower() in (".tif", ".tiff"):
        raw = _raster(path, classes, height, width)
    else:
        raw = read_array(path, most_bytes(len(classes), height, width))
    _require_scores(path, raw.shape, raw.dtype, classes, height, width)
    values_CHW = np.ascontiguousarray(raw, dtype=np.float32)
    strange = np.count_nonzero(~np.isfinite(values_CHW))
    if strange:
        raise DataError(
            f"{path} holds NaN or infinity in {strange} of its values: save scores that are finite, such as logits"
        )
    if set(np.unique(values_CHW[:, ::7, ::7]).tolist()) <= {0.0, 1.0} and np.isin(values_CHW, (0, 1)).all():
        raise DataError(
            f"{path} holds 0 and 1 alone, an argmax as one-hot: save the scores before it, logits or probabilities"
        )
    kind = _kind(values_CHW)
    if (
        len(values_CHW) == 1
    ):  # of a sigmoid: z or σ(z), which say the same as the logits 0 and z or as 1 - σ(z) and σ(z)
        is_share = kind in ("probabilities", "values in 0..1")
        values_CHW = np.concatenate([1 - values_CHW if is_share else np.zeros_like(values_CHW), values_CHW])
        kind = "probabilities" if is_share else "logits"
    if raw.dtype != np.float16:
        return Scores(path, values_CHW, kind, 0.0, _precision_of(values_CHW))
    return Scores(path, values_CHW, kind, _rounding(values_CHW, kind), None)


def _raster(path: Path, classes: Sequence[str], height: int, width: int) -> NDArray[Any]:
    """The bands of a GeoTIFF, whose header is checked before they are read."""
    header = read_declared(path)
    shape = (header.bands, header.height, header.width)
    _require_scores(path, shape, np.dtype(header.dtype), classes, height, width)
    return read_bands(path, range(1, header.bands + 1))[0]


def _require_scores(
    path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], classes: Sequence[str], height: int, width: int
) -> None:
    if dtype.kind in "iub":
        raise DataError(
            f"{path} holds {dtype} values of shape {shape}, indices of classes (an argmax): save the scores before it, float "
            f"({len(classes)}, {height}, {width})"
        )
    if dtype.kind != "f":
        raise DataError(f"{path} holds {dtype} values: save the scores as floats")
    wanted = (len(classes), height, width)
    channels = (len(classes), 1) if len(classes) == 2 else (len(classes),)  # one of a sigmoid stands for two
    if shape in [(count, *size) for count in channels for size in ((height, width), (width, height))]:
        return
    raise DataError(
        f"{path} has the shape {shape}, and its tile needs {wanted}: one channel for each of the teacher's classes "
        f"({', '.join(classes)}), then height and width{shape_hint(shape, wanted)}"
    )


def _rounding(values_CHW: NDArray[np.float32], kind: Kind) -> float:
    """
    The most that storing in float16 moved a probability, to first order.

    If logits move by δ, softmax moves by `p_c (δ_c - Σ p_j δ_j)`; each δ is at most `FLOAT16_STEP` times its logit.
    """
    if kind in ("probabilities", "values in 0..1"):
        return FLOAT16_STEP
    error_CHW = np.abs(values_CHW) * FLOAT16_STEP
    probs_CHW = np.exp(values_CHW - values_CHW.max(axis=0))
    probs_CHW /= probs_CHW.sum(axis=0)
    mean_HW = (probs_CHW * error_CHW).sum(axis=0)
    return float((probs_CHW * (error_CHW * (1 - 2 * probs_CHW) + mean_HW)).max())


def _precision_of(values_CHW: NDArray[np.float32]) -> str | None:
    """The narrow type that holds all of these float32 values exactly."""
    if not (values_CHW.view(np.uint32) & 0xFFFF).any():
        return "bf16"
    with np.errstate(over="ignore"):
        return "fp16" if np.array_equal(values_CHW.astype(np.float16).astype(np.float32), values_CHW) else None


def _kind(values_CHW: NDArray[np.float32]) -> Kind:
    if values_CHW.min() >= 0 and values_CHW.max() <= 1 + SUM_TOLERANCE:
        sums_HW = values_CHW.sum(axis=0)
        return "probabilities" if np.abs(sums_HW - 1).max() <= SUM_TOLERANCE else "values in 0..1"
    if values_CHW.max() <= SUM_TOLERANCE and np.abs(np.exp(values_CHW).sum(axis=0) - 1).max() <= SUM_TOLERANCE:
        return "log-probabilities"
    return "logits"
