"""
Stage one: the teacher's answer to every training tile, as soft targets or as logits, computed once and stored.

Threads read and decode ahead, the device computes, other threads encode and write; each waits for nobody but its input. Where
there are other processes to do it (`Workers`), they are given the batches, and this one keeps the lock, the order and the end.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.cache.integrity import find_damage
from kdpipe.cache.recipe import CacheRecipe
from kdpipe.cache.records import ImageDigest, TileRecord
from kdpipe.cache.shard import SpilledShard
from kdpipe.cache.spill import Spill
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.storage.lock import writer_lock
from kdpipe.cache.tile import encode_bands
from kdpipe.cache.writer import (
    CacheWriter,
    open_writer,
    restore_root,
    whole_manifest,
)
from kdpipe.configs.errors import DataError, DiskFull, Interrupted, summarise
from kdpipe.configs.schema import Config
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import Tile, list_tiles
from kdpipe.pipeline.memory import fits_in_memory, sized, teacher_advice
from kdpipe.pipeline.precompute.batches import LoadedBatch, load_batch_or_scene, make_batches, teacher_batch_size
from kdpipe.pipeline.precompute.costs import note_costs, teacher_seconds
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.plan import Plan, Summary, already_text, begun, make_plan, nothing_to_do
from kdpipe.pipeline.precompute.subjects import Stretch, Subject, WholeTile, predictions_per_sample, subjects
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.teacher import precision
from kdpipe.pipeline.teacher.frozen import Encoded, FrozenTeacher, Images, open_teacher
from kdpipe.pipeline.text import size_text
from kdpipe.pipeline.versions import library_versions

CPU_THREADS = 2, 2  # that read, and that encode and write, beside a network which takes the cores itself
PENDING_PX = 2**23  # of computed tiles that may wait for each two that write, else the device waits: bounds memory
PREDICT_AFTER = 3  # finished tiles from which the rest of the bytes are predicted


class Workers(Protocol):
    """Other processes that compute tiles: see `cluster.Cluster`."""

    def start(self, stop: threading.Event) -> torch.device:
        """Bring them up, and return the device that they all compute on; raises `ConfigError` where they differ."""

    def resolved(
        self, config: Config, recipe: CacheRecipe, tiles: list[Tile], stretch: Stretch, stop: threading.Event
    ) -> CacheRecipe:
        """The recipe of a new cache as `precision.resolve` has it on their device; starts them if need be."""

    def compute(
        self, config: Config, plan: Plan, writer: CacheWriter, batches: list[list[Subject]], summary: Summary,
        stop: threading.Event,
    ) -> Generator[TileRecord, None, None]:  # fmt: skip
        """Have the missing tiles of `batches` stored, yielding each one's record; raises `Interrupted` once `stop` is set."""


def precompute(
    config: Config,
    device: torch.device,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    *,
    repair: bool = False,
    workers: Workers | None = None,
) -> Summary:
    """
    Bring the cache to completion and say what was done; does nothing where nothing is missing.

    With `repair` every byte of the finished tiles is read first, and tiles that are damaged (in the summary's `damaged`) are
    computed again. `workers` compute in the place of this process, on their own device, to the same bytes. Images that
    cannot be read are in the summary's `failed`, and the cache stays unfinished. Raises what `make_plan` raises, `CacheLocked`,
    `DiskFull`, and `Interrupted` once `stop` is set: finished tiles are kept in every case.
    """
    progress, stop = progress or Silent(), stop or threading.Event()
    start = time.perf_counter()
    if repair:
        _restore_root(config, progress)

    def resolved(recipe: CacheRecipe, tiles: list[Tile], stretch: Stretch) -> CacheRecipe:
        if workers is not None:
            return workers.resolved(config, recipe, tiles, stretch, stop)
        return precision.resolve(config, recipe, tiles, stretch, device)

    written = open_storage(config.cache.path).last_write()
    plan = make_plan(config, resolved)
    if plan.is_done and not repair:
        summary = nothing_to_do(plan, config)
        progress.say(already_text(summary))
        return summary
    summary = begun(plan, config)
    if workers is not None:
        device = workers.start(stop)
    batch_size = teacher_batch_size(config, device)
    advice = partial(teacher_advice, config, batch_size, device)
    with (
        _counted(summary, config, plan, start),
        fits_in_memory("while precomputing (reading, the teacher, or encoding)", advice()),
        open_writer(plan.storage, plan.recipe, device=str(device), libraries=library_versions()) as writer,
    ):
        if written is None or plan.storage.last_write() != written:
            plan = make_plan(config, resolved)  # another process may have finished tiles before the lock was ours
        if repair:
            plan = _without_damaged(plan, summary, progress)
        summary.kept = len(plan.finished)
        writer.begin()
        if plan.finished:
            progress.say(f"{len(plan.finished)} of {len(plan.tiles)} {summary.noun} are finished already and kept")
        records = dict(plan.finished)
        if plan.missing:
            missing = {tile.id for tile in plan.missing}
            batches, unreadable = make_batches(plan.tiles, plan.finished, batch_size)
            summary.failed |= unreadable
            batches = [batch for batch in batches if any(tile.id in missing for tile in batch)]
            if workers is None:
                teacher = open_teacher(config, plan.recipe, device)
                computed = _compute(plan, teacher, writer, batches, stage_threads(device), advice, summary, stop)
            else:
                computed = workers.compute(config, plan, writer, batches, summary, stop)
            bar = progress.bar("teacher", len(plan.tiles), summary.noun, done=len(plan.finished))
            with bar as advance, closing(computed):
                for record in computed:
                    records[record.id] = record
                    summary.computed += 1
                    summary.pixels += record.height * record.width
                    summary.bytes_written += record.shard_bytes
                    advance(1, bytes=record.shard_bytes)
                    if summary.computed == PREDICT_AFTER:
                        _refuse_small_disk(plan, summary)
        if not summary.failed:
            summary.fingerprint = writer.finish([records[tile.id] for tile in plan.tiles]).fingerprint
    return summary


@contextmanager
def _counted(summary: Summary, config: Config, plan: Plan, start: float) -> Iterator[None]:
    """What the run cost, said and noted however it ends: tiles that an interrupted one stored are paid for."""
    try:
        yield
    finally:
        summary.seconds = time.perf_counter() - start
        if summary.computed:
            tile, crop = teacher_seconds(config, summary.teacher_seconds, summary.computed, summary.pixels)
            summary.online_seconds = plan.samples * predictions_per_sample(config) * tile
            summary.crops_seconds = plan.samples * crop
        note_costs(config.cache.path, plan.recipe.digest(), summary)


def _restore_root(config: Config, progress: Progress) -> None:
    tiles = list_tiles(config.data, "train")
    storage = open_storage(config.cache.path)
    with writer_lock(storage):
        manifest = whole_manifest(storage)
        stretch = resolve_stretch(config.data, tiles)
        recipe = complete_recipe(config, stretch, manifest.recipe if manifest else None)
        if restore_root(storage, recipe, [tile.id for tile in subjects(config, tiles, stretch)]):
            progress.say(f"{storage.url}: its topmost metadata was damaged or lost, and is restored")


def _without_damaged(plan: Plan, summary: Summary, progress: Progress) -> Plan:
    """The plan with the tiles whose bytes or images are not as recorded among those to compute."""
    images = {tile.id: tile.source for tile in plan.tiles}
    with progress.bar("every byte", len(plan.finished), summary.noun) as advance:
        whole, summary.damaged = find_damage(plan.storage, plan.recipe, plan.finished.values(), images, advance)
    for tile, cause in summary.damaged.items():
        progress.say(f"tile {tile} is damaged and is computed again: {cause}")
    return replace(plan, finished=whole)


def _compute(
    plan: Plan, teacher: FrozenTeacher, writer: CacheWriter, batches: list[list[Subject]], threads: tuple[int, int],
    advice: Callable[[int], list[str]], summary: Summary, stop: threading.Event,
) -> Generator[TileRecord, None, None]:  # fmt: skip
    """Compute the missing tiles, yielding each one's record once it is on disk."""
    missing = {tile.id for tile in plan.missing}
    ahead = deque(batches)
    loading: deque[Future[tuple[LoadedBatch, Images | None]]] = deque()
    writing: deque[tuple[int, Future[TileRecord]]] = deque()  # with the tile's pixels
    num_readers, num_writers = threads
    pending_px = PENDING_PX * num_writers // 2

    def load(batch: list[Subject]) -> tuple[LoadedBatch, Images | None]:
        loaded = load_batch_or_scene(batch, writer.recipe)
        return loaded, None if loaded.images_NHWC is None else teacher.send(loaded.images_NHWC)

    def write(tile: str, encoded: Callable[[], Encoded], digest: ImageDigest) -> TileRecord:
        return writer.write_encoded(tile, encoded(), digest)

    with ThreadPoolExecutor(num_readers) as readers, ThreadPoolExecutor(num_writers) as writers:
        try:
            while (ahead or loading) and not stop.is_set():
                while ahead and len(loading) <= num_readers:
                    loading.append(readers.submit(load, ahead.popleft()))
                loaded, images = loading.popleft().result()
                summary.failed |= loaded.failed
                if loaded.scene is not None:
                    with closing(Spill(writer.storage)) as spill:
                        try:
                            encoded, digest = _answer_scene(
                                teacher, loaded.scene, writer.recipe, spill, advice, summary, stop
                            )
                        except (DataError, OSError) as err:
                            summary.failed[loaded.scene.id] = str(err)
                            continue
                        # Out of the block above, as its errors are the cache's, not the image's.
                        record = writer.write_encoded(loaded.scene.id, encoded, digest)
                    yield record
                if images is None or loaded.images_NHWC is None:
                    continue
                size = sized("tile", *loaded.images_NHWC.shape[:3])
                with fits_in_memory(f"while the teacher predicted {size}", advice(max(loaded.images_NHWC.shape[1:3]))):
                    answers = teacher.encoded(images)
                pixels = loaded.images_NHWC[0, ..., 0].size
                for tile, answer in zip(loaded.tiles, answers, strict=True):
                    if tile.id in missing and tile.id in loaded.digests:
                        writing.append((pixels, writers.submit(write, tile.id, answer, loaded.digests[tile.id])))
                while writing and (writing[0][1].done() or sum(pixels for pixels, _ in writing) > pending_px):
                    yield writing.popleft()[1].result()
            while writing:
                yield writing.popleft()[1].result()
        finally:
            summary.teacher_seconds += teacher.seconds_taken()
            for loaded_later in loading:
                loaded_later.cancel()
            for _, written_later in writing:
                written_later.cancel()
    if stop.is_set():
        raise Interrupted(stopped_text(summary))


def _answer_scene(
    teacher: FrozenTeacher, scene: WholeTile, recipe: CacheRecipe, spill: Spill, advice: Callable[[int], list[str]],
    summary: Summary, stop: threading.Event,
) -> tuple[tuple[SpilledShard, NDArray[np.float64] | None], ImageDigest]:  # fmt: skip
    """Read, ask and encode from the top down: of image, answer and integers a row of windows is held, and the shard is in `spill`."""
    start = time.perf_counter()
    with scene.open_rows() as (rows, digest):
        size = sized("tile", 1, rows.height, rows.width)
        with fits_in_memory(f"while the teacher predicted {size}", advice(max(rows.height, rows.width))):
            bands = teacher.cached_bands(rows.read, rows.height, rows.width)
            encoded = encode_bands(_until(stop, bands, summary), recipe, rows.height, rows.width, spill)
    summary.teacher_seconds += time.perf_counter() - start
    return encoded, digest


def _until(
    stop: threading.Event, bands: Iterator[NDArray[np.float32]], summary: Summary
) -> Iterator[NDArray[np.float32]]:
    for band_ChW in bands:
        if stop.is_set():
            raise Interrupted(stopped_text(summary))
        yield band_ChW


def stopped_text(summary: Summary) -> str:
    """What is said when a run was asked to stop."""
    kept = summary.kept + summary.computed
    return (
        f"stopped; {kept} of {summary.tiles} {summary.noun} are finished and kept in {summary.cache}. "
        "Run the same command again to go on"
    )


def stage_threads(device: torch.device) -> tuple[int, int]:
    """
    Threads that read, and threads that encode and write; decoders, NumPy and zstd release the GIL.

    Compressing what a GPU has rounded takes a core longer than the GPU takes to answer, and thrice as long as reading: beside a GPU
    all cores do both.
    """
    if device.type == "cpu":
        return CPU_THREADS
    cores = os.cpu_count() or 2
    readers = max(2, cores // 4)
    return readers, max(2, cores - readers)


def _refuse_small_disk(plan: Plan, summary: Summary) -> None:
    free = plan.storage.free_bytes()
    left = len(plan.missing) - summary.computed
    needed = summary.bytes_written * left // summary.computed
    if free is not None and needed > free:
        raise DiskFull(
            f"{plan.storage.url} needs about {size_text(needed)} more for {left} tiles, and its disk has {size_text(free)} free; "
            f"make room and run the same command again: the {summary.computed + summary.kept} finished tiles are kept"
        )


def failure_report(summary: Summary) -> str:
    """One paragraph that names the tiles that could not be read, and what to do."""
    causes = "; ".join(list(summary.failed.values())[:5])
    return (
        f"{len(summary.failed)} of {summary.tiles} tiles could not be computed: {summarise(summary.failed)}. {causes}. "
        "Mend or remove these images and run the same command again; the other tiles are finished"
    )
