"""
How few bytes hold a real teacher's soft targets, at which error, and how fast a crop of them is read: all ways side by side.

    python tests/benchmarks/size.py [CONFIG] [--tiles 12] [--temperature 1 2] [--json FILE] [--plot FILE] [--set KEY=VALUE …]

Asks the configuration's teacher about tiles spread over its training set, encodes its answers in every way of `WAYS`, and prints
bytes a pixel, errors and times; then writes the same answers once as kdpipe does and once as zarr-python does by default
(float16, one chunk a tile) into a temporary folder, and reads the same random crops from both in turns.

`pip install imagecodecs pcodec` adds JPEG-LS, JPEG XL and pcodec, which no cache is written with.

Shapes: C classes, H W a tile's pixels, h w a chunk's.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numcodecs.abc import Codec
from numcodecs.blosc import Blosc
from numcodecs.gzip import GZip
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from kdpipe.cache import SoftTargetCache, key_rows, rest, simplex, steady
from kdpipe.cache.layout import CHUNK_PX, ZSTD_LEVEL
from kdpipe.cache.records import ImageDigest
from kdpipe.cache.storage import open_storage
from kdpipe.cache.writer import open_writer
from kdpipe.configs import load_config
from kdpipe.data.rasters import read_image
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.malloc import ask_for_huge_pages, keep_freed_memory
from kdpipe.pipeline.models.teacher import open_teacher, resolve_device, soft_targets
from kdpipe.pipeline.recipe import complete_recipe

CROP_PX = 512
READS = 100
Tiles = list[NDArray[np.float32]]


@dataclass(frozen=True)
class Images:
    """A lossless image codec of `imagecodecs` by name; each class is an image of its own, with its length before it."""

    name: str
    options: dict[str, Any]

    def encode(self, units_Chw: NDArray[np.uint8]) -> bytes:
        import imagecodecs

        write = getattr(imagecodecs, f"{self.name}_encode")
        images = (bytes(write(np.ascontiguousarray(units_hw), **self.options)) for units_hw in units_Chw)
        return b"".join(len(image).to_bytes(4, "little") + image for image in images)

    def decode(self, data: bytes) -> bytes:
        import imagecodecs

        read, planes = getattr(imagecodecs, f"{self.name}_decode"), []
        while data:
            end = 4 + int.from_bytes(data[:4], "little")
            planes.append(read(data[4:end]).tobytes())
            data = data[end:]
        return b"".join(planes)


class Pcodec:
    """Of 16 bits: of 8 it wants none."""

    def encode(self, units_Chw: NDArray[np.uint8]) -> bytes:
        from numcodecs.pcodec import PCodec

        return bytes(PCodec().encode(units_Chw.astype(np.uint16)))

    def decode(self, data: bytes) -> bytes:
        from numcodecs.pcodec import PCodec

        return np.frombuffer(PCodec().decode(data), np.uint16).astype(np.uint8).tobytes()


@dataclass(frozen=True)
class Way:
    """
    One way to store: bits that promise the bound, levels (the fewest for it if None), and what happens before the codec.

    `steady` rounds so that values rarely change from row to row, else by largest remainder; `differences` are from the row above,
    `columns` from the column before as well, modulo 256.
    """

    bits: int
    codec: Codec | Images | Pcodec
    levels: int | None = None
    leaves_out: bool = True
    steady: bool = True
    differences: bool = True
    columns: bool = False
    chunk_px: int = CHUNK_PX


DEFAULT, TINY = "8 bits: cache.bits 8", "6 bits: cache.bits 6"
ZSTD = Zstd(ZSTD_LEVEL)
WAYS = {
    "8 bits, 255 levels, all classes, plain, as they are, zstd 3 (format 1)": Way(
        8, Zstd(3), levels=255, leaves_out=False, steady=False, differences=False
    ),
    "8 bits, plain, as they are, zstd 7 (format 3)": Way(8, Zstd(7), steady=False, differences=False),
    "8 bits, plain, as they are": Way(8, ZSTD, steady=False, differences=False),
    "8 bits, plain": Way(8, ZSTD, steady=False),
    "8 bits, as they are": Way(8, ZSTD, differences=False),
    "8 bits, all classes": Way(8, ZSTD, leaves_out=False),
    DEFAULT: Way(8, ZSTD),
    "8 bits, 254 levels": Way(8, ZSTD, levels=254),
    "8 bits, columns too": Way(8, ZSTD, columns=True),
    "8 bits, zstd 1": Way(8, Zstd(1)),
    "8 bits, zstd 7": Way(8, Zstd(7)),
    "8 bits, zstd 16": Way(8, Zstd(16)),
    "8 bits, gzip 6": Way(8, GZip(6)),
    "8 bits, blosc zstd 5": Way(8, Blosc("zstd", 5, Blosc.NOSHUFFLE)),
    "8 bits, blosc zstd 5, bitshuffle": Way(8, Blosc("zstd", 5, Blosc.BITSHUFFLE)),
    "8 bits, chunks of 128 px": Way(8, ZSTD, chunk_px=128),
    "8 bits, chunks of 512 px": Way(8, ZSTD, chunk_px=512),
    "7 bits": Way(7, ZSTD),
    TINY: Way(6, ZSTD),
    "6 bits, plain, as they are, zstd 7 (format 3)": Way(6, Zstd(7), steady=False, differences=False),
    "6 bits, zstd 7": Way(6, Zstd(7)),
    "5 bits": Way(5, ZSTD),
    "4 bits: cache.bits 4": Way(4, ZSTD),
}
if importlib.util.find_spec("imagecodecs"):
    for label, codec in (
        ("JPEG-LS", Images("jpegls", {})),
        ("JPEG XL, effort 7", Images("jpegxl", {"lossless": True, "effort": 7})),
    ):
        WAYS[f"8 bits, plain, as they are, {label}"] = Way(8, codec, steady=False, differences=False)
        WAYS[f"8 bits, as they are, {label}"] = Way(8, codec, differences=False)
if importlib.util.find_spec("pcodec"):
    WAYS["8 bits, as they are, pcodec 8"] = Way(8, Pcodec(), differences=False)


@dataclass
class Outcome:
    """Bytes and milliseconds a square of `CROP_PX`, and errors of probabilities; gradient's as a share of a fresh student's."""

    bytes_per_pixel: float
    bound: float
    max_error: float
    mean_error: float
    largest_class_bias: float
    gradient_error: float
    encode_ms: float  # of processor time
    decode_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="demo")
    parser.add_argument("--tiles", type=int, default=12)
    parser.add_argument("--temperature", type=float, nargs="+", help="the configuration's, if not given")
    parser.add_argument("--json")
    parser.add_argument("--plot")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    ask_for_huge_pages()  # as the commands do, for both readers
    keep_freed_memory()
    config = load_config(options.config, options.overrides)
    found, reads = {}, {}
    logits = list(teacher_logits(config, options.tiles))
    class_map = torch.from_numpy(config.class_map_matrix())
    for temperature in options.temperature or [config.distill.temperature]:
        tiles = [soft_targets(logits_CHW[None], class_map, temperature)[0].numpy() for logits_CHW in logits]
        found[temperature] = {name: measure(tiles, way) for name, way in WAYS.items()}
        reads[temperature] = {bits: compare_reads(config, tiles, bits) for bits in (8, 6)}
        show(f"{options.config}, {len(tiles)} tiles, T {temperature:g}", found[temperature], reads[temperature])
    if options.json:
        content = {
            f"{temperature:g}": {
                "ways": {name: vars(outcome) for name, outcome in found[temperature].items()},
                "reads": reads[temperature],
            }
            for temperature in found
        }
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    if options.plot:
        draw(found, Path(options.plot))


def teacher_logits(config, count: int) -> Iterator[torch.Tensor]:
    """The teacher's answers, float32 `(C_t, H, W)`, on tiles spread evenly over the training set."""
    tiles = list_tiles(config.data, "train")
    stretch = resolve_stretch(config.data, tiles)
    teacher = open_teacher(config, complete_recipe(config, stretch, None), resolve_device(None))
    for tile in tiles[:: max(1, len(tiles) // count)][:count]:
        image_HWC = read_image(tile.image, config.data.bands, stretch)
        yield teacher.logits(image_HWC[None])[0].float().cpu()


def measure(tiles: Tiles, way: Way) -> Outcome:
    """What a way costs and loses over all pixels of all tiles."""
    num_classes, pixels = tiles[0].shape[0], sum(tile[0].size for tile in tiles)
    levels = way.levels or simplex.levels_of(way.bits, num_classes)
    size, encoding, decoding = 0, 0.0, 0.0
    largest, total, squares, gradient, signed = 0.0, 0.0, 0.0, 0.0, np.zeros(num_classes)
    for probs_CHW in tiles:
        start = time.thread_time()
        units_CHW = steady.encode(probs_CHW, way.bits, levels) if way.steady else simplex.encode(probs_CHW, levels)
        chunks = [encoded(units_Chw.copy(), way) for units_Chw in split(units_CHW, way.chunk_px)]
        encoding += time.thread_time() - start
        size += sum(len(frame) + 4 for frame, _ in chunks)
        start = time.thread_time()
        decoded = [simplex.decode(decode(*chunk, way, levels), levels) for chunk in chunks]
        decoding += time.thread_time() - start
        for exact_Chw, found_Chw in zip(split(probs_CHW, way.chunk_px), decoded, strict=True):
            errors = found_Chw.astype(np.float64) - exact_Chw
            largest = max(largest, np.abs(errors).max())
            total += np.abs(errors).sum()
            squares += (errors**2).sum()
            gradient += ((exact_Chw - 1 / num_classes) ** 2).sum()
            signed += errors.sum(axis=(1, 2))
    squares_of_crops = pixels / CROP_PX**2
    return Outcome(
        bytes_per_pixel=size / pixels,
        bound=(
            steady.error_bound(way.bits, levels, num_classes)
            if way.steady
            else simplex.error_bound(levels, num_classes)
        ),
        max_error=float(largest),
        mean_error=total / pixels / num_classes,
        largest_class_bias=float(np.abs(signed).max() / pixels),
        gradient_error=float(np.sqrt(squares / gradient)),
        encode_ms=1e3 * encoding / squares_of_crops,
        decode_ms=1e3 * decoding / squares_of_crops,
    )


def split(tile_CHW: NDArray, chunk_px: int) -> list[NDArray]:
    """The chunks of a tile; those at its borders are smaller here, as padding costs next to nothing."""
    _, height, width = tile_CHW.shape
    return [
        tile_CHW[:, top : top + chunk_px, left : left + chunk_px]
        for top in range(0, height, chunk_px)
        for left in range(0, width, chunk_px)
    ]


def encoded(units_Chw: NDArray[np.uint8], way: Way) -> tuple[bytes, tuple[int, ...]]:
    """A chunk's bytes, and its shape."""
    if way.leaves_out:
        rest.leave_out(units_Chw, way.chunk_px)
    if way.differences:
        key_rows.take_differences(units_Chw)
    if way.columns:
        units_Chw[:, :, 1:] -= units_Chw[:, :, :-1].copy()
    return bytes(way.codec.encode(units_Chw)), units_Chw.shape


def decode(frame: bytes, shape: tuple[int, ...], way: Way, levels: int) -> NDArray[np.uint8]:
    """The integers of a chunk, all classes, as a reader restores and checks them."""
    units_Chw = np.frombuffer(way.codec.decode(frame), np.uint8).reshape(shape).copy()
    if way.columns:
        np.cumsum(units_Chw, axis=2, dtype=np.uint8, out=units_Chw)
    if way.differences:
        key_rows.add_up(units_Chw)
    if way.leaves_out:
        rest.fill_in(units_Chw, levels, way.chunk_px)
    else:
        assert simplex.is_simplex(units_Chw, levels)
    return units_Chw


def compare_reads(config, tiles: Tiles, bits: int) -> dict[str, float]:
    """Milliseconds of the same random crops as float32, and bytes a pixel on disk: kdpipe's cache, and zarr's defaults."""
    config = config.model_copy(update={"cache": config.cache.model_copy(update={"kind": "soft", "bits": bits})})
    recipe = complete_recipe(config, None, None)
    names, pixels = [f"Tiles/{i:03d}" for i in range(len(tiles))], sum(tile[0].size for tile in tiles)
    with tempfile.TemporaryDirectory() as folder:
        with open_writer(open_storage(f"{folder}/kdpipe.zarr"), recipe, device="cpu", libraries={}) as writer:
            image = ImageDigest(size_bytes=0, sha256="0" * 64)
            writer.finish([writer.write(name, tile, image) for name, tile in zip(names, tiles, strict=True)])
        for name, tile in zip(names, tiles, strict=True):
            plain = zarr.create_array(
                f"{folder}/zarr.zarr/{name}", shape=tile.shape, chunks=tile.shape, dtype="float16"
            )
            plain[:] = tile
        cache = SoftTargetCache.open(f"{folder}/kdpipe.zarr")
        arrays = {name: zarr.open_array(f"{folder}/zarr.zarr/{name}", mode="r") for name in names}
        for name in names:  # the first touch, which compares a tile's digest and opens it, is once a process
            cache.read(name), arrays[name][:]
        rng = np.random.default_rng(0)
        seconds: dict[str, list[float]] = {"kdpipe": [], "zarr": []}
        processor: dict[str, list[float]] = {"kdpipe": [], "zarr": []}
        for _ in range(READS):
            name = names[rng.integers(len(names))]
            sides = [min(CROP_PX, side) for side in cache.size(name)]
            top, left = (
                int(rng.integers(whole - side + 1)) for whole, side in zip(cache.size(name), sides, strict=True)
            )
            times = [(time.perf_counter(), time.process_time())]
            cache.read(name, (top, left, *sides))
            times.append((time.perf_counter(), time.process_time()))
            arrays[name][:, top : top + sides[0], left : left + sides[1]].astype(np.float32)
            times.append((time.perf_counter(), time.process_time()))
            for reader, before, after in zip(seconds, times[:-1], times[1:], strict=True):
                seconds[reader].append(after[0] - before[0])
                processor[reader].append(after[1] - before[1])
        sizes = {
            reader: sum(file.stat().st_size for file in Path(folder, f"{reader}.zarr").rglob("*") if file.is_file())
            for reader in seconds
        }
    found: dict[str, float] = {}
    for reader in seconds:
        found |= {
            f"{reader}_median_ms": 1e3 * statistics.median(seconds[reader]),
            f"{reader}_processor_ms": 1e3 * statistics.mean(processor[reader]),
            f"{reader}_bytes_per_pixel": sizes[reader] / pixels,
        }
    return found


def show(title: str, outcomes: dict[str, Outcome], reads: dict[int, dict[str, float]]) -> None:
    console = Console()
    table = Table(title=f"{title}: bytes a pixel, |Δp| in 255ths, ms a {CROP_PX} px square", title_justify="left")
    table.add_column("way")
    for column in ("B/px", "max", "mean", "bias", "grad %", "enc", "dec"):
        table.add_column(column, justify="right")
    for name, found in outcomes.items():
        table.add_row(
            name, f"{found.bytes_per_pixel:.3f}", f"{255 * found.max_error:.2f}", f"{255 * found.mean_error:.2f}",
            f"{255 * found.largest_class_bias:.2f}", f"{100 * found.gradient_error:.2f}", f"{found.encode_ms:.0f}",
            f"{found.decode_ms:.1f}", style="bold" if name in (DEFAULT, TINY) else "",
        )  # fmt: skip
    console.print(table)
    table = Table(title=f"Random crops of up to {CROP_PX} px, on disk, whole files", title_justify="left")
    table.add_column("")
    for column in ("kdpipe", "zarr's defaults", "ratio"):
        table.add_column(column, justify="right")
    for bits, found_reads in reads.items():
        for label, key in (
            ("median ms", "median_ms"), ("mean ms of processor time", "processor_ms"), ("bytes a pixel", "bytes_per_pixel"),
        ):  # fmt: skip
            ours, theirs = (found_reads[f"{reader}_{key}"] for reader in ("kdpipe", "zarr"))
            table.add_row(f"{bits} bits: {label}", f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f} ×")
    console.print(table)


def draw(found: dict[float, dict[str, Outcome]], path: Path) -> None:
    """Bytes a pixel against the largest error, one panel a temperature."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(7 * len(found), 5), squeeze=False, layout="constrained")
    for panel, (temperature, outcomes) in zip(panels[0], found.items(), strict=True):
        for name, outcome in outcomes.items():
            way = WAYS[name]
            colour = "tab:blue" if way.steady and way.differences else "tab:orange"
            if name in (DEFAULT, TINY):
                colour = "tab:red"
            elif isinstance(way.codec, Images | Pcodec):
                colour = "tab:green"
            panel.scatter(
                255 * outcome.max_error, outcome.bytes_per_pixel, s=30, color=colour,
                marker="v" if way.columns else "o", zorder=4 if name in (DEFAULT, TINY) else 3,
            )  # fmt: skip
        for bits, limit in ((8, 1.0), (6, 0.5)):
            panel.plot(255 / simplex.total(bits), limit, "k_", markersize=18)
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="largest |Δp| in 255ths",
            ylabel="bytes a pixel",
            title=f"T {temperature:g}",
        )
        panel.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        panel.set_yticks([0.25, 0.5, 1, 2], ["0.25", "0.5", "1", "2"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    handles = [
        pyplot.Line2D([], [], color=colour, marker=marker, linestyle="", label=label)
        for colour, marker, label in (
            ("tab:red", "o", "cache.bits 8 and 6"), ("tab:blue", "o", "other codecs, levels, chunks, bits"),
            ("tab:orange", "o", "rounded plainly, or no differences"), ("tab:green", "o", "JPEG XL, JPEG-LS, pcodec (not stock Zarr)"),
            ("tab:blue", "v", "differences along columns too"),
            ("black", "_", "to reach"),
        )
    ]  # fmt: skip
    panels[0][-1].legend(handles=handles, fontsize=8)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
