"""
What many classes cost: the share of a pixel's probability that rounding moves, bytes and times, by number of classes and bits.

    python tests/benchmarks/classes.py [CONFIG] [--classes 6 20 60 150] [--tiles 6] [--temperature 1] [--json FILE] [--set KEY=VALUE …]

No teacher of many classes is at hand, so one is made of the configured teacher: its logits on the tiles are clustered, and a pixel's
probability of each cluster falls with the distance to it, so that the likeliest has 0.8 on average, as in networks of ADE20K's 150
classes. Borders, textures and doubts are those of a real network. As many classes as the student has are its own targets.

Shapes: C classes, T the teacher's, H W a tile's pixels, K clusters, P pixels.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.cluster.vq import kmeans2
from size import split, teacher_logits

from kdpipe.cache.encoding import implied_class, logits, many_classes, row_deltas, simplex, steady_rounding
from kdpipe.cache.tile import CHUNK_PX, ZSTD_LEVEL
from kdpipe.configs import load_config
from kdpipe.pipeline.teacher.soft_targets import SoftTargets

CONFIDENCE = 0.8  # of the likeliest class, on average over pixels
SAMPLED_PX = 20_000  # of all tiles, that clusters are found by
BITS = (4, 6, 8, 16)
Tiles = list[NDArray[np.float32]]


@dataclass(frozen=True)
class Outcome:
    """Shares of a pixel's probability in other classes than the teacher's, bytes a pixel, and processor time a square of 512 px."""

    moved_mean: float
    moved_p99: float
    moved_most: float
    bytes_per_pixel: float
    encode_ms: float
    decode_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="demo")
    parser.add_argument("--classes", type=int, nargs="+", default=[6, 20, 60, 150])
    parser.add_argument("--tiles", type=int, default=6)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--json")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    asked = [z_THW.numpy() for z_THW in teacher_logits(config, options.tiles)]
    found = {}
    for num_classes in options.classes:
        if num_classes == len(config.classes.names):
            soft_targets = SoftTargets(
                logits.Softening(options.temperature, config.class_map_matrix()), torch.device("cpu")
            )
            tiles = [soft_targets(torch.from_numpy(z_THW)[None])[0].numpy() for z_THW in asked]
        else:
            tiles = [softened(p_KHW, options.temperature) for p_KHW in clustered(asked, num_classes)]
        found[num_classes] = {bits: measure(tiles, bits) for bits in BITS}
    show(found)
    if options.json:
        content = {count: {bits: asdict(outcome) for bits, outcome in rows.items()} for count, rows in found.items()}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")


def clustered(asked: Tiles, num_classes: int) -> Tiles:
    """Probabilities `(K, H, W)` of as many clusters of the logits, by their squared distances."""
    pixels_PT = np.concatenate([z_THW.reshape(len(z_THW), -1).T for z_THW in asked])
    rng = np.random.default_rng(0)
    sample_PT = pixels_PT[rng.choice(len(pixels_PT), min(SAMPLED_PX, len(pixels_PT)), replace=False)]
    centres_KT, _ = kmeans2(sample_PT.astype(np.float64), num_classes, minit="++", iter=10, seed=0)
    low, high = 1e-3, 1e3
    for _ in range(20):
        scale = float(np.sqrt(low * high))
        confidence = near(sample_PT.T[:, None], centres_KT, scale).max(axis=0).mean()
        low, high = (scale, high) if confidence > CONFIDENCE else (low, scale)
    return [near(z_THW, centres_KT, scale) for z_THW in asked]


def near(values_THW: NDArray[np.float32], centres_KT: NDArray[np.float64], scale: float) -> NDArray[np.float32]:
    """Softmax of the negative squared distances to the centres, divided by `scale`."""
    scores_KHW = 2 * np.tensordot(centres_KT, values_THW, axes=1) - (centres_KT**2).sum(axis=1)[:, None, None]
    return softmax(scores_KHW / scale)


def softened(probs_CHW: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    return softmax(np.log(np.maximum(probs_CHW, 1e-30)) / temperature)


def softmax(scores_CHW: NDArray) -> NDArray[np.float32]:
    weights_CHW = np.exp((scores_CHW - scores_CHW.max(axis=0)).astype(np.float64))
    return (weights_CHW / weights_CHW.sum(axis=0)).astype(np.float32)


def rounded(probs_CHW: NDArray[np.float32], bits: int, levels: int) -> NDArray:
    """The integers of all classes, as `codec.units_of` chooses them."""
    if levels != simplex.levels_of(bits, len(probs_CHW)):
        return many_classes.encode(probs_CHW, levels)
    if bits <= steady_rounding.MAX_BITS:
        return steady_rounding.encode(probs_CHW, bits, levels)
    return simplex.encode(probs_CHW, levels)


def measure(tiles: Tiles, bits: int) -> Outcome:
    """Moved probability, bytes and times over all pixels of all tiles."""
    levels, moved = many_classes.levels_of(bits, len(tiles[0])), []
    size, encoding, decoding = 0, 0.0, 0.0
    for probs_CHW in tiles:
        for chunk_Chw in split(probs_CHW, CHUNK_PX):
            start = time.thread_time()
            units_Chw = rounded(chunk_Chw, bits, levels)
            implied_class.leave_out(units_Chw, CHUNK_PX)
            row_deltas.take_differences(units_Chw)
            frame = bytes(Zstd(ZSTD_LEVEL).encode(np.ascontiguousarray(units_Chw)))
            encoding += time.thread_time() - start
            size += len(frame) + 4
            start = time.thread_time()
            stored_Chw = np.frombuffer(Zstd().decode(frame), units_Chw.dtype).reshape(units_Chw.shape).copy()
            row_deltas.add_up(stored_Chw)
            implied_class.fill_in(stored_Chw, levels, CHUNK_PX)
            decoded_Chw = simplex.decode(stored_Chw, levels)
            decoding += time.thread_time() - start
            moved.append(np.abs(decoded_Chw.astype(np.float64) - chunk_Chw).sum(axis=0).ravel() / 2)
    moved_P = np.concatenate(moved)
    squares = moved_P.size / 512**2
    return Outcome(
        moved_mean=float(moved_P.mean()),
        moved_p99=float(np.quantile(moved_P, 0.99)),
        moved_most=float(moved_P.max()),
        bytes_per_pixel=size / moved_P.size,
        encode_ms=1e3 * encoding / squares,
        decode_ms=1e3 * decoding / squares,
    )


def show(found: dict[int, dict[int, Outcome]]) -> None:
    table = Table(title="Probability in other classes, bytes and times", title_justify="left")
    for column in ("classes", "bits", "mean, %", "p99, %", "most, %", "B/px", "encode 512², ms", "decode, ms"):
        table.add_column(column, justify="right")
    for num_classes, rows in found.items():
        for bits, o in rows.items():
            shares = (f"{100 * share:.2f}" for share in (o.moved_mean, o.moved_p99, o.moved_most))
            times = (f"{o.encode_ms:.0f}", f"{o.decode_ms:.1f}")
            table.add_row(str(num_classes), str(bits), *shares, f"{o.bytes_per_pixel:.2f}", *times)
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
