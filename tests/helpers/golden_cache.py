"""How the caches below `golden/` were made: from integer arithmetic, which is the same on every machine."""

from pathlib import Path

import numpy as np
import pytest
from helpers import plain_reader

from kdpipe.cache import manifest
from kdpipe.cache.encoding.many_classes import levels_of
from kdpipe.cache.index.records import ImageDigest
from kdpipe.cache.manifest import Manifest
from kdpipe.cache.recipe import LogitsRecipe, Recipe, TeacherRecord
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.writer import open_writer

GOLDEN = Path(__file__).parents[1] / "golden" / "cache-4.0"
SIZES = {"Train/a": (1, 1), "Train/b.1": (70, 41), "Train/Süd 2": (3, 130), "Other/deep/c": (300, 257)}
CLASSES = {
    6: ["water", "forest", "meadow", "field"],
    8: ["water", "forest", "meadow"],
    16: ["water", "forest", "meadow", "field", "town"],
}
MANY = [f"class {number}" for number in range(40)]
BITS = {"4.0": (6, 8, 16), "2.0": (8, 16), "4.2": (8,), "2.2": (8,), "5.2": (8,), "6.0": (8,), "4.2-chunks": (8,)}
"""
The caches of each format version: 4 holds soft targets, 2 logits, 5 soft targets of many classes, and 6 an index (here of 4).

`4.2-chunks` has digests of chunks in its receipts, and the others are older.
"""
FOLDERS = {version: GOLDEN.with_name(f"cache-{version}") for version in BITS}
CACHES = [(version, bits) for version in BITS for bits in BITS[version]]


def classes_of(bits: int, version: str) -> list[str]:
    """The student's classes of a golden cache."""
    return MANY if version[0] == "5" else CLASSES[bits]


def probs(bits: int, height: int, width: int, version: str = "4.0") -> np.ndarray:
    """Soft targets, float32 `(C, H, W)`: ratios of small integers, and squares of 40 px where one class is certain."""
    num_classes = len(classes_of(bits, version))
    row, column = np.mgrid[:height, :width]
    weights = np.stack([
        1 + (row // (32 + c) * (c + 3) + column // (40 + c) + c) % (4 + c) for c in range(num_classes)
    ])  # fmt: skip
    certain = (row // 40 + column // 40) % 3 == 1
    one_hot = np.arange(num_classes)[:, None, None] == (row // 40) % num_classes
    weights = np.where(certain, one_hot, weights).astype(np.float32)
    return weights / weights.sum(axis=0)


def recipe(bits: int, version: str = "4.0") -> Recipe:
    """The recipe of the soft targets: one teacher up to 8 bits; at 16 two teachers, a stretch and a window."""
    added = (
        {"decoder": "pillow", "temperature_applied": "after class_map"} if version[2] == "2" or version == "6.0" else {}
    )
    classes = classes_of(bits, version)
    first = TeacherRecord(
        checkpoint_sha256="1" * 64, architecture="unet", encoder="resnet18", classes=["unknown", "wet", "green", "grey"],
        drop_channels=[0], weight=1.0, normalize_mean=[0.485, 0.456, 0.406], normalize_std=[0.229, 0.224, 0.225],
        precision="fp32", tta="none", scales=[1.0], window=None,
    )  # fmt: skip
    second = first.model_copy(update={"checkpoint_sha256": "2" * 64, "weight": 0.5, "tta": "d4", "window": 512})
    rows = [[0.0] * len(classes) for _ in range(3)]
    rows[0][0], rows[1][1], rows[1][2], rows[2][-1] = 1.0, np.float32(0.7).item(), np.float32(0.3).item(), 1.0
    return Recipe(
        teachers=[first, second] if bits == 16 else [first], bands=[4, 3, 2],
        stretch=None if bits < 16 else [[0.0, 3000.0], [1e-05, 2999.5], [0.0, 1e16]],
        classes=classes, class_map=rows, temperature=2.0, kind="soft", bits=bits, levels=levels_of(bits, len(classes)), key_row_px=64,
        chunk_px=256, **added,
    )  # fmt: skip


def logits(bits: int, height: int, width: int) -> np.ndarray:
    """Logits, float32 `(3, H, W)`: quarters, most within 10 of the largest, and squares of 40 px where one class is at -100."""
    row, column = np.mgrid[:height, :width]
    steps = np.stack([(row // (8 + c) * (c + 2) + column // (6 + c) * (bits // 8 + c)) % (30 + c) for c in range(3)])
    deep = ((row // 40 + column // 40) % 3 == 1) & (np.arange(3)[:, None, None] == 2)
    return np.where(deep, -100, steps / 4).astype(np.float32)


def logits_recipe(bits: int, version: str = "2.0") -> LogitsRecipe:
    """The recipe of the logits: that of the soft targets, without the fields that only those have."""
    free = {"classes", "class_map", "temperature", "temperature_applied", "levels", "key_row_px"}
    fields = recipe(bits, "4.2" if version == "2.2" else "4.0").model_dump(exclude=free)
    return LogitsRecipe.model_validate({**fields, "kind": "logits"})


def write(path: Path, bits: int, version: str = "4.0") -> Manifest:
    """Write the golden content with the current writer."""
    is_soft = version[0] != "2"
    made, values = (recipe(bits, version), probs) if is_soft else (logits_recipe(bits, version), logits)
    given = {"version": version} if is_soft else {}
    with (
        pytest.MonkeyPatch.context() as patch,
        open_writer(open_storage(str(path)), made, device="cpu", libraries={"kdpipe": "0.1.0"}) as writer,
    ):
        if version == "6.0":
            patch.setattr(manifest, "MAX_LISTED", 0)
        writer.begin()
        return writer.finish([
            writer.write(tile, values(bits, *size, **given), ImageDigest(size_bytes=number, sha256=f"{number:064x}"))
            for number, (tile, size) in enumerate(SIZES.items(), start=1)
        ])  # fmt: skip


def write_golden(folder: Path, version: str) -> None:
    """
    Make a golden folder of a format version.

    Raises `FileExistsError` where there is one: it is never regenerated. A later format version gets a folder of its own.
    """
    folder.mkdir(parents=True)
    expected = {}
    for bits in BITS[version]:
        write(folder / f"{bits}-bits.zarr", bits, version)
        cache = plain_reader.Cache(folder / f"{bits}-bits.zarr")
        expected |= {f"{bits}-{number}": cache.read(tile) for number, tile in enumerate(SIZES)}
    np.savez_compressed(folder / "expected.npz", **expected)
