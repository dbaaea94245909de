"""
What another program predicts of one tile: its values as stored, the logits that they stand for, and their digest.

Shapes: C channels of the teacher, H W pixels of the tile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache.images import digest_image
from kdpipe.cache.index.records import ImageDigest
from kdpipe.configs.errors import DataError
from kdpipe.configs.schema.teacher import Are
from kdpipe.data.declared.header import read_declared
from kdpipe.data.declared.tile import mask_faults, pair_faults
from kdpipe.data.rasters import image_size, read_bands
from kdpipe.data.tiles import Tile
from kdpipe.pipeline.teacher.predictions.arrays import (
    ARRAYS,
    SUM_TOLERANCE,
    most_bytes,
    read_array,
    shape_hint,
)
from kdpipe.pipeline.teacher.predictions.cut import Stored, cut, known_of

# Stands for log 0: of the smallest normal float32. At T 4 such a class still has less than 1e-9 of the likeliest one's probability.
LOG_ZERO = np.float32(np.log(np.finfo(np.float32).tiny))
NEGATIVE_TOLERANCE = 1e-6  # of a probability, which arithmetic in float32 may leave below zero
_SHOWN_VALUES = 5


@dataclass(frozen=True, slots=True)
class Prediction:
    """
    The stored prediction of the tile `image`: `stored` is one file of its own, or large rasters to cut from by its place (`is_cut`).

    `stored` is empty where there is none. `classes` are the teacher's, a channel each, and `ignore_index` is that of masks.
    """

    key: str
    image: Path
    stored: tuple[Path, ...]
    is_cut: bool
    are: Are
    classes: tuple[str, ...]
    ignore_index: int

    @property
    def files(self) -> list[Path]:
        """The files that decide what the cache holds of the tile, its image first."""
        return [self.image, *self.stored]

    def of(self, tile: Tile) -> Prediction:
        """The same prediction of a tile whose image has another path here."""
        return replace(self, image=tile.image)

    def __str__(self) -> str:
        return f"{self.image} with {', '.join(map(str, self.stored))}" if self.stored else str(self.image)

    def has(self, digest: ImageDigest) -> bool:
        """
        Whether image and prediction are those of this digest.

        Training needs no predictions: where they are gone, an image is known by its size in bytes alone.
        """
        if self.image.stat().st_size != digest.size_bytes:
            return False
        return not self.stored or self.digest_of(self.read()) == digest

    def digest_of(self, stored: Stored) -> ImageDigest:
        """The size of the image, and the sha256 of its content and of the stored values."""
        image = digest_image(self.image)
        scaling = f"{stored.values_CHW.dtype.str} {stored.values_CHW.shape} {stored.scales} {stored.offsets}"
        digest = hashlib.sha256(f"{image.sha256} {self.are} {scaling}".encode())
        # Of pixels without a prediction, what is stored does not count.
        digest.update(np.packbits(stored.known_HW).tobytes())
        digest.update(np.where(stored.known_HW, stored.values_CHW, np.zeros((), stored.values_CHW.dtype)).tobytes())
        return ImageDigest(image.size_bytes, digest.hexdigest())

    def read(self) -> Stored:
        """The stored values; raises `DataError` where they cannot be those of the tile."""
        if not self.stored:
            raise DataError(f"{self.key}.predictions hold none of {self.image}")
        height, width = image_size(self.image)
        stored = cut(self.image, self.stored) if self.is_cut else self._own(self.stored[0], height, width)
        self._require_shape(stored.values_CHW, height, width)
        if self.are == "classes":
            self._without_ignored(stored)
        return stored

    def logits(self, stored: Stored) -> NDArray[np.float32]:
        """
        Logits, float32 `(H, W, C)`, whose softmax is the prediction; zero in all channels of a pixel without one.

        A probability p has the logit log p, and zero `LOG_ZERO`; a class has the logit 0 and all others `LOG_ZERO`. One channel, of a
        sigmoid, becomes two. Raises `DataError` for values that are not what `are` says.
        """
        values_CHW = stored.values_CHW
        if self.are == "classes":
            logits_CHW = self._one_hot(values_CHW[0], stored.known_HW)
        else:
            values_CHW = self._scaled(stored)
            self._require_finite(values_CHW, stored.known_HW)
            if self.are == "logits":
                logits_CHW = values_CHW if len(values_CHW) > 1 else np.concatenate([0 * values_CHW, values_CHW])
            else:
                logits_CHW = self._logarithms(values_CHW, stored)
        logits_CHW = np.where(stored.known_HW, logits_CHW, np.float32(0))
        return np.ascontiguousarray(logits_CHW.transpose(1, 2, 0))

    def _own(self, path: Path, height: int, width: int) -> Stored:
        if path.suffix.lower() in ARRAYS:
            values = read_array(path, most_bytes(len(self.classes), height, width))
            values_CHW = values[None] if values.ndim == 2 and self._channels == (1,) else values
            if values_CHW.ndim != 3:
                self._require_shape(values_CHW, height, width)
            missing_CHW = np.zeros(values_CHW.shape, dtype=np.bool_)
            count = len(values_CHW)
            return Stored(values_CHW, known_of(values_CHW, missing_CHW), (1.0,) * count, (0.0,) * count)
        header, image = read_declared(path), read_declared(self.image)
        if self.are == "classes":
            for fault in mask_faults(path, header):
                raise DataError(fault.replace("the mask", "the prediction", 1))
        for fault in pair_faults(self.image, image, path, header):
            raise DataError(fault.replace("the mask", "the prediction", 1).replace("labels would", "it would"))
        # `band`: a file of four bands is often said to have opacity, by default.
        values_CHW, missing_CHW = read_bands(path, range(1, header.bands + 1), "band")
        return Stored(values_CHW, known_of(values_CHW, missing_CHW), header.scales, header.offsets)

    @property
    def _channels(self) -> tuple[int, ...]:
        """The numbers of channels that a file may have; that of a sigmoid stands for two."""
        if self.are == "classes":
            return (1,)
        return (len(self.classes), 1) if len(self.classes) == 2 else (len(self.classes),)

    def _require_shape(self, values: NDArray[Any], height: int, width: int) -> None:
        where = self.stored[0]
        if values.shape in [(count, height, width) for count in self._channels]:
            kind = values.dtype.kind
            if kind not in ("iu" if self.are == "classes" else "iuf"):
                needed = "integers, the index of a class" if self.are == "classes" else "numbers"
                raise DataError(f"{where} holds {values.dtype} values, and {self.key}.are: {self.are} needs {needed}")
            return
        wanted = (self._channels[0], height, width)
        if self.are == "classes":
            raise DataError(
                f"{where} has the shape {values.shape}, and {self.key}.are: classes needs one index for each pixel of its tile, "
                f"({height}, {width}): save the argmax, or set are to what the file holds"
            )
        raise DataError(
            f"{where} has the shape {values.shape}, and its tile needs {wanted}: one channel for each of {self.key}.classes "
            f"({', '.join(self.classes)}), then height and width{shape_hint(values.shape, wanted)}"
        )

    def _scaled(self, stored: Stored) -> NDArray[np.float32]:
        values_CHW = stored.values_CHW
        is_scaled = any(scale != 1 for scale in stored.scales) or any(offset != 0 for offset in stored.offsets)
        if values_CHW.dtype.kind in "iu" and self.are == "probabilities" and not is_scaled:
            raise DataError(
                f"{self.stored[0]} holds {values_CHW.dtype} values up to {values_CHW.max()} and declares no scale, so that they are no "
                "probabilities: save floats in 0..1, or declare the scale of its bands (`gdal_edit.py -scale 0.003937 FILE`); class "
                "indices are are: classes"
            )
        if not is_scaled:
            return values_CHW.astype(np.float32, copy=False)
        by_channel = np.array([stored.scales, stored.offsets], dtype=np.float64)[:, :, None, None]
        scaled_CHW: NDArray[np.float32] = (values_CHW * by_channel[0] + by_channel[1]).astype(np.float32)
        return scaled_CHW

    def _require_finite(self, values_CHW: NDArray[np.float32], known_HW: NDArray[np.bool_]) -> None:
        strange_HW = known_HW & ~np.isfinite(values_CHW).all(axis=0)
        if strange_HW.any():
            row, column = np.argwhere(strange_HW)[0].tolist()
            raise DataError(
                f"{self.stored[0]} holds NaN or infinity in some channels of {np.count_nonzero(strange_HW)} pixels, the first at row "
                f"{row}, column {column} of {self.image.name}: save finite numbers, or NaN in all channels of pixels without a prediction"
            )

    def _logarithms(self, probs_CHW: NDArray[np.float32], stored: Stored) -> NDArray[np.float32]:
        known_HW = stored.known_HW
        if len(probs_CHW) == 1:
            if ((probs_CHW[0] > 1 + SUM_TOLERANCE) & known_HW).any():
                raise self._no_probabilities(
                    float(probs_CHW[0][known_HW].max()), "the probability of its second class up to"
                )
            probs_CHW = np.concatenate([1 - probs_CHW, probs_CHW])
        lowest = float(probs_CHW.min(where=known_HW, initial=0))
        step = max(map(abs, stored.scales)) if stored.values_CHW.dtype.kind in "iu" else 0.0
        slack = max(NEGATIVE_TOLERANCE, step / 2)  # a stored integer is rounded by up to half a step
        if lowest < -slack:
            raise self._no_probabilities(lowest, "values down to")
        sums_HW = probs_CHW.sum(axis=0, dtype=np.float32)
        worst_HW = np.where(known_HW, np.abs(sums_HW - 1), 0)
        if worst_HW.max(initial=0) > SUM_TOLERANCE + len(probs_CHW) * step / 2:
            worst = float(sums_HW[np.unravel_index(worst_HW.argmax(), worst_HW.shape)])
            raise self._no_probabilities(worst, "channels that sum to")
        total_HW: NDArray[np.float32] = np.where(known_HW, sums_HW, np.float32(1))
        shares_CHW: NDArray[np.float32] = np.maximum(probs_CHW, 0).astype(np.float32, copy=False) / total_HW
        with np.errstate(divide="ignore", invalid="ignore"):  # of pixels without a prediction too
            logits_CHW: NDArray[np.float32] = np.maximum(np.log(shares_CHW), LOG_ZERO)
        return logits_CHW

    def _no_probabilities(self, value: float, what: str) -> DataError:
        return DataError(
            f"{self.stored[0]} holds {what} {value:.4g}, and the probabilities of a pixel lie in 0..1 and sum to 1: apply softmax over the "
            f"channels before they are saved, or set {self.key}.are: logits if they are scores before the softmax"
        )

    def _without_ignored(self, stored: Stored) -> None:
        """Take pixels of the masks' `ignore_index` as those without a prediction, unless it is a class."""
        if self.ignore_index >= len(self.classes):
            stored.known_HW[stored.values_CHW[0] == self.ignore_index] = False

    def _one_hot(self, indices_HW: NDArray[Any], known_HW: NDArray[np.bool_]) -> NDArray[np.float32]:
        foreign = np.unique(indices_HW[known_HW & ((indices_HW < 0) | (indices_HW >= len(self.classes)))]).tolist()
        if foreign:
            shown = ", ".join(map(str, foreign[:_SHOWN_VALUES])) + (", …" if len(foreign) > _SHOWN_VALUES else "")
            raise DataError(
                f"{self.stored[0]} holds {shown}, no index of {self.key}.classes (0..{len(self.classes) - 1}): name every class, in order, "
                "or declare the value of pixels without a prediction as the file's nodata"
            )
        logits_CHW = np.full((len(self.classes), *indices_HW.shape), LOG_ZERO, dtype=np.float32)
        np.put_along_axis(logits_CHW, np.where(known_HW, indices_HW, 0).astype(np.intp)[None], np.float32(0), axis=0)
        return logits_CHW


def names_of(tile_id: str) -> Sequence[str]:
    """The names that a tile's file may have without its ending, from the longest: `Train/north/t1`, `north/t1`, `t1`."""
    parts = tile_id.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]
