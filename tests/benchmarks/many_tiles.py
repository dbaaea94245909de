"""
How long does a cache of very many tiny tiles take to open, to verify quickly, and to resume, and how much memory?

    python tests/benchmarks/many_tiles.py /scratch/many --tiles 100000

Lays out images (hard links to one) and a cache of their tiles in a new folder, which it deletes in the end. The tiles are
copies of one under receipts of their own, and nothing is synced while they are laid out: only what is measured afterwards is as in use.
"""

import argparse
import json
import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np

from kdpipe.cache import SoftTargetCache, layout, simplex
from kdpipe.cache.integrity import check_quick
from kdpipe.cache.manifest import Recipe, TeacherRecord
from kdpipe.cache.reader import read_manifest
from kdpipe.cache.sources import digest_image
from kdpipe.cache.storage import open_storage
from kdpipe.cache.writer import finished_tiles, open_writer

RECIPE = Recipe(
    teachers=[TeacherRecord(
        checkpoint_sha256="0" * 64, architecture="unet", encoder="resnet18", classes=["a", "b"], drop_channels=[], weight=1.0,
        normalize_mean=[0, 0, 0], normalize_std=[1, 1, 1], precision="fp32", tta="none", scales=[1.0], window=None,
    )],
    bands=[1, 2, 3], stretch=None, classes=["x", "y"], class_map=[[1, 0], [0, 1]], temperature=2.0, kind="soft", bits=8,
    chunk_px=256,
)  # fmt: skip
PROBS_CHW = np.full((2, 8, 8), 0.5, dtype=np.float32)
MISSING = 10


def lay_out(folder: Path, count: int) -> dict[str, Path]:
    images_folder = folder / "Many" / "images"
    images_folder.mkdir(parents=True)
    images = {f"Many/t{i:06d}": images_folder / f"t{i:06d}.png" for i in range(count)}
    paths = iter(images.values())
    links = 60_000  # ext4 allows 65,000 links to a file
    for i, path in enumerate(paths):
        if i % links == 0:
            first = path
            first.write_bytes(b"an image")
        else:
            os.link(first, path)
    return images


def write(path: Path, images: dict[str, Path]) -> None:
    fsync, encode = os.fsync, layout.encode_tile
    digest = digest_image(next(iter(images.values())))
    shard, template, one = encode(simplex.encode(PROBS_CHW, 8), "ID", digest, RECIPE.digest(), np.zeros((1, 1)))
    seal = json.loads(template)["attributes"]["kdpipe"][layout.SEAL].encode()

    def copy(units, tile_id, image, recipe_digest, lost):
        blank = template.replace(seal, b"").replace(b'"ID"', json.dumps(tile_id).encode())
        sealed = blank.replace(b'"receipt_sha256": ""', b'"receipt_sha256": "%s"' % layout.sha256(blank).encode())
        return shard, sealed, one.model_copy(update={"id": tile_id, "metadata_sha256": layout.sha256(sealed)})

    os.fsync, layout.encode_tile = lambda descriptor: None, copy
    try:
        with open_writer(open_storage(str(path)), RECIPE, device="cpu", libraries={}) as writer:
            writer.finish([writer.write(tile, PROBS_CHW, digest) for tile in images])
    finally:
        os.fsync, layout.encode_tile = fsync, encode


def resume(path: Path, images: dict[str, Path]) -> int:
    storage = open_storage(str(path))
    records = finished_tiles(storage, RECIPE, images)
    with open_writer(storage, RECIPE, device="cpu", libraries={}) as writer:
        writer.begin()
        missing = [tile for tile in images if tile not in records]
        for tile in missing:
            records[tile] = writer.write(tile, PROBS_CHW, digest_image(images[tile]))
        writer.finish([records[tile] for tile in images])
    return len(missing)


def timed(what, function):
    start, cpu = time.perf_counter(), time.process_time()
    result = function()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(
        f"{what:45} {time.perf_counter() - start:7.1f} s   CPU {time.process_time() - cpu:7.1f} s   peak so far {peak:6.0f} MB",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiles", type=int, default=100_000)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    path = arguments.folder / "cache.zarr"
    try:
        images = timed("images", lambda: lay_out(arguments.folder, arguments.tiles))
        timed("laying the cache out (unsynced)", lambda: write(path, images))
        storage = open_storage(str(path))
        cache = timed("SoftTargetCache.open", lambda: SoftTargetCache.open(str(path)))
        timed("read 100 tiles", lambda: [cache.read(tile) for tile in cache.tile_ids[:100]])
        assert timed("verify, quick", lambda: check_quick(storage, read_manifest(storage), images)) == []
        assert len(timed("what is finished, by the manifest", lambda: finished_tiles(storage, RECIPE, images))) == len(
            images
        )
        for tile in list(images)[:: len(images) // MISSING][:MISSING]:
            storage.remove(f"{layout.tile_path(tile)}/{layout.METADATA_NAME}")
        storage.remove("manifest.json")
        assert timed(f"resume without a manifest, {MISSING} tiles missing", lambda: resume(path, images)) == MISSING
    finally:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
