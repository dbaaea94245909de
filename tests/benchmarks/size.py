"""
How few bytes hold a real teacher's soft targets, at which error, and how fast a crop of them is read: all ways side by side.

    python tests/benchmarks/size.py [CONFIG] [--tiles 12] [--temperature 1 2] [--json FILE] [--plot FILE] [--set KEY=VALUE …]

Asks the configuration's teacher about tiles spread over its training set, encodes its answers in every way of `WAYS`, and prints
bytes a pixel, errors and times; then writes the same answers once as kdpipe does and once as zarr-python does by default
(float16, one chunk a tile) into a temporary folder, and reads the same random crops from both in turns.

`pip install imagecodecs pcodec zstandard` adds JPEG-LS, JPEG XL, pcodec and dictionaries of Zstandard, which no cache is written with.

Shapes: C classes (of logits the teacher's), H W a tile's pixels, h w a chunk's.
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
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

from kdpipe.cache import SoftTargetCache
from kdpipe.cache.encoding import implied_class as rest
from kdpipe.cache.encoding import logits, simplex
from kdpipe.cache.encoding import row_deltas as key_rows
from kdpipe.cache.encoding import steady_rounding as steady
from kdpipe.cache.records import ImageDigest
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.tile import CHUNK_PX, ZSTD_LEVEL
from kdpipe.cache.writer import open_writer
from kdpipe.configs import load_config
from kdpipe.data.rasters import read_image
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.devices import ask_for_huge_pages, keep_freed_memory, resolve_device
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.teacher.frozen import open_teacher, soft_targets

CROP_PX = 512
READS = 300
BLOCK_PX = 8  # a network sees no single pixel: errors that cancel out over such a square hardly reach it
DICTIONARY_BYTES, SAMPLE_BYTES = 112_640, 16_384
Tiles = list[NDArray[np.float32]]


@dataclass(frozen=True)
class Answers:
    """The teacher's answers on all tiles, as soft targets `(C, H, W)` and as the logits that these are made of."""

    probs: Tiles
    logits: Tiles
    softening: logits.Softening


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
class Dictionary:
    """Zstandard with a dictionary, of which stock Zarr knows nothing; `trained` on chunks of other tiles."""

    level: int
    content: bytes = b""

    def trained(self, chunks: list[bytes]) -> "Dictionary":
        import zstandard

        samples = [
            chunk[start : start + SAMPLE_BYTES] for chunk in chunks for start in range(0, len(chunk), SAMPLE_BYTES)
        ]
        return replace(self, content=zstandard.train_dictionary(DICTIONARY_BYTES, samples, level=self.level).as_bytes())

    @cached_property
    def _both(self) -> tuple[Any, Any]:
        import zstandard

        content = zstandard.ZstdCompressionDict(self.content)
        content.precompute_compress(self.level)
        return zstandard.ZstdCompressor(dict_data=content), zstandard.ZstdDecompressor(dict_data=content)

    def encode(self, units_Chw: NDArray[np.uint8]) -> bytes:
        return bytes(self._both[0].compress(units_Chw.tobytes()))

    def decode(self, data: bytes) -> bytes:
        return bytes(self._both[1].decompress(data))


def plain(probs_CHW: NDArray[np.float32], bits: int, levels: int) -> NDArray[np.uint8]:
    """By largest remainder, each pixel alone."""
    return simplex.encode(probs_CHW, levels)


def diffused_down(probs_CHW: NDArray[np.float32], bits: int, levels: int) -> NDArray[np.uint8]:
    """By largest remainder of what is wanted and what the pixel above is short of. No bound is claimed: what is carried adds up."""
    num_classes, height, width = probs_CHW.shape
    units_CHW, short_CW, columns_W = (
        np.empty(probs_CHW.shape, np.uint8),
        np.zeros((num_classes, width)),
        np.arange(width),
    )
    for row in range(height):
        wanted_CW = probs_CHW[:, row] * np.float64(levels) + short_CW
        possible_CW = np.maximum(
            wanted_CW, 0
        )  # nothing is below zero; the likeliest class gives way, so that the sum is kept
        possible_CW[possible_CW.argmax(axis=0), columns_W] -= possible_CW.sum(axis=0) - levels
        units_CHW[:, row] = simplex.encode((possible_CW / levels).astype(np.float32)[:, None], levels)[:, 0]
        short_CW = wanted_CW - units_CHW[:, row]
    return units_CHW


def diffused_right(probs_CHW: NDArray[np.float32], bits: int, levels: int) -> NDArray[np.uint8]:
    """As `diffused_down`, from the pixel to the left."""
    return np.ascontiguousarray(diffused_down(probs_CHW.swapaxes(1, 2), bits, levels).swapaxes(1, 2))


def even(probs_CHW: NDArray[np.float32], bits: int, levels: int) -> NDArray[np.uint8]:
    """Even integers wherever the promise permits; the likeliest class of a tile gives way first, so that the sum is kept."""
    scaled_CHW, room = probs_CHW * np.float32(levels), steady.room(bits, levels, len(probs_CHW))
    lowest_CHW, highest_CHW = np.ceil(np.maximum(scaled_CHW - room, 0)), np.floor(scaled_CHW + room)
    units_CHW = np.clip(2 * np.rint(scaled_CHW / 2), lowest_CHW, highest_CHW)
    excess_HW = units_CHW.sum(axis=0) - levels
    for c in np.argsort(-probs_CHW.sum(axis=(1, 2))):
        less_HW = np.clip(units_CHW[c] - excess_HW, lowest_CHW[c], highest_CHW[c])
        excess_HW -= units_CHW[c] - less_HW
        units_CHW[c] = less_HW
    return np.where(excess_HW == 0, units_CHW, simplex.encode(probs_CHW, levels)).astype(np.uint8)


@dataclass(frozen=True)
class Way:
    """
    One way to store soft targets: bits that promise the bound, levels (the fewest for it if None), and what happens before the codec.

    `rounding` is `steady.encode`, by which values rarely change from row to row, or another of the functions above. `differences` are
    from the row above, `columns` from the column before as well, modulo 256; `classes` is -1 for differences from the class before, and
    1 for sums with it, as what a class gains others lose.
    """

    bits: int
    codec: Codec | Images | Pcodec | Dictionary
    levels: int | None = None
    leaves_out: bool = True
    rounding: Callable[[NDArray[np.float32], int, int], NDArray[np.uint8]] = steady.encode
    differences: bool = True
    columns: bool = False
    classes: int = 0
    chunk_px: int = CHUNK_PX

    def levels_of(self, num_classes: int) -> int:
        return self.levels or simplex.levels_of(self.bits, num_classes)

    def bound(self, answers: Answers) -> float | None:
        """What is promised; None where nothing is."""
        num_classes = len(answers.probs[0])
        if self.rounding is plain:
            return simplex.error_bound(self.levels_of(num_classes), num_classes)
        if self.rounding in (steady.encode, even):
            return steady.error_bound(self.bits, self.levels_of(num_classes), num_classes)
        return None

    def encoded(self, answers: Answers, tile: int) -> list[tuple[bytes, tuple[int, ...]]]:
        """The bytes of each chunk of a tile, and its shape."""
        chunks = self.prepared(answers.probs[tile])
        return [(bytes(self.codec.encode(units_Chw)), units_Chw.shape) for units_Chw in chunks]

    def prepared(self, probs_CHW: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
        """The integers of each chunk of a tile, as the codec gets them."""
        units_CHW = self.rounding(probs_CHW, self.bits, self.levels_of(len(probs_CHW)))
        chunks = [units_Chw.copy() for units_Chw in split(units_CHW, self.chunk_px)]
        for units_Chw in chunks:
            if self.leaves_out:
                rest.leave_out(units_Chw, self.chunk_px)
            if self.differences:
                key_rows.take_differences(units_Chw)
            if self.columns:
                units_Chw[:, :, 1:] -= units_Chw[:, :, :-1].copy()
            if self.classes:
                units_Chw[1:] += units_Chw[:-1] * np.uint8(self.classes % 256)
        return chunks

    def decoded(self, frame: bytes, shape: tuple[int, ...], answers: Answers) -> NDArray[np.float32]:
        """A chunk as a reader restores and checks it."""
        levels = self.levels_of(shape[0])
        units_Chw = np.frombuffer(self.codec.decode(frame), np.uint8).reshape(shape).copy()
        if self.classes:
            for before_hw, units_hw in itertools.pairwise(units_Chw):
                units_hw -= before_hw * np.uint8(self.classes % 256)
        if self.columns:
            np.cumsum(units_Chw, axis=2, dtype=np.uint8, out=units_Chw)
        if self.differences:
            key_rows.add_up(units_Chw)
        if self.leaves_out:
            rest.fill_in(units_Chw, levels, self.chunk_px)
        else:
            assert simplex.is_simplex(units_Chw, levels)
        return simplex.decode(units_Chw, levels)

    def of_each(self, answers: Answers) -> "list[Way]":
        """This way for each tile: a dictionary is trained on every other tile, and used for those between them."""
        if not isinstance(self.codec, Dictionary):
            return [self] * len(answers.probs)
        halves = []
        for others in (answers.probs[1::2], answers.probs[::2]):
            chunks = [units_Chw.tobytes() for probs_CHW in others for units_Chw in self.prepared(probs_CHW)]
            halves.append(replace(self, codec=self.codec.trained(chunks)))
        return [halves[tile % 2] for tile in range(len(answers.probs))]


@dataclass(frozen=True)
class Logits:
    """`cache.kind: logits`, from which soft targets of any temperature and class map are made at reading."""

    bits: int
    codec: Codec
    chunk_px: int = CHUNK_PX

    def bound(self, answers: Answers) -> float:
        return logits.error_bound(self.bits, len(answers.logits[0]), answers.softening.temperature)

    def encoded(self, answers: Answers, tile: int) -> list[tuple[bytes, tuple[int, ...]]]:
        chunks = split(logits.encode(answers.logits[tile], self.bits), self.chunk_px)
        return [(bytes(self.codec.encode(units_Chw.copy())), units_Chw.shape) for units_Chw in chunks]

    def decoded(self, frame: bytes, shape: tuple[int, ...], answers: Answers) -> NDArray[np.float32]:
        units_Chw = np.frombuffer(self.codec.decode(frame), simplex.storage_type(self.bits)).reshape(shape)
        assert logits.has_largest(units_Chw, self.bits)
        return logits.soft_targets(units_Chw, self.bits, answers.softening)

    def of_each(self, answers: Answers) -> "list[Logits]":
        return [self] * len(answers.logits)


DEFAULT, TINY = "8 bits: cache.bits 8", "6 bits: cache.bits 6"
ZSTD = Zstd(ZSTD_LEVEL)
WAYS: dict[str, Way | Logits] = {
    "8 bits, 255 levels, all classes, plain, as they are, zstd 3 (format 1)": Way(
        8, Zstd(3), levels=255, leaves_out=False, rounding=plain, differences=False
    ),
    "8 bits, plain, as they are (format 3)": Way(8, ZSTD, rounding=plain, differences=False),
    "8 bits, plain": Way(8, ZSTD, rounding=plain),
    "8 bits, as they are": Way(8, ZSTD, differences=False),
    "8 bits, all classes": Way(8, ZSTD, leaves_out=False),
    DEFAULT: Way(8, ZSTD),
    "8 bits, 254 levels": Way(8, ZSTD, levels=254),
    "8 bits, columns too": Way(8, ZSTD, columns=True),
    "8 bits, zstd 1": Way(8, Zstd(1)),
    "8 bits, zstd 3": Way(8, Zstd(3)),
    "8 bits, zstd 5": Way(8, Zstd(5)),
    "8 bits, zstd 16": Way(8, Zstd(16)),
    "8 bits, gzip 6": Way(8, GZip(6)),
    "8 bits, blosc zstd 5": Way(8, Blosc("zstd", 5, Blosc.NOSHUFFLE)),
    "8 bits, blosc zstd 5, bitshuffle": Way(8, Blosc("zstd", 5, Blosc.BITSHUFFLE)),
    "8 bits, chunks of 128 px": Way(8, ZSTD, chunk_px=128),
    "8 bits, chunks of 512 px": Way(8, ZSTD, chunk_px=512),
    "7 bits": Way(7, ZSTD),
    TINY: Way(6, ZSTD),
    "6 bits, plain, as they are (format 3)": Way(6, ZSTD, rounding=plain, differences=False),
    "6 bits, zstd 3": Way(6, Zstd(3)),
    "5 bits": Way(5, ZSTD),
    "4 bits: cache.bits 4": Way(4, ZSTD),
    "8 bits, even values, as they are": Way(8, ZSTD, rounding=even, differences=False),
    "8 bits, differences from the class before too": Way(8, ZSTD, classes=-1),
    "8 bits, sums with the class before too": Way(8, ZSTD, classes=1),
    "8 bits, sums with the class before, not rows": Way(8, ZSTD, differences=False, classes=1),
    "8 bits, error diffused down": Way(8, ZSTD, rounding=diffused_down),
    "8 bits, error diffused right": Way(8, ZSTD, rounding=diffused_right),
    "7 bits, error diffused down": Way(7, ZSTD, rounding=diffused_down),
    "6 bits, error diffused down": Way(6, ZSTD, rounding=diffused_down),
    "6 bits, error diffused right": Way(6, ZSTD, rounding=diffused_right),
    "4 bits, error diffused down": Way(4, ZSTD, rounding=diffused_down),
    "logits, 8 bits: cache.kind logits": Logits(8, ZSTD),
    "logits, 16 bits": Logits(16, ZSTD),
}
if importlib.util.find_spec("imagecodecs"):
    for label, codec in (
        ("JPEG-LS", Images("jpegls", {})),
        ("JPEG XL, effort 7", Images("jpegxl", {"lossless": True, "effort": 7})),
    ):
        WAYS[f"8 bits, plain, as they are, {label}"] = Way(8, codec, rounding=plain, differences=False)
        WAYS[f"8 bits, as they are, {label}"] = Way(8, codec, differences=False)
if importlib.util.find_spec("pcodec"):
    WAYS["8 bits, as they are, pcodec 8"] = Way(8, Pcodec(), differences=False)
if importlib.util.find_spec("zstandard"):
    WAYS["8 bits, with a dictionary"] = Way(8, Dictionary(ZSTD_LEVEL))
    WAYS["8 bits, chunks of 128 px, with a dictionary"] = Way(8, Dictionary(ZSTD_LEVEL), chunk_px=128)


@dataclass
class Outcome:
    """Bytes and milliseconds a square of `CROP_PX`, and errors of probabilities; gradient's as a share of a fresh student's."""

    bytes_per_pixel: float
    bound: float | None  # None where nothing is promised
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
    parser.add_argument("--plot")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    ask_for_huge_pages()  # as the commands do, for both readers
    keep_freed_memory()
    config = load_config(options.config, options.overrides)
    found, reads = {}, {}
    asked, class_map = list(teacher_logits(config, options.tiles)), config.class_map_matrix()
    for temperature in options.temperature or [config.distill.temperature]:
        tiles = [soft_targets(z_CHW[None], torch.from_numpy(class_map), temperature)[0].numpy() for z_CHW in asked]
        answers = Answers(tiles, [z_CHW.numpy() for z_CHW in asked], logits.Softening(temperature, class_map))
        found[temperature] = {name: measure(answers, way) for name, way in WAYS.items()}
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


def measure(answers: Answers, way: Way | Logits) -> Outcome:
    """What a way costs and loses over all pixels of all tiles."""
    num_classes, pixels = answers.probs[0].shape[0], sum(probs_CHW[0].size for probs_CHW in answers.probs)
    size, encoding, decoding = 0, 0.0, 0.0
    largest, total, squares, gradient, signed = 0.0, 0.0, 0.0, 0.0, np.zeros(num_classes)
    of_blocks = []
    for tile, (probs_CHW, of_tile) in enumerate(zip(answers.probs, way.of_each(answers), strict=True)):
        start = time.thread_time()
        chunks = of_tile.encoded(answers, tile)
        encoding += time.thread_time() - start
        size += sum(len(frame) + 4 for frame, _ in chunks)
        start = time.thread_time()
        decoded = [of_tile.decoded(*chunk, answers) for chunk in chunks]
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
        bound=way.bound(answers),
        max_error=float(largest),
        mean_error=total / pixels / num_classes,
        block_error=float(np.concatenate(of_blocks).mean()),
        largest_class_bias=float(np.abs(signed).max() / pixels),
        gradient_error=float(np.sqrt(squares / gradient)),
        encode_ms=1e3 * encoding / squares_of_crops,
        decode_ms=1e3 * decoding / squares_of_crops,
    )


def block_means(errors_Chw: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over squares of `BLOCK_PX`, of whole squares alone."""
    num_classes, height, width = (
        side - side % BLOCK_PX if axis else side for axis, side in enumerate(errors_Chw.shape)
    )
    whole_Chw = errors_Chw[:, :height, :width]
    return whole_Chw.reshape(num_classes, height // BLOCK_PX, BLOCK_PX, width // BLOCK_PX, BLOCK_PX).mean(axis=(2, 4))


def split(tile_CHW: NDArray, chunk_px: int) -> list[NDArray]:
    """The chunks of a tile; those at its borders are smaller here, as padding costs next to nothing."""
    _, height, width = tile_CHW.shape
    return [
        tile_CHW[:, top : top + chunk_px, left : left + chunk_px]
        for top in range(0, height, chunk_px)
        for left in range(0, width, chunk_px)
    ]


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


GROUPS = {  # what a point belongs to, and its colour
    "cache.bits 8, 6 and 4": "tab:red",
    "other codecs, levels, chunks, bits": "tab:blue",
    "rounded plainly or to even values, or no differences": "tab:orange",
    "error diffused": "tab:purple",
    "not stock Zarr: JPEG XL, JPEG-LS, pcodec, dictionaries": "tab:green",
    "kind: logits (16 bits, 12 bytes, are not drawn)": "tab:brown",
}
DRAWN_BYTES = 4  # beyond are the logits of 16 bits, and nothing between
AXES = {  # what a column shows, its scale, its ticks, and where it begins and ends: labels stand on the left
    "max_error": ("largest |Δp| in 255ths", 255, (1, 2, 4, 8, 16, 32), (0.2, 64)),
    "mean_error": ("mean |Δp| in 255ths", 255, (0.125, 0.25, 0.5, 1, 2, 4), (0.03, 8)),
    "decode_ms": (f"ms to decode {CROP_PX}², one thread", 1, (2, 5, 10, 20, 50, 100), (0.4, 300)),
}


def group_of(name: str) -> str:
    way, groups = WAYS[name], list(GROUPS)
    if isinstance(way, Logits):
        return groups[5]
    if ": cache.bits" in name:
        return groups[0]
    if isinstance(way.codec, Images | Pcodec | Dictionary):
        return groups[4]
    if way.rounding in (diffused_down, diffused_right):
        return groups[3]
    return groups[1] if way.rounding is steady.encode and way.differences else groups[2]


def draw(found: dict[float, dict[str, Outcome]], path: Path) -> None:
    """Bytes a pixel against the largest error, the mean error and the time of decoding, one row of panels a temperature."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(found),
        len(AXES),
        figsize=(15, 4.5 * len(found) + 0.8),
        squeeze=False,
        sharex="col",
        sharey=True,
        layout="constrained",
    )
    for row, (temperature, outcomes) in zip(panels, found.items(), strict=True):
        for panel, (key, (label, scale, ticks, ends)) in zip(row, AXES.items(), strict=True):
            for name, outcome in outcomes.items():
                if outcome.bytes_per_pixel > DRAWN_BYTES:
                    continue
                way, place = WAYS[name], (scale * getattr(outcome, key), outcome.bytes_per_pixel)
                more, chosen = isinstance(way, Way) and (way.columns or way.classes), ": cache.bits" in name
                panel.scatter(
                    *place, s=30, color=GROUPS[group_of(name)], marker="v" if more else "o", zorder=4 if chosen else 3
                )
                if chosen:
                    panel.annotate(
                        name.rpartition(": ")[2], place, (0.02, place[1]), textcoords=("axes fraction", "data"), va="center",
                        fontsize=9, color="tab:red", arrowprops={"arrowstyle": "-", "color": "tab:red", "linewidth": 0.6},
                    )  # fmt: skip
            if key == "max_error":
                for bits, limit in ((8, 1.0), (6, 0.5)):
                    panel.plot(255 / simplex.total(bits), limit, "k_", markersize=18, zorder=5)
            panel.set(xscale="log", yscale="log", xlabel=label, title=f"T {temperature:g}", xlim=ends)
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.set_yticks([0.25, 0.5, 1, 2], ["0.25", "0.5", "1", "2"])
            panel.tick_params(labelbottom=True)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        row[0].set_ylabel("bytes a pixel")
    handles = [
        pyplot.Line2D([], [], color=colour, marker="o", linestyle="", label=label) for label, colour in GROUPS.items()
    ]
    handles += [
        pyplot.Line2D(
            [], [], color="tab:blue", marker="v", linestyle="", label="differences along columns, or between classes"
        ),
        pyplot.Line2D([], [], color="black", marker="_", linestyle="", label="to reach"),
    ]
    figure.legend(handles=handles, fontsize=9, ncols=3, loc="outside lower center")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
