"""
Reading from S3 with obstore and with s3fs, and from a pack, against a server on loopback that takes its time for each answer.

    python tests/benchmarks/remote.py /scratch/remote [--tiles 200] [--delay 0.02] [--json FILE]

Writes a cache of `--tiles` tiles of 512 x 512 px into a new folder, which it deletes in the end, and serves it from a process of its own.
Measured, in turns: receipts that a resumed run reads, one after another and as many at once as the storage says; and random crops of
tiles that were read before, by one reader and by eight at once.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SIDE_PX, CROP_PX = 512, 300
ROUNDS, RECEIPTS, CROPS, READERS = 3, 400, 60, 8
TIMES = "%a, %d %b %Y %H:%M:%S GMT"


def serve(folder: str, port: int, delay: float) -> None:
    """An S3 server that answers reads and listings of the files in a folder, each after `delay` seconds."""
    from aiohttp import web

    files = {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    names, head = sorted(files), {"ETag": '"1"', "Last-Modified": time.strftime(TIMES, time.gmtime())}

    async def answer(request: web.Request) -> web.Response:
        await asyncio.sleep(delay)
        key = request.path.lstrip("/").partition("/")[2]
        if not key:
            prefix, after = request.query.get("prefix", ""), request.query.get("continuation-token", "")
            found = [name for name in names if name.startswith(prefix) and name > after]
            entries = "".join(
                f"<Contents><Key>{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><Size>{len(files[name])}</Size></Contents>"
                for name in found[:1000]
            )
            more = f"<NextContinuationToken>{found[999]}</NextContinuationToken>" if len(found) > 1000 else ""
            truncated = "true" if more else "false"
            text = f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{more}{entries}</ListBucketResult>"
            return web.Response(text=text, content_type="application/xml")
        if key not in files:
            text = "<Error><Code>NoSuchKey</Code></Error>"
            return web.Response(status=404, text=text, content_type="application/xml")
        data = files[key]
        wanted = request.http_range
        if wanted.start is None and wanted.stop is None:
            return web.Response(body=data, headers=head)
        start, stop, _ = wanted.indices(len(data))
        span = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        return web.Response(status=206, body=data[start:stop], headers=head | span)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


def write_cache(path: str, tiles: int) -> None:
    """A cache of smooth random targets, of which a tile is about as large as that of a real teacher."""
    from kdpipe.cache import SoftTargetCache

    rng = np.random.default_rng(0)
    made = []
    for _ in range(8):
        coarse = rng.standard_normal((6, SIDE_PX // 16, SIDE_PX // 16)) * 4
        z = np.kron(coarse, np.ones((16, 16))) + rng.standard_normal((6, SIDE_PX, SIDE_PX)) * 0.3
        e = np.exp(z - z.max(axis=0))
        made.append((e / e.sum(axis=0)).astype(np.float32))
    with SoftTargetCache.create(path, classes=list("abcdef")) as own:
        for number in range(tiles):
            own.write(f"Train/t{number:05d}", made[number % len(made)])


def measure(url: str, pack: str, *, with_obstore: bool) -> dict[str, float]:
    """Figures of one way of reading; to be called in a process of its own."""
    if not with_obstore:
        sys.modules["obstore"] = None  # type: ignore[assignment]
    from kdpipe.cache import SoftTargetCache
    from kdpipe.cache.documents import read_receipt
    from kdpipe.cache.storage.ahead import in_order
    from kdpipe.cache.storage.base import open_storage

    storage, cache = open_storage(url), SoftTargetCache.open(url)
    digest, ids = cache.manifest.recipe.digest(), cache.tile_ids
    found: dict[str, float] = {}

    def timed(what: str, count: int, call: Callable[[], object]) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        call()
        found[f"{what}, a second"] = count / (time.perf_counter() - wall)
        found[f"{what}, processor ms"] = 1e3 * (time.process_time() - processor) / count

    wanted = [ids[number % len(ids)] for number in range(RECEIPTS)]
    timed("receipts one after another", 40, lambda: [read_receipt(storage, tile, digest) for tile in wanted[:40]])
    receipts = in_order(lambda tile: read_receipt(storage, tile, digest), wanted, storage.at_once)
    timed("receipts at once", RECEIPTS, lambda: list(receipts))
    crops = [np.random.default_rng(number) for number in range(READERS)]
    for kind, place in (("folder", url), ("pack", pack)):
        readers = [SoftTargetCache.open(place) for _ in range(READERS)]
        near = ids[:6]
        for reader in readers:
            for tile in near:
                reader.read(tile, (0, 0, 1, 1))

        def read(number: int, readers: list[SoftTargetCache] = readers, near: list[str] = near) -> None:
            for _ in range(CROPS // READERS if number else CROPS):
                top, left = crops[number].integers(SIDE_PX - CROP_PX + 1, size=2).tolist()
                readers[number].read(near[crops[number].integers(len(near))], (top, left, CROP_PX, CROP_PX))

        timed(f"crops of a {kind}, one reader", CROPS, lambda read=read: read(0))
        with ThreadPoolExecutor(READERS) as threads:
            each = CROPS // READERS * (READERS - 1)
            timed(
                f"crops of a {kind}, {READERS - 1} readers",
                each,
                lambda read=read: list(threads.map(read, range(1, READERS))),
            )
    return found


def measured(queue: "multiprocessing.Queue[dict[str, float]]", url: str, pack: str, with_obstore: bool) -> None:
    queue.put(measure(url, pack, with_obstore=with_obstore))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiles", type=int, default=200)
    parser.add_argument("--delay", type=float, default=0.02)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    spawn = multiprocessing.get_context("spawn")
    found: dict[str, list[dict[str, float]]] = {"obstore": [], "s3fs": []}
    try:
        write_cache(str(options.folder / "c.zarr"), options.tiles)
        from kdpipe.cache.packing.pack import pack

        pack(options.folder / "c.zarr", options.folder / "c.zarr.zip")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {
            "FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "XDG_CACHE_HOME": tempfile.gettempdir(),
        }  # fmt: skip
        server = spawn.Process(target=serve, args=(str(options.folder), port, options.delay), daemon=True)
        server.start()
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        for _ in range(ROUNDS):
            for way, figures in found.items():
                queue = spawn.Queue()
                args = queue, "s3://bucket/c.zarr", "s3://bucket/c.zarr.zip", way == "obstore"
                process = spawn.Process(target=measured, args=args)
                process.start()
                figures.append(queue.get(timeout=600))
                process.join()
        server.terminate()
    finally:
        shutil.rmtree(options.folder)
    medians = {
        way: {what: statistics.median(each[what] for each in figures) for what in figures[0]}
        for way, figures in found.items()
    }
    for what in medians["obstore"]:
        ours, theirs = (medians[way][what] for way in ("obstore", "s3fs"))
        print(f"{what:46} obstore {ours:9.2f}   s3fs {theirs:9.2f}   {ours / theirs:6.2f} x")
    if options.json:
        options.json.write_text(
            json.dumps({"figures": medians, "options": {"tiles": options.tiles, "delay": options.delay}})
        )


if __name__ == "__main__":
    main()
