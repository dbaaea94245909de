"""
Peak memory of stage one, by the number of tiles and by the size of a scene that is predicted in windows.

    python tests/benchmarks/memory.py [--json FILE]

Runs `kdpipe precompute-teacher` on generated images with a small network and reports the peak of the process. A scene is one
image predicted with `teacher.window: 256`; one row of windows is held at a time, so that width counts a little and height should not. The
network is as confident as a trained one, and differently at every pixel, so that its predictions hardly compress.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import rasterio
import torch
import yaml
from rasterio.errors import NotGeoreferencedWarning

from kdpipe.pipeline.models.smp import create_smp_model

warnings.simplefilter("ignore", NotGeoreferencedWarning)
TILES, TILE_PX = (8, 32, 128), 256
SCENES_PX = (4096, 4096), (16384, 4096), (4096, 8192)  # height and width: the first, four times as high, twice as wide
SURE = 100  # factor on the weights of the random head
CONFIG = {
    "name": "memory", "group": "benchmark", "seed": 1,
    "classes": {"names": ["a", "b", "c", "d", "e", "f"]},
    "data": {"train": ["Scenes"], "allow_missing_masks": True},
    "teacher": {"architecture": "linknet", "encoder": "tu-regnetx_002", "checkpoint": "teacher.pth", "classes": list("abcdefgh")},
    "class_map": {name: {name if name in "abcdef" else "a": 1} for name in "abcdefgh"},
    "cache": {"path": "cache.zarr"},
    "student": {"architecture": "unet", "encoder": "mobilenet_v2"},
}  # fmt: skip


def write_image(path: Path, height: int, width: int, seed: int) -> None:
    """An uncompressed TIFF of noise on a ramp, written band by band."""
    rng = np.random.default_rng(seed)
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=3, dtype="uint8", tiled=True
    ) as raster:
        for top in range(0, height, 256):
            rows = min(256, height - top)
            ramp = np.linspace(0, 200, width)[None, None] + rng.integers(0, 50, (3, rows, width))
            raster.write(ramp.astype(np.uint8), window=((top, top + rows), (0, width)))


def peak_mb(folder: Path, count: int, height: int, width: int, window: int | None) -> float:
    """Peak MB of the command over `count` images in a new folder."""
    images = folder / "Scenes" / "images"
    images.mkdir(parents=True)
    for i in range(count):
        write_image(images / f"s{i:04d}.tif", height, width, i)
    torch.manual_seed(0)
    weights = create_smp_model("linknet", "tu-regnetx_002", 8, key="teacher").state_dict()
    weights["segmentation_head.0.weight"] *= SURE
    torch.save(weights, folder / "teacher.pth")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    window_options = ["--set", f"teacher.window={window}"] if window else []
    command = [sys.executable, "-m", "kdpipe.pipeline", "precompute-teacher", "-c", "config.yaml", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, *window_options], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, output
    return usage.ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tiles, scenes = {}, {}
    for count in TILES:
        with tempfile.TemporaryDirectory() as folder:
            tiles[count] = peak_mb(Path(folder), count, TILE_PX, TILE_PX, None)
        print(f"{count:5} tiles of {TILE_PX} px          {tiles[count]:8.0f} MB")
    for height, width in SCENES_PX:
        with tempfile.TemporaryDirectory() as folder:
            scenes[f"{height} x {width}"] = peak_mb(Path(folder), 1, height, width, 256)
        print(f"one scene of {height:5} x {width:4} px, window 256 {scenes[f'{height} x {width}']:6.0f} MB")
    first, high, wide = scenes.values()
    if options.json:
        result = {
            "tiles_mb": tiles,
            "scenes_mb": scenes,
            "high_against_first": high / first,
            "wide_against_first": wide / first,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
