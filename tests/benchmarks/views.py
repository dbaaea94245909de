"""
Cost of the teacher's two views, whole tiles and recorded crops: bytes, teacher seconds, samples and steps, side by side.

    python tests/benchmarks/views.py [CONFIG] [--tiles 8] [--views 8] [--steps 6] [--json FILE] [--set KEY=VALUE …]

CONFIG describes whole tiles; its first labelled tiles are used, and caches and runs lie in a temporary folder. Times are CPU seconds of the
process, which a busy machine affects least, and the three kinds of steps take turns. Everything runs on the CPU with `train.workers` 0,
because the clock of a process does not include its workers.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kdpipe.configs import load_config
from kdpipe.configs.schema import Config
from kdpipe.data.augment import views_per_sample
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.progress import Silent
from kdpipe.pipeline.runs import layout
from kdpipe.pipeline.training.run import train, with_mode
from kdpipe.pipeline.training.targets import open_targets, training_samples

ROUNDS = 3
WARM_UP_STEPS = 1
WARM_UP_SAMPLES = 16  # the first reads of shards and images are slower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="dubai/linknet_kd")
    parser.add_argument("--tiles", type=int, default=8)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        layout.WEIGHTS_DIR, layout.LOGS_DIR = Path(folder) / "weights", Path(folder) / "logs"
        whole = load_config(options.config, options.overrides)
        root = few_tiles(whole, options.tiles, Path(folder) / "tiles")
        common = [
            *options.overrides, f"data.train=[{root}]", "data.unlabelled=[]", "data.val=[]", "train.epochs=1000",
            f"train.max_steps={options.steps}", "train.workers=0",
        ]  # fmt: skip
        crops = ["distill.teacher_view=crop", f"cache.views={options.views}"]
        configs = {
            "tile": load_config(options.config, [*common, f"cache.path={folder}/tile.zarr"]),
            "crop": load_config(options.config, [*common, *crops, f"cache.path={folder}/crop.zarr"]),
        }
        figures = {view: {**stage_one(config, device), **samples(config, device)} for view, config in configs.items()}
        figures["none"] = samples(with_mode(configs["tile"], "none"), device)
        runs = {**configs, "none": with_mode(configs["tile"], "none")}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, config in runs.items():
                clock = StepClock()
                train(config, device, overwrite=True, progress=clock)
                seconds[name] += clock.seconds[WARM_UP_STEPS:]
    for name, values in seconds.items():
        figures[name]["step_seconds"] = statistics.median(values)
    predictions = {"tile": views_per_sample(whole.train), "crop": 1.0}
    for view, count in predictions.items():
        per_step = count * whole.train.samples_per_step * figures[view]["teacher_seconds_each"]
        figures[view]["online_step_seconds"] = figures["none"]["step_seconds"] + per_step
    report(figures, options)
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), "figures": figures}, indent=1) + "\n")


class StepClock(Silent):
    """Progress that records the CPU seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @contextmanager
    def bar(self, *args: Any, **options: Any) -> Iterator[Any]:
        last = time.process_time()

        def advance(steps: int = 1, **figures: float) -> None:
            nonlocal last
            now = time.process_time()
            self.seconds.append(now - last)
            last = now

        yield advance


def few_tiles(config: Config, count: int, folder: Path) -> Path:
    """A root with links to the first labelled tiles."""
    for tile in [tile for tile in list_tiles(config.data, "train") if tile.mask is not None][:count]:
        for kind, file in ((config.data.images, tile.image), (config.data.masks, tile.mask)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            (folder / kind / file.name).symlink_to(file)
    return folder


def stage_one(config: Config, device: torch.device) -> dict[str, float]:
    start = time.process_time()
    summary = precompute(config, device, Silent())
    seconds = time.process_time() - start
    share = summary.teacher_seconds / summary.seconds
    return {
        "predictions": summary.computed,
        "megapixels": summary.pixels / 1e6,
        "bytes": summary.bytes_written,
        "seconds": seconds,
        "teacher_seconds_each": seconds * share / summary.computed,
    }


def samples(config: Config, device: torch.device) -> dict[str, float]:
    """Mean CPU seconds of a sample in one thread; a mean, because mosaics cost more than single views."""
    tiles = list_tiles(config.data, "train")
    dataset = training_samples(config, tiles, None, open_targets(config, tiles, None, device).source)
    taken = []
    count = max(64, len(tiles) * (config.cache.views or 0))
    for k in range(WARM_UP_SAMPLES + count):
        start = time.thread_time()
        dataset[k]
        taken.append(time.thread_time() - start)
    return {"sample_seconds": statistics.fmean(taken[WARM_UP_SAMPLES:])}


def report(figures: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    tile, crop, none = figures["tile"], figures["crop"], figures["none"]
    table = Table(title=f"{options.config}: {options.tiles} tiles, {options.views} views of each", title_justify="left")
    for column in ("", "whole tiles", "recorded crops", "no teacher"):
        table.add_column(column, justify="right" if column else "left")
    rows = [
        ("predictions of the teacher", "predictions", "{:.0f}"), ("megapixels", "megapixels", "{:.2f}"), ("bytes", "bytes", "{:,.0f}"),
        ("stage one, s", "seconds", "{:.1f}"), ("the teacher, s per prediction", "teacher_seconds_each", "{:.3f}"),
        ("a sample, ms", "sample_seconds", "ms"), ("a step, s", "step_seconds", "{:.3f}"),
        ("a step with the live teacher, s", "online_step_seconds", "{:.2f}"),
    ]  # fmt: skip
    for title, key, pattern in rows:
        cells = []
        for column in (tile, crop, none):
            value = column.get(key)
            cells.append("" if value is None else f"{1000 * value:.1f}" if pattern == "ms" else pattern.format(value))
        table.add_row(title, *cells)
    Console().print(table)
    even = tile["teacher_seconds_each"] / crop["teacher_seconds_each"]
    print(f"stage one costs as much as whole tiles at {even:.1f} views per tile")


if __name__ == "__main__":
    main()
