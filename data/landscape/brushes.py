"""
The brushes of the generated landscape: smooth noise, parcels of land, curves, rectangles, displacement.

Fields are `(H, W)`; coordinates are pixels. All randomness comes from the generator that is passed in, in a fixed order, so that
one seed gives one image. Not covered: classes and colours, which are in `ground`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Field = NDArray[np.float32]
Bools = NDArray[np.bool_]
Points = NDArray[np.float64]

CURVE_POINTS = 48  # pieces of about 6 px on the largest tiles


def fractal_noise(
    height: int, width: int, rng: np.random.Generator, *, cell_px: float, octaves: int = 4, gain: float = 0.5
) -> Field:
    """
    A rough surface, float32 `(H, W)` with mean 0 and standard deviation 1.

    A sum of value noise: normal deviates on ever finer grids, interpolated bicubically (Ebert et al., Texturing and
    Modeling: A Procedural Approach, ch. 2, "lattice noises" and "fractional Brownian motion").

    Args:
        height: rows.
        width: columns.
        rng: source of the grids' values.
        cell_px: side of the coarsest grid's cells in pixels, about the size of the largest blobs.
        octaves: number of grids; cells halve from one to the next, down to one pixel.
        gain: amplitude of a grid relative to the previous one.
    """
    total = np.zeros((height, width), dtype=np.float32)
    for octave in range(octaves):
        cell = max(cell_px / 2**octave, 1.0)
        rows, cols = ceil(height / cell) + 2, ceil(width / cell) + 2
        grid = Image.fromarray(rng.standard_normal((rows, cols), dtype=np.float32))
        layer = grid.resize((round(cols * cell), round(rows * cell)), Image.Resampling.BICUBIC)
        total += np.float32(gain**octave) * np.asarray(layer, dtype=np.float32)[:height, :width]
    standard: Field = (total - total.mean()) / np.float32(max(float(total.std()), 1e-6))
    return standard


def highest(field: Field, share: float) -> Bools:
    """True at the highest values of `field`, on `share` (0 to 1) of the area: bool `(H, W)`."""
    if share <= 0:
        return np.zeros(field.shape, dtype=np.bool_)
    return np.asarray(field > np.quantile(field, 1 - share), dtype=np.bool_)


def rotated_coordinates(height: int, width: int, angle: float) -> tuple[Field, Field]:
    """Pixel coordinates along and across a direction: two float32 `(H, W)`; `angle` in radians from the rows."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


@dataclass(frozen=True)
class Parcels:
    """
    Land divided into convex pieces.

    `index` int64 `(H, W)`, 0 to `count` - 1; `border_px` float32 `(H, W)`, about the distance to the nearest border;
    `along` and `across` float32 `(H, W)`, the coordinates that the pieces are aligned with, in pixels.
    """

    index: NDArray[np.int64]
    count: int
    border_px: Field
    along: Field
    across: Field


def parcels(height: int, width: int, rng: np.random.Generator, *, length_px: float, width_px: float) -> Parcels:
    """
    Divide `(H, W)` into Voronoi cells of a jittered, rotated lattice of `length_px` x `width_px`.

    Each pixel takes its nearest seed among the nine lattice cells around it (Worley 1996, "A cellular texture basis function"); with
    this jitter the nearest two are always among them.
    """
    jitter = 0.3  # of a lattice cell: irregular, yet four-sided as fields are
    along, across = rotated_coordinates(height, width, rng.uniform(0, np.pi))
    wave = np.float32(0.04) * fractal_noise(height, width, rng, cell_px=2 * length_px, octaves=2)
    u, v = along / np.float32(length_px) + wave, across / np.float32(width_px) + wave
    column, row = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    column -= column.min() - 1
    row -= row.min() - 1
    u, v = u - np.floor(u.min()) + np.float32(1), v - np.floor(v.min()) + np.float32(1)
    lattice = (int(row.max()) + 2, int(column.max()) + 2)
    seed_u, seed_v = rng.uniform(0.5 - jitter, 0.5 + jitter, (2, *lattice)).astype(np.float32)
    nearest: Field = np.full((height, width), np.inf, dtype=np.float32)
    second, owner = nearest.copy(), np.zeros((height, width), dtype=np.int64)
    for step_row in (-1, 0, 1):
        for step_column in (-1, 0, 1):
            r, c = row + step_row, column + step_column
            distance = np.hypot(u - c - seed_u[r, c], v - r - seed_v[r, c])
            closer = distance < nearest
            second = np.where(closer, nearest, np.minimum(second, distance))
            nearest = np.where(closer, distance, nearest)
            owner = np.where(closer, r * lattice[1] + c, owner)
    kept, index = np.unique(owner, return_inverse=True)
    border_px = (second - nearest).astype(np.float32) * np.float32(min(length_px, width_px) / 2)
    return Parcels(index.reshape(height, width).astype(np.int64), len(kept), border_px, along, across)


def curve(start: Points, end: Points, rng: np.random.Generator, *, bend: float) -> Points:
    """
    A winding path between two points (x, y), float64 `(CURVE_POINTS, 2)`.

    Three sines across the straight line, zero at both ends; `bend` is the largest amplitude of the first as a share of the
    length.
    """
    t = np.linspace(0, 1, CURVE_POINTS)
    ahead = end - start
    amplitudes = bend * rng.uniform(-1, 1, 3) / np.array([1, 2, 3])
    sideways = sum(a * np.sin((k + 1) * np.pi * t) for k, a in enumerate(amplitudes))
    return np.asarray(start + t[:, None] * ahead + np.outer(sideways, [-ahead[1], ahead[0]]), dtype=np.float64)


def stroke(height: int, width: int, points: Points, thickness_px: float) -> Bools:
    """True on a line through `points` `(N, 2)` (x, y): bool `(H, W)`."""
    canvas = Image.new("L", (width, height))
    flat = [(float(x), float(y)) for x, y in points]
    ImageDraw.Draw(canvas).line(flat, fill=1, width=max(1, round(thickness_px)), joint="curve")
    return np.asarray(canvas, dtype=np.bool_)


def corners(centre: Points, size: tuple[float, float], angle: float) -> Points:
    """The corners (x, y) of a rectangle of `size` (length, width) turned by `angle` radians: float64 `(4, 2)`."""
    ahead = np.array([np.cos(angle), np.sin(angle)]) * size[0] / 2
    aside = np.array([-np.sin(angle), np.cos(angle)]) * size[1] / 2
    return np.array([centre + ahead + aside, centre + ahead - aside, centre - ahead - aside, centre - ahead + aside])


def polygons(height: int, width: int, outlines: list[Points]) -> NDArray[np.int32]:
    """Filled `outlines` (each `(N, 2)`, x and y), later over earlier: int32 `(H, W)`, 0 outside and n in the n-th, from 1."""
    canvas = Image.new("I", (width, height))
    draw = ImageDraw.Draw(canvas)
    for number, outline in enumerate(outlines, start=1):
        draw.polygon([(float(x), float(y)) for x, y in outline], fill=number)
    return np.asarray(canvas, dtype=np.int32)


def shifted(field: Field, dx: int, dy: int) -> Field:
    """`field` moved right by `dx` and down by `dy` pixels, with the edge repeated: float32 `(H, W)`."""
    height, width = field.shape
    rows = np.clip(np.arange(height) - dy, 0, height - 1)
    cols = np.clip(np.arange(width) - dx, 0, width - 1)
    return field[rows[:, None], cols[None, :]]


def displaced(mask: NDArray[np.uint8], dx: Field, dy: Field) -> NDArray[np.uint8]:
    """`mask` read at (x + dx, y + dy), at the nearest pixel, clipped at the edge: uint8 `(H, W)`."""
    height, width = mask.shape
    y, x = np.mgrid[0:height, 0:width]
    rows = np.clip(np.rint(y + dy).astype(np.int64), 0, height - 1)
    cols = np.clip(np.rint(x + dx).astype(np.int64), 0, width - 1)
    read: NDArray[np.uint8] = mask[rows, cols]
    return read
