"""
How much memory does stage one take, against the number of tiles and against the size of a scene that is asked in windows?

    python tests/benchmarks/memory.py [--json FILE]

Runs `kdpipe precompute-teacher` on generated images with a small network and reports the peak of the process. A scene is one
image of 1,024 to 8,192 px a side with `teacher.window: 256`; what a pixel costs is the slope between the two largest.
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

from kdpipe.pipeline.models.smp_models import create_smp_model

warnings.simplefilter("ignore", NotGeoreferencedWarning)
TILES, TILE_PX = (8, 32, 128), 256
SCENES_PX = (1024, 2048, 4096, 8192)
CONFIG = {
    "name": "memory", "group": "benchmark", "seed": 1,
    "classes": {"names": ["a", "b", "c", "d", "e", "f"]},
    "data": {"train": ["Scenes"], "allow_missing_masks": True},
    "teacher": {"architecture": "linknet", "encoder": "tu-regnetx_002", "checkpoint": "teacher.pth", "classes": list("abcdefgh")},
    "class_map": {name: {name if name in "abcdef" else "a": 1} for name in "abcdefgh"},
    "cache": {"path": "cache.zarr"},
    "student": {"architecture": "unet", "encoder": "mobilenet_v2"},
}  # fmt: skip


def write_image(path: Path, side: int, seed: int) -> None:
    """An uncompressed TIFF of noise on a ramp, written band by band."""
    rng = np.random.default_rng(seed)
    with rasterio.open(
        path, "w", driver="GTiff", width=side, height=side, count=3, dtype="uint8", tiled=True
    ) as raster:
        for top in range(0, side, 256):
            ramp = np.linspace(0, 200, side)[None, None] + rng.integers(0, 50, (3, 256, side))
            raster.write(ramp.astype(np.uint8), window=((top, top + 256), (0, side)))


def peak_mb(folder: Path, count: int, side: int, window: int | None) -> float:
    """MB of the command over `count` images of `side` px in a new folder."""
    images = folder / "Scenes" / "images"
    images.mkdir(parents=True)
    for i in range(count):
        write_image(images / f"s{i:04d}.tif", side, i)
    torch.manual_seed(0)
    torch.save(create_smp_model("linknet", "tu-regnetx_002", 8, key="teacher").state_dict(), folder / "teacher.pth")
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
            tiles[count] = peak_mb(Path(folder), count, TILE_PX, None)
        print(f"{count:5} tiles of {TILE_PX} px          {tiles[count]:8.0f} MB")
    for side in SCENES_PX:
        with tempfile.TemporaryDirectory() as folder:
            scenes[side] = peak_mb(Path(folder), 1, side, 256)
        print(f"one scene of {side:5} px, window 256 {scenes[side]:6.0f} MB")
    (small, less), (large, more) = list(scenes.items())[-2:]
    slope = (more - less) * 1e6 / (large**2 - small**2)
    print(f"{slope:.1f} bytes a pixel of a scene")
    if options.json:
        result = {"tiles_mb": tiles, "scenes_mb": scenes, "bytes_per_scene_px": slope}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
