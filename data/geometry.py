"""
The geometry of training samples: views of tiles, resampled exactly, in the same way for image, mask and target.

A view is a crop of a tile resized by `scale`. Only the source pixels under the crop are read; up to rounding, the result equals
resizing the whole tile and slicing it. Pixel centres lie at half integers (`align_corners=False`), there is no antialiasing, and
the border pixel extends beyond the border. Not covered: the choice of views (`augment.py`).

Shapes: H W pixels of the tile, h w of a window or a view, C classes, B bands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TRANSPOSED_BYTES = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32}  # per pixel, of which OpenCV transposes images

Window = tuple[int, int, int, int]
"""`(top, left, height, width)` in px of the tile."""


@dataclass(frozen=True)
class View:
    """
    A crop of `height` x `width` px at `(top, left)` of tile number `tile` resized by `scale`, placed at `(out_top, out_left)`.

    `top` and `left` are px within the resized tile; the part of the crop below or to the right of it is padding.
    """

    tile: int
    scale: float
    top: int
    left: int
    height: int
    width: int
    out_top: int = 0
    out_left: int = 0


@dataclass(frozen=True)
class Plan:
    """
    A recipe for a sample of `crop` x `crop` px: views, later ones over earlier ones, then flips, then `rot90` quarter turns
    counter-clockwise.

    `photometric_seed` and `shift_seed` seed the change of colours and their shift, which come last; None leaves the colours.
    """

    crop: int
    views: tuple[View, ...]
    flip_h: bool = False
    flip_v: bool = False
    rot90: int = 0
    photometric_seed: int | None = None
    shift_seed: int | None = None


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """`(H, W)` in px of a tile resized by `scale`, rounded, at least 1."""
    return max(1, round(height * scale)), max(1, round(width * scale))


class Resampler:
    """
    One view of a tile of `height` x `width` px.

    `window` is the part of the source that is needed; the methods take exactly its pixels and return the view.
    """

    def __init__(self, view: View, height: int, width: int) -> None:
        scaled_height, scaled_width = scaled_size(height, width, view.scale)
        self._rows = _Axis(view.top, view.height, height, scaled_height)
        self._columns = _Axis(view.left, view.width, width, scaled_width)
        self.window: Window = (self._rows.first, self._columns.first, self._rows.count, self._columns.count)

    def image(self, pixels_hwB: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The view, uint8 `(height, width, B)`, bilinear and rounded; padding mirrors the resized tile. May not be a copy."""
        self._check(pixels_hwB.shape[:2])
        values = self._interpolated(pixels_hwB)
        return values if values.dtype == np.uint8 else np.rint(values).astype(np.uint8)

    def mask(self, labels_hw: NDArray[np.int32], ignore_index: int) -> NDArray[np.int32]:
        """The view, int32 `(height, width)`, nearest pixel; padding is `ignore_index`."""
        self._check(labels_hw.shape)
        labels = np.full((len(self._rows.inside), len(self._columns.inside)), ignore_index, dtype=np.int32)
        rows, columns = self._rows.nearest, self._columns.nearest
        labels[: len(rows), : len(columns)] = labels_hw[rows].take(columns, axis=1)
        return labels

    def target(self, probs_Chw: NDArray[np.float32]) -> NDArray[np.float32]:
        """The view, float32 `(C, height, width)`, bilinear, which keeps sums over axis 0; padding is 0."""
        self._check(probs_Chw.shape[1:])
        # Class by class, while each is in the processor's cache.
        values_CHW = np.stack([self._interpolated(probs_hw) for probs_hw in probs_Chw])
        values_CHW[:, ~self._rows.inside] = 0
        values_CHW[:, :, ~self._columns.inside] = 0
        return values_CHW

    def inside(self, data_hw: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
        """
        True where the view shows the tile, False over padding: bool `(height, width)`.

        `data_hw` says which pixels hold data, None that all do. A pixel of the view that is interpolated from one without data,
        however small its share, is not inside: neither its colour nor its target means anything.
        """
        inside_HW = self._rows.inside[:, None] & self._columns.inside[None, :]
        if data_hw is not None:
            self._check(data_hw.shape)
            inside_HW &= self._interpolated((~data_hw).view(np.uint8)) == 0
        return inside_HW

    def _interpolated(self, values_hw: NDArray[Any]) -> NDArray[Any]:
        """The interpolated view, of rows, columns and perhaps a third axis; keeps the dtype if no pixel lies between two."""
        values_Hw = self._rows.interpolate(values_hw)
        if self._columns.is_whole:
            return values_Hw
        return transposed(self._columns.interpolate(transposed(values_Hw)))

    def _check(self, found: tuple[int, ...]) -> None:
        assert tuple(found) == self.window[2:], f"expected the pixels of window {self.window}, found {found}"


def orient(array: NDArray[Any], plan: Plan) -> NDArray[Any]:
    """The array flipped and turned as in `plan` along its first two of at most three axes; contiguous."""
    rows, columns = 0, 1
    if plan.rot90 % 2:  # a quarter turn is a transposition, which swaps rows and columns, and a flip
        array, rows, columns = transposed(array), 1, 0
    if plan.flip_h != (plan.rot90 in (1, 2)):
        array = np.flip(array, columns)
    if plan.flip_v != (plan.rot90 in (2, 3)):
        array = np.flip(array, rows)
    return np.ascontiguousarray(array)


def transposed(array: NDArray[Any]) -> NDArray[Any]:
    """The array with its first two of at most three axes swapped; contiguous. OpenCV takes an eighth of NumPy's time."""
    import cv2  # takes 0.1 s

    height, width, *rest = array.shape
    if array.itemsize * math.prod(rest) not in _TRANSPOSED_BYTES:
        return np.ascontiguousarray(array.swapaxes(0, 1))
    # As bytes, because OpenCV would convert other types.
    pixels = np.ascontiguousarray(array).view(np.uint8).reshape(height, width, -1)
    turned: NDArray[Any] = cv2.transpose(pixels).reshape(width, height, -1).view(array.dtype)
    return turned.reshape(width, height, *rest)


class _Axis:
    """
    Rows or columns `start .. start + length` of a tile that was resized from `source` to `scaled` px.

    The centre of pixel i of the resized axis lies at `(i + 1/2) * source / scaled - 1/2` in the source. Positions are integers in
    units of `1 / (2 * scaled)` px, so that the nearest pixel is never off by a rounding error.
    """

    def __init__(self, start: int, length: int, source: int, scaled: int) -> None:
        assert length >= 1, "an empty view"
        assert 0 <= start < scaled, f"a view from {start} of a resized tile of {scaled} px"
        positions = np.arange(start, start + length)
        self.inside = positions < scaled
        # Mirrored with the border pixel repeated, as often as needed: defined for any length, even for a tile of 1 px.
        positions %= 2 * scaled
        positions = np.where(positions < scaled, positions, 2 * scaled - 1 - positions)
        lower, rest = np.divmod((2 * positions + 1) * source - scaled, 2 * scaled)
        upper = np.minimum(lower + (rest > 0), source - 1)
        lower = np.maximum(lower, 0)
        self.first = int(lower.min())
        self.count = int(upper.max()) - self.first + 1
        self._lower, self._upper = lower - self.first, upper - self.first
        self._upper_share = (rest / (2 * scaled)).astype(np.float32)
        self._on_pixels = np.array_equal(lower, upper)
        self.is_whole = self._on_pixels and np.array_equal(self._lower, np.arange(self.count))
        nearest = (2 * positions + 1) * source // (2 * scaled) - self.first
        self.nearest = nearest[self.inside]

    def interpolate(self, values: NDArray[Any]) -> NDArray[Any]:
        """Float32 values between neighbours along the first axis; keeps the dtype if no pixel lies between two."""
        if self.is_whole:
            return values
        lower = values.take(self._lower, axis=0)
        if self._on_pixels:
            return lower
        share = self._upper_share.reshape(-1, *[1] * (values.ndim - 1))
        upper = values.take(self._upper, axis=0).astype(np.float32, copy=False)
        upper *= share
        result: NDArray[np.float32] = lower.astype(np.float32, copy=False)
        result *= 1 - share
        result += upper
        return result
