"""
Random crops of the same soft targets from kdpipe's cache and from what else one could keep them in, side by side.

    python tests/benchmarks/peers.py FOLDER [CONFIG] [--tiles 240] [--rounds 3] [--json FILE] [--set KEY=VALUE …]

The configured teacher predicts twelve tiles, which are stored `--tiles / 12` times in a new folder below FOLDER, deleted in the end.
kdpipe writes its cache; each other way keeps the very integers that this cache decodes to, so that all have the same error. A way is read
in a process of its own, by one process on one core and by two on two; "cold" is the first crop of each tile, whose bytes the system was
asked to drop from memory, and "warm" are random crops of tiles that were read before. WebDataset reads tile after tile and crops each.

    pip install tensorstore zarrs webdataset    # a way whose package is missing is left out, and said so

Shapes: C classes, H W a tile's pixels, h w a crop's.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from size import teacher_logits

from kdpipe.cache import SoftTargetCache
from kdpipe.cache.encoding.logits import Softening
from kdpipe.cache.packing.pack import pack
from kdpipe.configs import load_config
from kdpipe.pipeline.devices import ask_for_huge_pages, keep_freed_memory
from kdpipe.pipeline.teacher.soft_targets import SoftTargets

CROP_PX, DISTINCT, CROPS = 512, 12, 200
OTHERS = {
    "zarrs": "zarrs",
    "tensorstore": "tensorstore",
    "webdataset": "webdataset",
}  # a way and the package that it needs
WAYS = ("kdpipe", "pack", "zarr-python", "zarrs", "tensorstore", "memmap", "webdataset")
FILES = {"zarrs": "zarr-python", "tensorstore": "zarr-python"}  # whose files a way reads, if not its own
Window = tuple[int, int, int, int]
Read = Callable[[int, Window], NDArray[np.float32]]


def fractions(units: NDArray[np.uint8], levels: int) -> NDArray[np.float32]:
    """Integers that sum to `levels` as soft targets."""
    return np.multiply(units, np.float32(1 / levels), dtype=np.float32)


def write(folder: Path, config, tiles: int) -> dict[str, Any]:
    """The folders and files of all ways; returns the number of levels, and the size of each tile."""
    softening = Softening(config.distill.temperature, config.class_map_matrix())
    soft_targets = SoftTargets(softening, torch.device("cpu"))
    made = [soft_targets(z_CHW[None])[0].numpy() for z_CHW in teacher_logits(config, DISTINCT)]
    with SoftTargetCache.create(folder / "kdpipe.zarr", classes=list(config.classes.names)) as own:
        for number in range(tiles):
            own.write(f"T/{number:05d}", made[number % len(made)])
    pack(str(folder / "kdpipe.zarr"), str(folder / "pack.zarr.zip"))
    cache = SoftTargetCache.open(folder / "kdpipe.zarr")
    units = [cache.read_units(f"T/{number:05d}") for number in range(len(made))]
    for number in range(tiles):
        write_others(folder, number, units[number % len(units)])
    if installed("webdataset"):
        write_tars(folder / "webdataset", [units[number % len(units)] for number in range(tiles)])
    return {
        "levels": cache.manifest.recipe.levels,
        "sizes": [units[number % len(units)].shape[1:] for number in range(tiles)],
    }


def write_others(folder: Path, number: int, units_CHW: NDArray[np.uint8]) -> None:
    """A tile as a sharded Zarr array with kdpipe's chunks and codec, and as plain bytes."""
    import zarr
    from zarr.codecs import ZstdCodec

    classes, height, width = units_CHW.shape
    array = zarr.create_array(
        f"{folder}/zarr-python/{number:05d}",
        shape=units_CHW.shape,
        dtype="uint8",
        chunks=(classes, 256, 256),
        shards=(classes, -(-height // 256) * 256, -(-width // 256) * 256),
        compressors=[ZstdCodec(level=7)],
    )
    array[:] = units_CHW
    (folder / "memmap").mkdir(exist_ok=True)
    np.save(folder / f"memmap/{number:05d}.npy", units_CHW)


def write_tars(folder: Path, tiles: list[NDArray[np.uint8]]) -> None:
    """Eight tar files of samples, each the compressed array of a tile."""
    folder.mkdir()
    for part in range(8):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for number in range(part, len(tiles), 8):
                content = BytesIO()
                np.savez_compressed(content, units=tiles[number])
                member = tarfile.TarInfo(f"{number:05d}.npz")
                member.size = content.tell()
                content.seek(0)
                tar.addfile(member, content)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def opened(way: str, folder: Path, levels: int) -> Read:
    """What reads a window of a tile by its number. Tiles stay open, as those of kdpipe's reader do."""
    if way in ("kdpipe", "pack"):
        cache = SoftTargetCache.open(folder / ("kdpipe.zarr" if way == "kdpipe" else "pack.zarr.zip"))
        return lambda number, window: cache.read(f"T/{number:05d}", window)
    arrays: dict[int, Any] = {}

    def open_one(number: int) -> Any:
        if way == "memmap":
            return np.load(folder / f"memmap/{number:05d}.npy", mmap_mode="r")
        path = f"{folder}/zarr-python/{number:05d}"
        if way == "tensorstore":
            import tensorstore

            where = {"driver": "file", "path": path}
            return tensorstore.open({"driver": "zarr3", "kvstore": where}, read=True).result()
        import zarr

        return zarr.open_array(path, mode="r")

    def read(number: int, window: Window) -> NDArray[np.float32]:
        if number not in arrays:
            arrays[number] = open_one(number)
        top, left, height, width = window
        found = arrays[number][:, top : top + height, left : left + width]
        return fractions(found.read().result() if way == "tensorstore" else found, levels)

    if way == "zarrs":
        import zarr

        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    return read


def tiles_of_tars(folder: Path, parts: list[int]) -> Iterator[NDArray[np.uint8]]:
    """The tiles of some tar files as WebDataset yields them."""
    import webdataset

    files = [str(folder / f"webdataset/{part}.tar") for part in parts]
    for sample in webdataset.WebDataset(files, shardshuffle=False, empty_check=False).decode():
        yield sample["npz"]["units"]


def windows(numbers: list[int], sizes: list[tuple[int, int]], rng: np.random.Generator) -> list[tuple[int, Window]]:
    """A random window of up to `CROP_PX` in each of these tiles."""
    found = []
    for number in numbers:
        height, width = (min(CROP_PX, side) for side in sizes[number])
        top, left = (int(rng.integers(s - c + 1)) for s, c in zip(sizes[number], (height, width), strict=True))
        found.append((number, (top, left, height, width)))
    return found


def crops(way: str, folder: str, content: dict[str, Any], part: int, parts: int, start: Any, answer: Any) -> None:
    """Read in a process of its own, on one core; sends the crops a second, cold and warm."""
    ask_for_huge_pages()  # as the commands do, for all ways
    keep_freed_memory()
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[part]})
    sizes, rng = content["sizes"], np.random.default_rng(part)
    mine = list(range(part, len(sizes), parts))
    first, again = windows(mine, sizes, rng), windows(rng.choice(mine, CROPS).tolist(), sizes, rng)
    if way == "webdataset":
        import webdataset  # noqa: F401  importing is no part of reading

        start.wait()
        paces = []
        for _ in range(2):
            begin = time.perf_counter()
            for units_CHW in tiles_of_tars(Path(folder), list(range(part, 8, parts))):
                ((_, (top, left, height, width)),) = windows([0], [units_CHW.shape[1:]], rng)
                fractions(units_CHW[:, top : top + height, left : left + width], content["levels"])
            paces.append(len(mine) / (time.perf_counter() - begin))
        answer.put(tuple(paces))
        return
    read = opened(way, Path(folder), content["levels"])
    if way == "tensorstore":
        import tensorstore  # noqa: F401  as above
    start.wait()
    paces = []
    for wanted in (first, again):
        begin = time.perf_counter()
        for number, window in wanted:
            read(number, window)
        paces.append(len(wanted) / (time.perf_counter() - begin))
    answer.put(tuple(paces))


def measured(way: str, folder: Path, content: dict[str, Any], parts: int) -> tuple[float, float]:
    """Crops a second of `parts` processes together, cold and warm."""
    drop_from_memory(folder)
    spawn = multiprocessing.get_context("spawn")
    start, answer = spawn.Barrier(parts), spawn.Queue()
    processes = [
        spawn.Process(target=crops, args=(way, str(folder), content, part, parts, start, answer))
        for part in range(parts)
    ]
    for process in processes:
        process.start()
    paces = [answer.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return sum(cold for cold, _ in paces), sum(warm for _, warm in paces)


def drop_from_memory(folder: Path) -> None:
    """Ask the system to forget the content of all files; without rights of its own this is all that a program can do."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def first_window(way: str, folder: str, content: dict[str, Any]) -> NDArray[np.float32]:
    """The same window of the first tile, whatever the way."""
    ((number, window),) = windows([0], content["sizes"], np.random.default_rng(0))
    if way != "webdataset":
        return opened(way, Path(folder), content["levels"])(number, window)
    top, left, height, width = window
    whole_CHW = next(tiles_of_tars(Path(folder), [0]))
    return fractions(whole_CHW[:, top : top + height, left : left + width], content["levels"])


def require_equal(folder: Path, content: dict[str, Any], ways: list[str]) -> None:
    """Assert that a window has the same values in all ways, each read in a process of its own, as zarrs' setting would stay."""
    right = first_window("kdpipe", str(folder), content)
    for way in ways:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found = process.submit(first_window, way, str(folder), content).result()
        np.testing.assert_allclose(found, right, atol=1e-6, err_msg=way)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("config", nargs="?", default="demo")
    parser.add_argument("--tiles", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    console = Console()
    ways = [way for way in WAYS if way not in OTHERS or installed(OTHERS[way])]
    for way in sorted(set(WAYS) - set(ways)):
        console.print(f"{way} is left out: pip install {OTHERS[way]}", highlight=False)
    cores = len(os.sched_getaffinity(0))
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        content = write(folder, load_config(options.config, options.overrides), options.tiles)
        require_equal(folder, content, ways)
        counts = [parts for parts in (1, 2) if parts <= cores]
        paces: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for parts in counts:
                for way in ways:
                    for kind, pace in zip(("cold", "warm"), measured(way, folder, content, parts), strict=True):
                        paces.setdefault(f"{way}, {counted(parts)}, {kind}", []).append(pace)
        pixels = sum(height * width for height, width in content["sizes"])
        names = {"kdpipe": "kdpipe.zarr", "pack": "pack.zarr.zip"}
        sizes = {way: bytes_of(folder / names.get(way, FILES.get(way, way))) / pixels for way in ways}
    finally:
        shutil.rmtree(folder)
    found = {
        way: {
            "bytes_per_pixel": sizes[way],
            "crops_a_second": {
                f"{counted(parts)}, {kind}": statistics.median(paces[f"{way}, {counted(parts)}, {kind}"])
                for parts in counts
                for kind in ("cold", "warm")
            },
            # Rounds are compared with themselves, as the machine may be slower in one of them.
            "of_kdpipe": {
                f"{counted(parts)}, {kind}": statistics.median(
                    ours / theirs
                    for ours, theirs in zip(
                        paces[f"kdpipe, {counted(parts)}, {kind}"],
                        paces[f"{way}, {counted(parts)}, {kind}"],
                        strict=True,
                    )
                )
                for parts in counts
                for kind in ("cold", "warm")
            },
        }
        for way in ways
    }
    show(console, found, options.tiles)
    if options.json:
        Path(options.json).write_text(json.dumps({"tiles": options.tiles, "ways": found}, indent=1) + "\n")


def counted(parts: int) -> str:
    return "1 core" if parts == 1 else f"{parts} cores"


def bytes_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def show(console: Console, found: dict[str, dict[str, Any]], tiles: int) -> None:
    table = Table(title=f"Crops of up to {CROP_PX} px a second, {tiles} tiles, and kdpipe's pace as a multiple of each")
    table.add_column("way")
    table.add_column("B/px", justify="right")
    kinds = list(found["kdpipe"]["crops_a_second"])
    for kind in kinds:
        table.add_column(kind, justify="right")
    for way, figures in found.items():
        cells = [f"{figures['crops_a_second'][kind]:.0f} ({figures['of_kdpipe'][kind]:.2f} ×)" for kind in kinds]
        table.add_row(way, f"{figures['bytes_per_pixel']:.2f}", *cells)
    console.print(table)


if __name__ == "__main__":
    main()
