"""
Time and memory to open, quickly verify and resume a cache of very many tiny tiles.

    python tests/benchmarks/many_tiles.py /scratch/many --tiles 100000

Lays out a cache of 100 tiles and one of `--tiles` in a new folder, which it deletes in the end, and runs the same commands on
both: the difference is what the tiles cost. A folder that a killed run has left is emptied first, any other is refused. Images
are hard links to one, the tiles copies of one under receipts of their own, and nothing is synced while they are laid out: only
what is measured afterwards is as in use.
"""

import argparse
import fcntl
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TextIO

FEW = 100
SIDE = 32  # px of a tile
LINKS = 60_000  # ext4 allows 65,000 links to a file
SEAL = b"receipt_sha256"
MARK = ".many_tiles"  # a file that says whose the folder is, locked while a run goes on
CONFIG = {
    "name": "many", "group": "benchmark", "seed": 1,
    "classes": {"names": ["x", "y"]},
    "data": {"train": ["Many"], "allow_missing_masks": True},
    "teacher": {"architecture": "unet", "encoder": "mobilenet_v2", "checkpoint": "teacher.pth", "classes": ["a", "b"]},
    "class_map": {"a": {"x": 1}, "b": {"y": 1}},
    "cache": {"path": "cache.zarr"},
    "student": {"architecture": "unet", "encoder": "mobilenet_v2"},
}  # fmt: skip
KDPIPE = [sys.executable, "-m", "kdpipe.pipeline"]
OPEN = [sys.executable, "-c", "from kdpipe.cache import SoftTargetCache; SoftTargetCache.open('cache.zarr')"]


def lay_out(folder: Path, count: int) -> None:
    """Write a config, a teacher, images and their finished cache, in a separate process whose memory the commands do not inherit."""
    import numpy as np
    import torch
    import yaml
    from PIL import Image

    from kdpipe.pipeline.models.smp import create_smp_model

    images_folder = folder / "Many" / "images"
    images_folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(create_smp_model("unet", "mobilenet_v2", 2, key="teacher").state_dict(), folder / "teacher.pth")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    images = {f"Many/t{i:07d}": images_folder / f"t{i:07d}.png" for i in range(count)}
    for i, path in enumerate(images.values()):
        if i % LINKS == 0:
            first = path
            Image.fromarray(np.full((SIDE, SIDE, 3), 99, dtype=np.uint8)).save(first)
        else:
            os.link(first, path)
    os.chdir(folder)
    write("cache.zarr", images)


def write(path: str, images: dict[str, Path]) -> None:
    """Write the finished cache of identical images, without a sync and without the teacher."""
    import numpy as np

    from kdpipe.cache import codec
    from kdpipe.cache import tile as tile_module
    from kdpipe.cache.images import digest_image
    from kdpipe.cache.storage.base import open_storage
    from kdpipe.cache.writer import open_writer
    from kdpipe.configs import load_config
    from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
    from kdpipe.pipeline.versions import library_versions

    config = load_config("config.yaml")
    recipe = complete_recipe(config, None, None)
    probs_CHW = np.full((2, SIDE, SIDE), 0.5, dtype=np.float32)
    digest = digest_image(next(iter(images.values())))
    shard, template, one = tile_module.encode_tile(
        codec.encode(probs_CHW, recipe)[0], "ID", digest, recipe, np.zeros((1, 1))
    )
    blank = template.replace(json.loads(template)["attributes"]["kdpipe"][tile_module.SEAL].encode(), b"")
    before, after = blank.split(b'"ID"')
    records = []
    with open_writer(open_storage(path), recipe, device="cpu", libraries=library_versions()) as writer:
        writer.begin()
        for i, tile in enumerate(images):
            folder = Path(path, tile_module.tile_path(tile))
            folder.mkdir(parents=i == 0)
            if i % LINKS == 0:
                first = folder / tile_module.SHARD_NAME
                first.write_bytes(shard)
            else:
                os.link(first, folder / tile_module.SHARD_NAME)
            unsealed = before + json.dumps(tile).encode() + after
            sealed = unsealed.replace(b'"%s":""' % SEAL, b'"%s":"%s"' % (SEAL, tile_module.sha256(unsealed).encode()))
            assert i or tile_module.is_sealed(sealed)
            (folder / tile_module.METADATA_NAME).write_bytes(sealed)
            records.append(replace(one, id=tile, metadata_sha256=tile_module.sha256(sealed)))
        writer.finish(records)


def lose(missing: int) -> None:
    """Remove the manifest and the receipts of some tiles, evenly spread."""
    Path("cache.zarr/manifest.json").unlink()
    tiles = sorted(Path("cache.zarr/tiles/Many").glob("*/zarr.json"))
    for receipt in tiles[:: len(tiles) // missing][:missing]:
        receipt.unlink()


def run(command: list[str]) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory (MB) of a command, which must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{command} failed:\n{output}"
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1e3,
    }


def claim(folder: Path) -> TextIO:
    """Empty a folder for this run alone; returns its locked mark, which must stay open."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / MARK
    if any(folder.iterdir()) and not mark.exists():
        raise SystemExit(f"{folder} has files that are none of this benchmark's: name a folder that is not there")
    lock = mark.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise SystemExit(f"another run is at work in {folder}") from None
    for left in folder.iterdir():
        if left != mark:  # which goes last, so that a run killed here is known as well
            shutil.rmtree(left)
    return lock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiles", type=int, default=100_000)
    parser.add_argument(
        "--missing", type=int, nargs=2, default=[10, 100], help="tiles that two resumes have to compute"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    target = arguments.json and arguments.json.absolute()
    top = arguments.folder.absolute()
    lock = claim(top)
    done = [*KDPIPE, "precompute-teacher", "-c", "config.yaml"]
    precompute = [*done, "--device", "cpu"]
    steps = {
        "open in Python": (OPEN, None),
        "verify-cache --level quick": ([*KDPIPE, "verify-cache", "-c", "config.yaml", "--level", "quick"], None),
        "precompute-teacher, nothing to do": (done, None),
        **{
            f"precompute-teacher, {n} missing, no manifest": (precompute, lambda n=n: lose(n))
            for n in arguments.missing
        },
    }
    results: dict[str, dict[str, dict[str, float]]] = {name: {} for name in steps}
    try:
        for count in (FEW, arguments.tiles):
            layer = multiprocessing.get_context("spawn").Process(target=lay_out, args=(top / str(count), count))
            layer.start()
            layer.join()
            assert layer.exitcode == 0
            os.chdir(top / str(count))
            for name, (command, before) in steps.items():
                if before:
                    before()
                results[name][str(count)] = run(command)
    finally:
        os.chdir("/")
        for laid_out in (top / str(FEW), top / str(arguments.tiles)):
            shutil.rmtree(laid_out, ignore_errors=True)
        shutil.rmtree(top)
        lock.close()
    print(f"{'':50} {FEW:>24,} tiles {arguments.tiles:>24,} tiles")
    for name, found in results.items():
        cells = (f"{r['seconds']:6.1f} s {r['cpu_seconds']:6.1f} CPU s {r['peak_mb']:6.0f} MB" for r in found.values())
        print(f"{name:50} " + "   ".join(cells))
    if target:
        target.write_text(json.dumps({"tiles": arguments.tiles, "commands": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
