"""
The ground of the generated landscape, and its aerial image.

Layers from bottom to top: rangeland, fields, bare ground, woods and hedges, water, settlements with streets and roofs, roads,
clouds. Each layer writes its class into `truth` and its colours into `colour`. Season, sun, haze, colour cast and blur are drawn
once per tile, and the palettes of the classes overlap, so that colour alone does not separate the classes.

Not covered: errors of annotators, which are in `labels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from kdpipe.data.landscape.brushes import (
    Bools,
    Field,
    Points,
    corners,
    curve,
    fractal_noise,
    highest,
    parcels,
    polygons,
    rotated_coordinates,
    shifted,
    stroke,
)

TEACHER_CLASSES = ("Tree", "Rangeland", "Cropland", "Developed", "Road", "Bareland", "Water", "Background")
TREE, RANGELAND, CROPLAND, DEVELOPED, ROAD, BARELAND, WATER, BACKGROUND = range(8)

# Reflectances (R, G, B) from 0 to 1, eyeballed on orthophotos of temperate farmland.
GRASS = ((0.36, 0.42, 0.28), (0.49, 0.46, 0.32))  # moist, dry
CANOPY = ((0.17, 0.28, 0.13), (0.30, 0.27, 0.13))  # summer, autumn
SOIL = ((0.76, 0.69, 0.58), (0.62, 0.50, 0.41))  # gravel, earth
STREAM = ((0.13, 0.23, 0.30), (0.31, 0.36, 0.34))  # clear, silty
PAVING = ((0.47, 0.47, 0.48), (0.63, 0.57, 0.46))  # asphalt, gravel
CROPS = (
    (0.33, 0.50, 0.17),  # young grain
    (0.25, 0.40, 0.14),  # maize
    (0.74, 0.70, 0.24),  # rape in flower
    (0.74, 0.62, 0.34),  # ripe grain
    (0.50, 0.39, 0.29),  # ploughed
    (0.66, 0.58, 0.38),  # stubble
    (0.39, 0.49, 0.22),  # clover, much like grass
)
ROOFS = ((0.62, 0.34, 0.25), (0.46, 0.46, 0.48), (0.82, 0.81, 0.79), (0.27, 0.26, 0.27), (0.55, 0.45, 0.36))


@dataclass(frozen=True)
class Scene:
    """
    One tile without labelling errors.

    `image` uint8 `(H, W, 3)`; `truth` uint8 `(H, W)`, indices into `TEACHER_CLASSES`; `shrubs` bool `(H, W)`, True where rangeland
    is overgrown: about 30 % of it, in patches.
    """

    image: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    shrubs: Bools


def paint_scene(height: int, width: int, rng: np.random.Generator) -> Scene:
    """A new piece of land of `(height, width)` pixels; the same generator state gives the same scene."""
    canvas = _Canvas(height, width, rng)
    shrub_cover = canvas.noise(45, 3)
    canvas.lay_rangeland(shrub_cover)
    canvas.lay_fields()
    canvas.lay_bare_ground()
    canvas.lay_woods()
    canvas.lay_water()
    canvas.lay_settlements_and_roads()
    canvas.light()
    canvas.lay_clouds()
    image = canvas.photograph()
    rangeland = canvas.truth == RANGELAND
    limit = np.quantile(shrub_cover[rangeland], 0.7) if rangeland.any() else 0.0
    return Scene(image, canvas.truth, np.asarray(shrub_cover > limit, dtype=np.bool_))


class _Canvas:
    """A tile in the making: `truth` uint8 `(H, W)`, `colour` float32 `(H, W, 3)`, `tall` float32 `(H, W)` in pixels."""

    def __init__(self, height: int, width: int, rng: np.random.Generator) -> None:
        self.height, self.width, self.rng = height, width, rng
        self.season = rng.uniform(0, 1)  # 0 early summer, 1 dry autumn
        self.sun = rng.uniform(0, 2 * np.pi)
        self.truth = np.full((height, width), RANGELAND, dtype=np.uint8)
        self.colour = np.zeros((height, width, 3), dtype=np.float32)
        self.tall = np.zeros((height, width), dtype=np.float32)
        self.relief = self.noise(110, 5)

    def noise(self, cell_px: float, octaves: int = 4) -> Field:
        return fractal_noise(self.height, self.width, self.rng, cell_px=cell_px, octaves=octaves)

    def mixed(self, pair: tuple[tuple[float, ...], tuple[float, ...]], share: float | Field) -> Field:
        """The colour between `pair[0]` and `pair[1]` at `share`, 0 to 1, with an error drawn per tile: `(3,)` or `(H, W, 3)`."""
        first, second = (np.array(colour) + self.rng.normal(0, 0.025, 3) for colour in pair)
        share_last = np.clip(np.asarray(share), 0, 1)[..., None]
        return np.asarray(first + share_last * (second - first), dtype=np.float32)

    def lay(self, where: Bools, label: int, colour: Field, texture: Field, tall: float = 0.0) -> None:
        """Cover `where` with class `label` and `colour` `(3,)` or `(H, W, 3)`, brighter by `texture` `(H, W)`."""
        self.truth[where] = label
        painted = np.broadcast_to(colour, self.colour.shape) * (1 + texture[..., None])
        self.colour[where] = painted[where]
        self.tall[where] = tall

    def lay_rangeland(self, shrub_cover: Field) -> None:
        dryness = self.season + 0.25 * self.relief + 0.15 * shrub_cover
        bushes = self.noise(6, 2) * np.clip(0.5 + 0.9 * shrub_cover, 0.1, 2)
        everywhere = np.ones(self.truth.shape, dtype=np.bool_)
        self.lay(everywhere, RANGELAND, self.mixed(GRASS, dryness), 0.05 * self.noise(10) + 0.07 * bushes)

    def lay_fields(self) -> None:
        rng = self.rng
        length_px, width_px = rng.uniform(70, 120), rng.uniform(40, 75)
        plots = parcels(self.height, self.width, rng, length_px=length_px, width_px=width_px)
        farmed = highest(self.noise(130, 2), rng.uniform(0.45, 0.85))
        share_farmed = np.bincount(plots.index[farmed], minlength=plots.count) / np.bincount(plots.index.ravel())
        tilled = (share_farmed > 0.5) & (rng.uniform(size=plots.count) < 0.85)
        crops = np.array(CROPS, dtype=np.float32)[rng.integers(0, len(CROPS), (plots.count, 2))]
        crops += rng.normal(0, 0.025, (plots.count, 2, 3)).astype(np.float32)
        strip = rng.uniform(14, 30, plots.count).astype(np.float32)[plots.index]
        odd = (np.floor(plots.across / strip).astype(np.int64) % 2) * (rng.uniform(size=plots.count) < 0.3)[plots.index]
        turned = (rng.uniform(size=plots.count) < 0.4)[plots.index]
        drill = np.where(turned, plots.along, plots.across) * rng.uniform(1.0, 2.2, plots.count)[plots.index]
        rows = rng.uniform(0.05, 0.14, plots.count)[plots.index] * np.sin(drill + 0.8 * self.noise(30, 2))
        growth = rng.uniform(0.02, 0.09, plots.count)[plots.index] * self.noise(28)
        field = tilled[plots.index] & (plots.border_px > 0.8)
        self.lay(field, CROPLAND, crops[plots.index, odd], (rows + growth).astype(np.float32))
        hedge = (plots.border_px < 2.2) & highest(self.noise(50, 2), rng.uniform(0.05, 0.3))
        self.plant(hedge & (share_farmed > 0.3)[plots.index], 3.0)

    def lay_bare_ground(self) -> None:
        pits = highest(self.noise(80, 4), self.rng.uniform(0.08, 0.24))
        stones = 0.12 * self.noise(5, 3) + 0.05 * self.relief
        self.lay(pits, BARELAND, self.mixed(SOIL, 0.5 + 0.5 * self.noise(40)), stones)

    def plant(self, where: Bools, tall: float) -> None:
        """Plant trees on `where`: crowns are bumps of noise, lit by the sun."""
        crowns = self.noise(7, 3)
        dx, dy = round(1.6 * np.cos(self.sun)), round(1.6 * np.sin(self.sun))
        lit = crowns - shifted(crowns, -dx, -dy)
        turning = 0.55 * self.season + 0.22 * self.noise(25, 3)
        self.lay(where, TREE, self.mixed(CANOPY, turning), np.clip(0.14 * crowns + 0.16 * lit, -0.7, 0.7), tall)

    def lay_woods(self) -> None:
        share = self.rng.uniform(0.1, 0.28)
        self.plant(highest(self.noise(110, 5) + 0.4 * self.relief, share), 5.0)
        self.plant(highest(self.noise(16, 2), self.rng.uniform(0.002, 0.01)), 3.0)

    def lay_water(self) -> None:
        rng, size = self.rng, np.array([self.width, self.height], dtype=np.float64)
        wet = np.zeros(self.truth.shape, dtype=np.bool_)
        if rng.uniform() < 0.55:
            start, end = _across(size, rng)
            course = stroke(self.height, self.width, curve(start, end, rng, bend=0.12), rng.uniform(6, 16))
            bank = _blurred(course, 4) + 0.10 * self.noise(14, 3)
            shingle = (bank > 0.2) & highest(self.noise(30, 3), 0.35)
            self.lay(shingle, BARELAND, self.mixed(SOIL, rng.uniform()), 0.08 * self.noise(4, 2))
            wet |= bank > 0.42
        if rng.uniform() < 0.6:
            wet |= highest(self.noise(90, 3) - 0.5 * self.relief, rng.uniform(0.02, 0.1))
        ripples = 0.05 * self.noise(6, 2) * rng.uniform(0.2, 1.5) + 0.06 * self.noise(60, 2)
        self.lay(wet, WATER, self.mixed(STREAM, rng.uniform() + 0.15 * self.noise(70, 2)), ripples)

    def lay_settlements_and_roads(self) -> None:
        rng, size = self.rng, np.array([self.width, self.height], dtype=np.float64)
        centres = [size * rng.uniform(0.12, 0.88, 2) for _ in range(rng.integers(1, 4))]
        ways = [curve(centres[0], end, rng, bend=0.1) for end in _across(size, rng, centres[0])]
        ways += [curve(a, b, rng, bend=0.2) for a, b in pairwise(centres)]
        for centre in centres:
            self.settle(centre, rng.uniform(18, 46))
        for way in ways:
            road = stroke(self.height, self.width, way, rng.uniform(3, 6))
            self.lay(road, ROAD, self.mixed(PAVING, rng.uniform()), 0.05 * self.noise(5, 2))

    def settle(self, centre: Points, radius_px: float) -> None:
        """Build a village around `centre` (x, y): yards, gardens, streets, houses with two-sided roofs, trees."""
        rng, angle, block = self.rng, self.rng.uniform(0, np.pi), self.rng.uniform(24, 34)
        u, v = rotated_coordinates(self.height, self.width, angle)
        cu, cv = (axis @ centre for axis in ([np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]))
        distance = np.hypot(u - cu, v - cv) / radius_px + 0.18 * self.noise(30, 3)
        built = (distance < 1) & (self.truth != WATER)
        garden = self.mixed((PAVING[0], GRASS[0]), 0.4 + 0.35 * self.noise(14, 3))
        self.lay(built, DEVELOPED, garden, 0.08 * self.noise(5, 2))
        street = ((np.abs((u - cu) % block) < 2.4) | (np.abs((v - cv) % (1.6 * block)) < 2.4)) & built
        outlines, colours = [], [(0.0, 0.0, 0.0)]
        for du in np.arange(-radius_px, radius_px, block / 2) + block / 4 + 1.2:
            for dv in np.arange(-radius_px, radius_px, 11.0):
                if rng.uniform() < 0.25:
                    continue
                middle = np.array([cu + du, cv + dv]) + rng.normal(0, 0.8, 2)
                where = middle[0] * np.array([np.cos(angle), np.sin(angle)]) + middle[1] * np.array(
                    [-np.sin(angle), np.cos(angle)]
                )
                long, wide, turn = rng.uniform(7, 11), rng.uniform(5, 8), angle + rng.normal(0, 0.08)
                half = where + wide / 4 * np.array([-np.sin(turn), np.cos(turn)])
                roof = np.array(ROOFS[rng.integers(len(ROOFS))]) + rng.normal(0, 0.04, 3)
                outlines += [corners(where, (long, wide), turn), corners(half, (long, wide / 2), turn)]
                colours += [tuple(roof), tuple(roof * (1 + 0.22 * np.cos(self.sun - turn)))]
        houses = polygons(self.height, self.width, outlines)
        standing = (houses > 0) & (distance < 0.97) & built & ~street
        self.plant(built & ~standing & ~street & highest(self.noise(8, 2), 0.12), 3.0)
        self.lay(standing, DEVELOPED, np.array(colours, dtype=np.float32)[houses], 0.03 * self.noise(3, 1), 3.0)
        self.lay(street, ROAD, self.mixed(PAVING, 0.3 * rng.uniform()), 0.04 * self.noise(5, 2))

    def light(self) -> None:
        """Cast shadows of tall objects, and shade slopes."""
        shade = np.zeros(self.truth.shape, dtype=np.float32)
        for step in (1, 2, 3):
            above = shifted(self.tall, round(-step * np.cos(self.sun)), round(-step * np.sin(self.sun)))
            shade = np.maximum(shade, ((above - self.tall) >= step).astype(np.float32))
        slope = self.relief - shifted(self.relief, round(3 * np.cos(self.sun)), round(3 * np.sin(self.sun)))
        self.colour *= (1 - 0.5 * shade + np.clip(0.25 * slope, -0.12, 0.12))[..., None]

    def lay_clouds(self) -> None:
        """Lay clouds, which are Background where they are dense, with shadows that change no class; and at times a strip without image."""
        rng = self.rng
        if rng.uniform() < 0.6:
            vapour = self.noise(75, 5)
            limit = np.quantile(vapour, 1 - rng.uniform(0.03, 0.12))
            density = np.clip((vapour - limit) / 0.5 + 0.5, 0, 1)
            dark = shifted(density, round(-14 * np.cos(self.sun)), round(-14 * np.sin(self.sun)))
            self.colour *= 1 - 0.3 * dark[..., None]
            white = (0.86 + 0.05 * self.noise(20, 3))[..., None] * np.array([0.97, 0.98, 1.0], dtype=np.float32)
            self.colour += density[..., None] * (white - self.colour)
            self.truth[density > 0.5] = BACKGROUND
        if rng.uniform() < 0.2:
            u, _ = rotated_coordinates(self.height, self.width, rng.uniform(0, 2 * np.pi))
            self.lay(highest(u, rng.uniform(0.02, 0.07)), BACKGROUND, np.zeros(3, np.float32), np.zeros_like(u))

    def photograph(self) -> NDArray[np.uint8]:
        """The image, uint8 `(H, W, 3)`, with haze, colour cast, exposure, blur and sensor noise drawn once per tile."""
        rng = self.rng
        haze = rng.uniform(0.0, 0.15)
        air = np.array([0.66, 0.70, 0.76])
        seen = self.colour * (1 - haze) + haze * air
        seen *= rng.uniform(0.85, 1.12) * rng.uniform(0.95, 1.05, 3)
        seen = np.clip(seen, 0, 1) ** rng.uniform(0.85, 1.2)
        sharp = Image.fromarray(np.rint(255 * seen).astype(np.uint8), mode="RGB")
        blurred = np.asarray(sharp.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 0.9))), dtype=np.float32)
        grain = rng.normal(0, rng.uniform(2, 5), blurred.shape)
        return np.clip(np.rint(blurred + grain), 0, 255).astype(np.uint8)


def _across(size: Points, rng: np.random.Generator, through: Points | None = None) -> tuple[Points, Points]:
    """Two points (x, y) outside a tile of `size` (width, height), on a line through a point in it."""
    middle = size * rng.uniform(0.25, 0.75, 2) if through is None else through
    angle = rng.uniform(0, np.pi)
    reach = float(np.hypot(*size)) * np.array([np.cos(angle), np.sin(angle)])
    return middle - reach, middle + reach


def _blurred(mask: Bools, radius_px: float) -> Field:
    """`mask` smoothed by a Gaussian, float32 `(H, W)`, 0 to 1."""
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius_px)), dtype=np.float32) / np.float32(255)
