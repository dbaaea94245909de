"""Public data sets in small: their folders, names, bands, types and codes as published, with random content and other sizes."""

from pathlib import Path

import numpy as np
import rasterio
from PIL import Image

SIDE = 72
LOVEDA_CODES = range(8)  # 0 is no data
# Red, green and blue of Potsdam's labels: impervious surface, building, low vegetation, tree, car, clutter.
POTSDAM_COLOURS = np.uint8([[255, 255, 255], [0, 0, 255], [0, 255, 255], [0, 255, 0], [255, 255, 0], [255, 0, 0]])
POTSDAM_TRAIN = [f"{row}_{column}" for row in range(2, 8) for column in range(7 if row > 5 else 10, 13)]
POTSDAM_VAL = "2_13,2_14,3_13,3_14,4_13,4_14,4_15,5_13,5_14,5_15,6_13,6_14,6_15,7_13".split(",")  # noqa: SIM905 - shorter


def squares(rng, count):
    """Indices 0 to `count` - 1 in squares of 9 px, so that every value occurs in the labels of a whole data set."""
    side = SIDE // 9
    return np.kron(rng.integers(0, count, (side, side)), np.ones((9, 9), dtype=int)).astype(np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def loveda(folder: Path) -> dict[str, np.ndarray]:
    """`LoveDA` as its three archives unpack; the codes of each training mask by the end of its path."""
    rng, codes = np.random.default_rng(0), {}
    for number, (split, scene) in enumerate((s, c) for s in ("Train", "Val", "Test") for c in ("Urban", "Rural")):
        for name in range(3 * number, 3 * number + 3):
            root = folder / "LoveDA" / split / scene
            save(root / f"images_png/{name}.png", rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
            if split != "Test":
                mask = squares(rng, len(LOVEDA_CODES))
                save(root / f"masks_png/{name}.png", mask)
                codes |= {f"{scene}/masks_png/{name}.png": mask} if split == "Train" else {}
    return codes


def potsdam(folder: Path) -> dict[str, np.ndarray]:
    """`potsdam` with 4-band GeoTIFFs, whose fourth band GDAL calls alpha, and masks of colours; the classes by the end of the path."""
    rng, classes = np.random.default_rng(0), {}
    for name in POTSDAM_TRAIN + POTSDAM_VAL:
        image = folder / f"potsdam/4_Ortho_RGBIR/top_potsdam_{name}_RGBIR.tif"
        mask = folder / f"potsdam/5_Labels_all/top_potsdam_{name}_label.tif"
        row, column = map(int, name.split("_"))
        place = rasterio.Affine(0.05, 0, 366676 + 300 * column, 0, -0.05, 5808000 - 300 * row)
        indices = squares(rng, len(POTSDAM_COLOURS))
        bands = rng.integers(0, 256, (4, SIDE, SIDE), dtype=np.uint8)
        colours = POTSDAM_COLOURS[indices].transpose(2, 0, 1)
        for path, values, options in ((image, bands, {"alpha": "YES"}), (mask, colours, {})):
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = {"count": len(values), "height": SIDE, "width": SIDE, "dtype": "uint8"}
            with rasterio.open(
                path, "w", driver="GTiff", photometric="RGB", crs="EPSG:32633", transform=place, **shape, **options
            ) as file:
                file.write(values)
        if name in POTSDAM_TRAIN:
            classes[f"5_Labels_all/top_potsdam_{name}_label.tif"] = indices
    return classes


def potsdam_by_mmseg(folder: Path) -> dict[str, np.ndarray]:
    """`data/potsdam` as mmsegmentation's converter writes it; the codes of each training mask by the end of its path."""
    rng, codes = np.random.default_rng(0), {}
    for split, scenes in (("train", POTSDAM_TRAIN[:3]), ("val", POTSDAM_VAL[:1])):
        for name in (f"{scene}_{left}_0_{left + 512}_512.png" for scene in scenes for left in (0, 512)):
            save(folder / f"data/potsdam/img_dir/{split}/{name}", rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
            mask = squares(rng, 7)
            save(folder / f"data/potsdam/ann_dir/{split}/{name}", mask)
            codes |= {f"ann_dir/{split}/{name}": mask} if split == "train" else {}
    return codes


def own_tiles(folder: Path) -> dict[str, np.ndarray]:
    """`tiles` with masks of six classes, as the configurations of teachers expect them."""
    rng, indices = np.random.default_rng(0), {}
    for split in ("Train", "Val"):
        for name in "abc":
            save(folder / f"tiles/{split}/images/{name}.png", rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
            mask = squares(rng, 6)
            save(folder / f"tiles/{split}/masks/{name}.png", mask)
            indices |= {f"masks/{name}.png": mask} if split == "Train" else {}
    return indices
