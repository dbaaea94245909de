"""
Time of each part of a tile in stage one and of a training step, one after another, without the threads that overlap them.

    python tests/benchmarks/where.py [CONFIG] [--tiles 12] [--steps 12] [--json FILE] [--set KEY=VALUE …]

A tile: reading, the network, softmax and class map, rounding, compression, writing its files. A step from the cache: reading and
augmenting, forward, loss, backward, optimizer. Medians without the first. Needs no cache: it builds one in a temporary folder.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kdpipe.cache import SoftTargetCache, codec
from kdpipe.cache import tile as tile_module
from kdpipe.cache.encoding.logits import Softening
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.writer import open_writer
from kdpipe.configs import load_config
from kdpipe.data.dataset import TrainTiles
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.devices import ask_for_huge_pages, keep_freed_memory, resolve_device
from kdpipe.pipeline.distributed import open_fabric
from kdpipe.pipeline.losses import distillation_loss
from kdpipe.pipeline.models.normalize import normalized
from kdpipe.pipeline.models.student import build_student
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.subjects import subjects
from kdpipe.pipeline.teacher.frozen import open_teacher
from kdpipe.pipeline.teacher.soft_targets import SoftTargets
from kdpipe.pipeline.training.loaders import train_loader, unpacked
from kdpipe.pipeline.training.optimizer import make_optimizer


class Parts:
    """Seconds of each part by tile or step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name].append(time.perf_counter() - start)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(seconds[1:]) for name, seconds in self.seconds.items()}


def of_a_tile(config, device: torch.device, count: int) -> dict[str, float]:
    """Median seconds of the parts of stage one; leaves a cache of `count` tiles at `cache.path`."""
    part = Parts(device)
    tiles = list_tiles(config.data, "train")
    stretch = resolve_stretch(config.data, tiles)
    recipe = complete_recipe(config, stretch, None)
    teacher = open_teacher(config, recipe, device)
    soft_targets = SoftTargets(Softening(config.distill.temperature, config.class_map_matrix()), device)
    with open_writer(open_storage(config.cache.path), recipe, device=str(device), libraries={}) as writer:
        writer.begin()
        records = []
        for subject in subjects(config, tiles, stretch)[:count]:
            with part("read and decode the image"):
                image_HWC, digest = subject.load()
            with part("network"):
                logits_1CHW = teacher.logits(image_HWC[None])
            with part("softmax and class map"):
                probs_CHW = soft_targets(logits_1CHW)[0].cpu().numpy()
            with part("rounding"):
                units_CHW, lost = codec.units_of(probs_CHW, recipe)
            with part("differences, compression, digests"):
                units_CHW, lost = codec.encode_units(units_CHW, lost, recipe)
                shard, metadata, record = tile_module.encode_tile(units_CHW, subject.id, digest, recipe, lost)
            with part("write and sync"):
                path = tile_module.tile_path(record.id)
                writer.storage.write(f"{path}/{tile_module.SHARD_NAME}", shard)
                writer.storage.write(f"{path}/{tile_module.METADATA_NAME}", metadata)
            records.append(record)
        writer.finish(records)
    return part.medians()


def of_a_step(config, device: torch.device, steps: int) -> dict[str, float]:
    """Median seconds of the parts of a training step from the cache at `cache.path`."""
    part = Parts(device)
    tiles = list_tiles(config.data, "train")
    stretch = resolve_stretch(config.data, tiles)
    student = build_student(config.student.architecture, len(config.classes.names), encoder=config.student.encoder)
    fabric = open_fabric(config, device)
    model, optimizer = fabric.setup(
        student.to(memory_format=torch.channels_last), make_optimizer(student, config.train)
    )
    model.train()
    cache = SoftTargetCache.open(config.cache.path)
    samples = TrainTiles([tile for tile in tiles if tile.id in cache.tile_ids], config, stretch, cache)
    batches = iter(train_loader(config, samples, 0, 0, pin=False))
    for _ in range(steps):
        with part("read and augment (no worker)"):
            batch = {name: value.to(device) for name, value in next(batches).items()}
        with part("forward"):
            output = model(normalized(batch["image"], config.student.normalize))
            logits, auxiliary = output if isinstance(output, tuple) else (output, None)
        with part("loss"):
            terms = distillation_loss(
                logits, batch["mask"], batch["inside"], unpacked(batch["target"], batch["inside"]), batch.get("entropy_error"),
                alpha=config.distill.alpha, temperature=config.distill.temperature,
                ignore_index=config.classes.ignore_index, auxiliary_NCHW=auxiliary,
            )  # fmt: skip
        with part("backward"):
            fabric.backward(terms.total)
        with part("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
    return part.medians()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="demo")
    parser.add_argument("--tiles", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    ask_for_huge_pages()
    keep_freed_memory()
    device = resolve_device(None)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            options.config, [*options.overrides, f"cache.path={folder}/cache.zarr", "train.epochs=1000"]
        )
        found = {"a tile": of_a_tile(config, device, options.tiles)}
        found["a step"] = of_a_step(config, device, options.steps)
    for title, parts in found.items():
        table = Table(title=f"{title}, {options.config}", title_justify="left")
        for column in ("part", "ms", "share"):
            table.add_column(column, justify="left" if column == "part" else "right")
        for name, seconds in parts.items():
            table.add_row(name, f"{1e3 * seconds:.1f}", f"{100 * seconds / sum(parts.values()):.1f} %")
        table.add_row("all", f"{1e3 * sum(parts.values()):.1f}", "")
        Console().print(table)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
