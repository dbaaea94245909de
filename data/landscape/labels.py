"""
Labels of the generated landscape, and folders of its tiles; `ground` paints the land.

Labels have the errors of real ones: outlines a pixel or two off the edge, regions mistaken for others, parts never labelled. A
perfect model therefore does not score 100 %. Student labels follow the class map of the project's guide; rangeland becomes
Grassland where it is open and SemiNatural where it is overgrown, 70 to 30.

Not covered: geography (no coordinates, no scale), and more realism than it takes to challenge a small network.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdpipe.configs.errors import ConfigError, DataError
from kdpipe.configs.files import make_folder, write_file
from kdpipe.configs.outputs import output_path
from kdpipe.data.landscape.brushes import Bools, corners, displaced, fractal_noise, highest, polygons
from kdpipe.data.landscape.ground import (
    BARELAND,
    CROPLAND,
    DEVELOPED,
    RANGELAND,
    ROAD,
    TEACHER_CLASSES,
    TREE,
    WATER,
    paint_scene,
)

__all__ = [
    "IGNORE_INDEX",
    "STUDENT_CLASSES",
    "TEACHER_CLASSES",
    "Landscape",
    "SampleData",
    "generate_landscape",
    "to_student_classes",
    "write_sample_data",
]

STUDENT_CLASSES = ("Background", "Forest", "Grassland", "Cropland", "Settlement", "SemiNatural")
IGNORE_INDEX = 255

# Teacher class -> student class. Overgrown rangeland is the exception: see `to_student_classes`.
STUDENT_OF = {
    "Tree": "Forest",
    "Rangeland": "Grassland",
    "Cropland": "Cropland",
    "Developed": "Settlement",
    "Road": "Settlement",
    "Bareland": "SemiNatural",
    "Water": "Background",
    "Background": "Background",
}

# What a tired annotator mistakes a class for.
MISTAKEN_FOR = {
    TREE: RANGELAND,
    RANGELAND: CROPLAND,
    CROPLAND: RANGELAND,
    DEVELOPED: BARELAND,
    ROAD: DEVELOPED,
    BARELAND: CROPLAND,
    WATER: TREE,
}
MISTAKEN_SHARE = 0.03  # of the area: shows in the scores, and is small compared with the classes
WOBBLE_PX = 0.8  # standard deviation of an outline's distance from the edge; roads are 3 to 6 px wide

SPLITS = ("Train", "Val", "Unlabelled", "Teacher")  # the position seeds the tiles of a split: append only
MARKER = "sample-data.json"
FORMAT_VERSION = 1
NETWORK_STRIDE = 32  # sides are never multiples, so that padding is exercised
SMALLEST_SIDE_PX = 64  # a smaller tile holds one field or one village at most


@dataclass(frozen=True)
class Landscape:
    """
    One tile.

    `image` uint8 `(H, W, 3)`; `teacher_mask` uint8 `(H, W)`, indices into `TEACHER_CLASSES`; `student_mask` uint8 `(H, W)`, indices
    into `STUDENT_CLASSES` or `IGNORE_INDEX`; `truth` uint8 `(H, W)`, the true teacher classes, which no model sees; `shrubs` bool
    `(H, W)`, True where rangeland counts as SemiNatural.
    """

    image: NDArray[np.uint8]
    teacher_mask: NDArray[np.uint8]
    student_mask: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    shrubs: Bools


@dataclass(frozen=True)
class SampleData:
    """The data that `write_sample_data` wrote: tiles and pixels by split, and bytes in total."""

    out_dir: str
    seed: int
    tiles: dict[str, int]
    pixels: dict[str, int]
    size_bytes: int


def generate_landscape(height: int, width: int, rng: np.random.Generator) -> Landscape:
    """
    A tile of `(height, width)` pixels; the same generator state gives the same tile (0.15 s for 256 x 256 on one core).

    Raises:
        ConfigError: a side is below `SMALLEST_SIDE_PX`.
    """
    if min(height, width) < SMALLEST_SIDE_PX:
        raise ConfigError(f"a tile needs sides of at least {SMALLEST_SIDE_PX} px, found {height} x {width}")
    scene = paint_scene(height, width, rng)
    teacher_mask = _drawn_by_hand(scene.truth, rng)
    student_mask = to_student_classes(teacher_mask, scene.shrubs)
    student_mask[_never_labelled(height, width, rng)] = IGNORE_INDEX
    return Landscape(scene.image, teacher_mask, student_mask, scene.truth, scene.shrubs)


def to_student_classes(teacher_mask: NDArray[np.uint8], shrubs: Bools) -> NDArray[np.uint8]:
    """
    `teacher_mask` in student classes, uint8 `(H, W)`: by `STUDENT_OF`, and SemiNatural for rangeland in `shrubs`.

    The map of the guide gives 70 % of Rangeland to Grassland and 30 % to SemiNatural; a label has to be one of them.
    """
    table = np.array([STUDENT_CLASSES.index(STUDENT_OF[name]) for name in TEACHER_CLASSES], dtype=np.uint8)
    student_mask = table[teacher_mask]
    student_mask[(teacher_mask == RANGELAND) & shrubs] = STUDENT_CLASSES.index("SemiNatural")
    return student_mask


def write_sample_data(
    out_dir: Path,
    seed: int = 0,
    *,
    train: int = 3,
    val: int = 8,
    unlabelled: int = 28,
    teacher: int = 48,
    side: tuple[int, int] = (190, 290),
) -> SampleData:
    """
    Write 8-bit PNG tiles to `{Train,Val,Unlabelled,Teacher}/images` and `masks` (none for Unlabelled), paired by stem.

    Masks of Train and Val hold student classes, and 255 for no label; those of Teacher hold teacher classes. A tile depends on the
    seed, `side`, its split and its number alone, so asking for more tiles does not change the others. The same call writes the
    same bytes with the same NumPy and Pillow. A folder written by an earlier call is replaced.

    Args:
        out_dir: a missing or empty folder, or one that this function wrote.
        seed: at least 0.
        train: number of labelled tiles for the student.
        val: number of labelled tiles for validation.
        unlabelled: number of tiles without a mask.
        teacher: number of tiles with teacher classes; more than `train`, so that the teacher knows more than the student's labels.
        side: smallest and largest side of a tile in pixels; multiples of 32 are never used.

    Raises:
        ConfigError: a negative number, or sides that leave no choice.
        DataError: `out_dir` is a file, holds files that this function did not write, or lies in a Python package.
    """
    counts = dict(zip(SPLITS, (train, val, unlabelled, teacher), strict=True))
    sides = [px for px in range(side[0], side[1] + 1) if px % NETWORK_STRIDE]
    if min(seed, *counts.values()) < 0:
        raise ConfigError(f"the seed and the numbers of tiles must not be negative, found seed {seed}, {counts}")
    if side[0] < SMALLEST_SIDE_PX or not sides:
        raise ConfigError(
            f"side needs {SMALLEST_SIDE_PX} <= smallest <= largest and not only a multiple of 32, found {side}"
        )
    files = [file for split in SPLITS for stem in range(counts[split]) for file in _files(split, stem)]
    _make_room(out_dir)
    _mark(out_dir, files, seed, complete=False)  # before the first tile, so that an interrupted call can be repeated
    pixels = dict.fromkeys(SPLITS, 0)
    for number, split in enumerate(SPLITS):
        for folder in ("images",) if split == "Unlabelled" else ("images", "masks"):
            (out_dir / split / folder).mkdir(parents=True, exist_ok=True)
        for tile in range(counts[split]):
            rng = np.random.default_rng([seed, number, tile])
            height, width = (int(px) for px in rng.choice(sides, 2))
            land = generate_landscape(height, width, rng)
            pixels[split] += height * width
            masks = [land.teacher_mask if split == "Teacher" else land.student_mask]
            for file, picture in zip(_files(split, tile), [land.image, *masks], strict=False):
                Image.fromarray(picture).save(out_dir / file)
    _mark(out_dir, files, seed, complete=True)
    size_bytes = sum((out_dir / file).stat().st_size for file in files)
    return SampleData(str(out_dir), seed, counts, pixels, size_bytes)


def _files(split: str, tile: int) -> list[str]:
    """The image and the mask (none for Unlabelled) of a tile, relative to the output folder."""
    name = f"{split.lower()}_{tile:03d}.png"
    folders = ["images"] if split == "Unlabelled" else ["images", "masks"]
    return [f"{split}/{folder}/{name}" for folder in folders]


def _mark(out_dir: Path, files: list[str], seed: int, *, complete: bool) -> None:
    record = {"format": FORMAT_VERSION, "seed": seed, "complete": complete, "files": files}
    write_file(out_dir / MARKER, json.dumps(record, indent=1) + "\n")


def _make_room(out_dir: Path) -> None:
    """Create `out_dir`, or delete what an earlier call wrote there; refuse a folder with anything else in it."""
    output_path(out_dir, "the folder of sample data")
    if out_dir.exists() and not out_dir.is_dir():
        raise DataError(f"sample data needs a folder, but {out_dir} is a file; name another")
    make_folder(out_dir)
    found = {path.relative_to(out_dir).as_posix() for path in out_dir.rglob("*") if not path.is_dir()}
    if not found:
        return
    if MARKER not in found:
        raise DataError(f"{out_dir} is not empty and has no {MARKER}; name an empty folder")
    strangers = found - {MARKER} - set(_listed(out_dir / MARKER))
    if strangers:
        raise DataError(
            f"{out_dir} holds files that sample data did not write: {min(strangers)}; move them, or name another folder"
        )
    for file in found:
        (out_dir / file).unlink()


def _listed(marker: Path) -> list[str]:
    try:
        return [str(file) for file in json.loads(marker.read_text(encoding="utf-8"))["files"]]
    except (ValueError, KeyError, TypeError) as err:
        raise DataError(
            f"{marker} should list the files of sample data, but cannot be read; delete the folder"
        ) from err


def _drawn_by_hand(truth: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """`truth`, uint8 `(H, W)`, with wobbling outlines, shifted a little to one side, and regions mistaken for others."""
    height, width = truth.shape
    offset = rng.normal(0, 0.5, 2)
    dx, dy = (WOBBLE_PX * fractal_noise(height, width, rng, cell_px=14, octaves=2) + o for o in offset)
    mask = displaced(truth, dx.astype(np.float32), dy.astype(np.float32))
    mistaken = highest(fractal_noise(height, width, rng, cell_px=22, octaves=2), MISTAKEN_SHARE)
    table = np.array([MISTAKEN_FOR.get(label, label) for label in range(len(TEACHER_CLASSES))], dtype=np.uint8)
    return np.where(mistaken, table[mask], mask)


def _never_labelled(height: int, width: int, rng: np.random.Generator) -> Bools:
    """True where labels are missing, bool `(H, W)`: one to three turned rectangles, and on half of the tiles a strip along an edge."""
    size = np.array([width, height], dtype=np.float64)
    shapes = [
        corners(size * rng.uniform(0, 1, 2), (rng.uniform(12, 40), rng.uniform(8, 24)), rng.uniform(0, np.pi))
        for _ in range(rng.integers(1, 4))
    ]
    bare: Bools = polygons(height, width, shapes) > 0
    strip_px = int(rng.integers(4, 13)) if rng.uniform() < 0.5 else 0
    quarter_turns = int(rng.integers(0, 4))
    np.rot90(bare, quarter_turns)[:strip_px] = True  # a view: writes into `bare`
    return bare
