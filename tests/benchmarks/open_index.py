"""
Time and memory to open a cache of a million tiles and read a window of it.

    python tests/benchmarks/open_index.py FOLDER [--tiles 1000000] [--json FILE]

Writes a cache to FOLDER, a new one, which it deletes in the end: one tile is there, and the index lists as many more. What is
measured is a process of its own, after its imports: wall and CPU time, and the memory that it does not share.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

MEASURED = """
import json, re, sys, time
from pathlib import Path
from kdpipe.cache import SoftTargetCache

def private_mb():
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Private_Dirty:\\s+(\\d+)", text)[1]) / 1e3

before, wall, cpu = private_mb(), time.perf_counter(), time.process_time()
SoftTargetCache.open(sys.argv[1]).read("Land/t0000000", (0, 0, 32, 32))
print(json.dumps({"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "private_mb": private_mb() - before}))
"""


def write(path: Path, count: int) -> None:
    """A finished cache of `count` tiles, of which the first is there."""
    import numpy as np

    from kdpipe.cache.index.records import ImageDigest, TileRecord
    from kdpipe.cache.storage.base import open_storage
    from kdpipe.cache.writer import open_writer, own_recipe

    recipe = own_recipe(["a", "b"], kind="soft", bits=8, temperature=1.0, made_by={})
    values_CHW = np.full((2, 64, 64), 0.5, dtype=np.float32)

    def records(first: TileRecord) -> Iterator[TileRecord]:
        yield first
        for i in range(1, count):
            digest = hashlib.sha256(str(i).encode()).hexdigest()
            image = ImageDigest(300_000 + i % 999, digest)
            yield replace(first, id=f"Land/t{i:07d}", image=image, shard_sha256=digest, metadata_sha256=digest)

    with open_writer(open_storage(str(path)), recipe, device="cpu", libraries={}) as writer:
        writer.begin()
        writer.finish(list(records(writer.write("Land/t0000000", values_CHW, ImageDigest(1, "0" * 64)))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiles", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    try:
        path = options.folder / "c.zarr"
        write(path, options.tiles)
        listing = [path / "manifest.json", *(path / "index").rglob("*")]
        listed = sum(file.stat().st_size for file in listing if file.is_file())
        done = subprocess.run([sys.executable, "-c", MEASURED, str(path)], check=True, capture_output=True, text=True)
    finally:
        shutil.rmtree(options.folder)
    found = {"tiles": options.tiles, "bytes_a_tile": listed / options.tiles, **json.loads(done.stdout)}
    print(", ".join(f"{name} {value:,.3g}" for name, value in found.items()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
