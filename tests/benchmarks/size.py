"""
How few bytes hold a real teacher's soft targets, at which error, and how fast a crop of them is read: alternatives side by side.

    python tests/benchmarks/size.py [CONFIG] [--tiles 12] [--temperature 1 2] [--json FILE] [--set KEY=VALUE …]

The configured teacher predicts tiles spread over its training set. Its predictions are encoded in every way of `WAYS`, with bytes per
pixel, errors and times. Then they are written once as kdpipe does and once as zarr-python does by default (float16, one chunk a
tile) into a temporary folder, and the same random crops are read from both in turns.

Shapes: C classes (the teacher's where they are logits), H W a tile's pixels, h w a chunk's.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import zarr
from numcodecs.abc import Codec
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from kdpipe.cache import SoftTargetCache
from kdpipe.cache.encoding import implied_class, logits, row_deltas, simplex, steady_rounding
from kdpipe.cache.index.records import ImageDigest
from kdpipe.cache.packing.pack import pack
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.tile import CHUNK_PX, ZSTD_LEVEL
from kdpipe.cache.writer import open_writer
from kdpipe.configs import load_config
from kdpipe.data.rasters import read_image
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.devices import ask_for_huge_pages, keep_freed_memory, resolve_device
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.teacher.frozen import open_teacher
from kdpipe.pipeline.teacher.soft_targets import SoftTargets

CROP_PX = 512
READS = 300
BLOCK_PX = 8  # a network sees no single pixel: errors that cancel out over such a square hardly reach it
Tiles = list[NDArray[np.float32]]


@dataclass(frozen=True)
class Predictions:
    """The teacher's predictions of all tiles, as soft targets `(C, H, W)` and as the logits that they are made of."""

    probs: Tiles
    logits: Tiles
    softening: logits.Softening


def plain(probs_CHW: NDArray[np.float32], bits: int, levels: int) -> NDArray[np.uint8]:
    """Largest remainder, each pixel by itself."""
    return simplex.encode(probs_CHW, levels)


@dataclass(frozen=True)
class Way:
    """
    One way to store soft targets: bits that promise the bound, levels (by default the fewest for it), and what precedes the codec.

    `rounding` is `steady_rounding.encode`, by which values rarely change from row to row, or `plain`. `differences` are taken from
    the row above, and with `columns` from the column before as well, modulo 256.
    """

    bits: int
    codec: Codec = field(default_factory=lambda: Zstd(ZSTD_LEVEL))
    levels: int | None = None
    leaves_out: bool = True
    rounding: Callable[[NDArray[np.float32], int, int], NDArray[np.uint8]] = steady_rounding.encode
    differences: bool = True
    columns: bool = False
    chunk_px: int = CHUNK_PX

    def levels_of(self, num_classes: int) -> int:
        return self.levels or simplex.levels_of(self.bits, num_classes)

    def bound(self, predictions: Predictions) -> float:
        """The promised largest error of a probability."""
        num_classes = len(predictions.probs[0])
        if self.rounding is plain:
            return simplex.error_bound(self.levels_of(num_classes), num_classes)
        return steady_rounding.error_bound(self.bits, self.levels_of(num_classes), num_classes)

    def encoded(self, predictions: Predictions, tile: int) -> list[tuple[bytes, tuple[int, ...]]]:
        """The bytes of each chunk of a tile, and its shape."""
        chunks = self.prepared(predictions.probs[tile])
        return [(bytes(self.codec.encode(units_Chw)), units_Chw.shape) for units_Chw in chunks]

    def prepared(self, probs_CHW: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
        """The integers of each chunk of a tile, as passed to the codec."""
        units_CHW = self.rounding(probs_CHW, self.bits, self.levels_of(len(probs_CHW)))
        chunks = [units_Chw.copy() for units_Chw in split(units_CHW, self.chunk_px)]
        for units_Chw in chunks:
            if self.leaves_out:
                implied_class.leave_out(units_Chw, self.chunk_px)
            if self.differences:
                row_deltas.take_differences(units_Chw)
            if self.columns:
                units_Chw[:, :, 1:] -= units_Chw[:, :, :-1].copy()
        return chunks

    def decoded(self, frame: bytes, shape: tuple[int, ...], predictions: Predictions) -> NDArray[np.float32]:
        """A chunk as a reader restores and checks it."""
        levels = self.levels_of(shape[0])
        units_Chw = np.frombuffer(self.codec.decode(frame), np.uint8).reshape(shape).copy()
        if self.columns:
            np.cumsum(units_Chw, axis=2, dtype=np.uint8, out=units_Chw)
        if self.differences:
            row_deltas.add_up(units_Chw)
        if self.leaves_out:
            implied_class.fill_in(units_Chw, levels, self.chunk_px)
        else:
            assert (units_Chw.sum(axis=0, dtype=np.uint32) == levels).all()
        return simplex.decode(units_Chw, levels)


@dataclass(frozen=True)
class Logits:
    """`cache.kind: logits`, from which soft targets of any temperature and class map are made at reading."""

    bits: int
    codec: Codec = field(default_factory=lambda: Zstd(ZSTD_LEVEL))
    chunk_px: int = CHUNK_PX

    def bound(self, predictions: Predictions) -> float:
        rows, columns = predictions.softening.class_map.shape
        return logits.error_bound(self.bits, rows, columns, predictions.softening.temperature)

    def encoded(self, predictions: Predictions, tile: int) -> list[tuple[bytes, tuple[int, ...]]]:
        chunks = split(logits.encode(predictions.logits[tile], self.bits), self.chunk_px)
        return [(bytes(self.codec.encode(units_Chw.copy())), units_Chw.shape) for units_Chw in chunks]

    def decoded(self, frame: bytes, shape: tuple[int, ...], predictions: Predictions) -> NDArray[np.float32]:
        units_Chw = np.frombuffer(self.codec.decode(frame), simplex.storage_type(self.bits)).reshape(shape)
        assert logits.has_largest(units_Chw, self.bits)
        return logits.soft_targets(units_Chw, self.bits, predictions.softening)


DEFAULT, TINY = "8 bits: cache.bits 8", "6 bits: cache.bits 6"
WAYS: dict[str, Way | Logits] = {
    DEFAULT: Way(8),
    "8 bits, plain": Way(8, rounding=plain),
    "8 bits, no differences": Way(8, differences=False),
    "8 bits, plain, no differences": Way(8, rounding=plain, differences=False),
    "8 bits, all classes": Way(8, leaves_out=False),
    "8 bits, 254 levels": Way(8, levels=254),
    "8 bits, columns too": Way(8, columns=True),
    "8 bits, zstd 3": Way(8, Zstd(3)),
    "8 bits, zstd 16": Way(8, Zstd(16)),
    "8 bits, chunks of 128 px": Way(8, chunk_px=128),
    "8 bits, chunks of 512 px": Way(8, chunk_px=512),
    "7 bits": Way(7),
    TINY: Way(6),
    "5 bits": Way(5),
    "4 bits: cache.bits 4": Way(4),
    "logits, 8 bits: cache.kind logits": Logits(8),
    "logits, 16 bits": Logits(16),
}


@dataclass
class Outcome:
    """Bytes and milliseconds a square of `CROP_PX`, and errors of probabilities; gradient's as a share of a fresh student's."""

    bytes_per_pixel: float
    bound: float
    max_error: float
    mean_error: float
    block_error: float  # the mean error of means of `BLOCK_PX` squares
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
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    ask_for_huge_pages()  # as the commands do, for both readers
    keep_freed_memory()
    config = load_config(options.config, options.overrides)
    found, reads = {}, {}
    asked, class_map = list(teacher_logits(config, options.tiles)), config.class_map_matrix()
    for temperature in options.temperature or [config.distill.temperature]:
        softening = logits.Softening(temperature, class_map)
        soft_targets = SoftTargets(softening, torch.device("cpu"))
        tiles = [soft_targets(z_CHW[None])[0].numpy() for z_CHW in asked]
        predictions = Predictions(tiles, [z_CHW.numpy() for z_CHW in asked], softening)
        found[temperature] = {name: measure(predictions, way) for name, way in WAYS.items()}
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


def teacher_logits(config, count: int) -> Iterator[torch.Tensor]:
    """The teacher's predictions, float32 `(C_t, H, W)`, on tiles spread evenly over the training set."""
    tiles = list_tiles(config.data, "train")
    stretch = resolve_stretch(config.data, tiles)
    teacher = open_teacher(config, complete_recipe(config, stretch, None), resolve_device(None))
    for tile in tiles[:: max(1, len(tiles) // count)][:count]:
        image_HWC = read_image(tile.image, config.data.bands, stretch)
        yield teacher.logits(image_HWC[None])[0].float().cpu()


def measure(predictions: Predictions, way: Way | Logits) -> Outcome:
    """Bytes, times and errors of a way over all pixels of all tiles."""
    num_classes, pixels = predictions.probs[0].shape[0], sum(probs_CHW[0].size for probs_CHW in predictions.probs)
    size, encoding, decoding = 0, 0.0, 0.0
    largest, total, squares, gradient, signed = 0.0, 0.0, 0.0, 0.0, np.zeros(num_classes)
    of_blocks = []
    for tile, probs_CHW in enumerate(predictions.probs):
        start = time.thread_time()
        chunks = way.encoded(predictions, tile)
        encoding += time.thread_time() - start
        size += sum(len(frame) + 4 for frame, _ in chunks)
        start = time.thread_time()
        decoded = [way.decoded(*chunk, predictions) for chunk in chunks]
        decoding += time.thread_time() - start
        for exact_Chw, found_Chw in zip(split(probs_CHW, way.chunk_px), decoded, strict=True):
            errors = found_Chw.astype(np.float64) - exact_Chw
            largest = max(largest, np.abs(errors).max())
            total += np.abs(errors).sum()
            squares += (errors**2).sum()
            gradient += ((exact_Chw - 1 / num_classes) ** 2).sum()
            signed += errors.sum(axis=(1, 2))
            of_blocks.append(np.abs(block_means(errors)).ravel())
    squares_of_crops = pixels / CROP_PX**2
    return Outcome(
        bytes_per_pixel=size / pixels,
        bound=way.bound(predictions),
        max_error=float(largest),
        mean_error=total / pixels / num_classes,
        block_error=float(np.concatenate(of_blocks).mean()),
        largest_class_bias=float(np.abs(signed).max() / pixels),
        gradient_error=float(np.sqrt(squares / gradient)),
        encode_ms=1e3 * encoding / squares_of_crops,
        decode_ms=1e3 * decoding / squares_of_crops,
    )


def block_means(errors_Chw: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over whole squares of `BLOCK_PX`."""
    num_classes, height, width = (
        side - side % BLOCK_PX if axis else side for axis, side in enumerate(errors_Chw.shape)
    )
    whole_Chw = errors_Chw[:, :height, :width]
    return whole_Chw.reshape(num_classes, height // BLOCK_PX, BLOCK_PX, width // BLOCK_PX, BLOCK_PX).mean(axis=(2, 4))


def split(tile_CHW: NDArray, chunk_px: int) -> list[NDArray]:
    """The chunks of a tile. Those at its borders are not padded here: padding costs next to nothing."""
    _, height, width = tile_CHW.shape
    return [
        tile_CHW[:, top : top + chunk_px, left : left + chunk_px]
        for top in range(0, height, chunk_px)
        for left in range(0, width, chunk_px)
    ]


def compare_reads(config, tiles: Tiles, bits: int) -> dict[str, float]:
    """Milliseconds of the same random crops as float32, and bytes a pixel on disk: kdpipe's cache, its pack, and zarr's defaults."""
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
        packed = SoftTargetCache.open(pack(f"{folder}/kdpipe.zarr", f"{folder}/pack.zarr.zip").files[0])
        arrays = {name: zarr.open_array(f"{folder}/zarr.zarr/{name}", mode="r") for name in names}
        for name in names:  # the first touch, which compares a tile's digest and opens it, is once a process
            cache.read(name), packed.read(name), arrays[name][:]
        rng = np.random.default_rng(0)
        seconds: dict[str, list[float]] = {"kdpipe": [], "pack": [], "zarr": []}
        processor: dict[str, list[float]] = {"kdpipe": [], "pack": [], "zarr": []}
        for _ in range(READS):
            name = names[rng.integers(len(names))]
            sides = [min(CROP_PX, side) for side in cache.size(name)]
            top, left = (
                int(rng.integers(whole - side + 1)) for whole, side in zip(cache.size(name), sides, strict=True)
            )
            times = [(time.perf_counter(), time.process_time())]
            for reader in (cache, packed):
                reader.read(name, (top, left, *sides))
                times.append((time.perf_counter(), time.process_time()))
            arrays[name][:, top : top + sides[0], left : left + sides[1]].astype(np.float32)
            times.append((time.perf_counter(), time.process_time()))
            for what, before, after in zip(seconds, times[:-1], times[1:], strict=True):
                seconds[what].append(after[0] - before[0])
                processor[what].append(after[1] - before[1])
        sizes = {
            what: sum(file.stat().st_size for file in Path(folder, f"{what}.zarr").rglob("*") if file.is_file())
            for what in ("kdpipe", "zarr")
        }
        sizes["pack"] = Path(folder, "pack.zarr.zip").stat().st_size
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
    for column in ("B/px", "max", "mean", f"of {BLOCK_PX}² px", "bias", "grad %", "enc", "dec"):
        table.add_column(column, justify="right")
    for name, found in outcomes.items():
        table.add_row(
            name,
            f"{found.bytes_per_pixel:.3f}",
            f"{255 * found.max_error:.2f}",
            f"{255 * found.mean_error:.2f}",
            f"{255 * found.block_error:.3f}",
            f"{255 * found.largest_class_bias:.2f}",
            f"{100 * found.gradient_error:.2f}",
            f"{found.encode_ms:.0f}",
            f"{found.decode_ms:.1f}",
            style="bold" if name in (DEFAULT, TINY) else "",
        )
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


if __name__ == "__main__":
    main()
