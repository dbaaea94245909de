"""
Stage one: the teacher predicts every training tile once, and its soft targets or logits are stored.

Threads read ahead, the device predicts, and other threads encode and write, all at the same time. The device waits for the writers only
when too many pixels are pending. With `Workers`, other processes compute the batches, and this one holds the lock, keeps the order and
completes the cache.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.cache.documents import whole_manifest
from kdpipe.cache.index.records import ImageDigest, TileRecord
from kdpipe.cache.integrity import find_damage
from kdpipe.cache.known_images import KnownImages, states_before
from kdpipe.cache.recipe import CacheRecipe
from kdpipe.cache.spill import Spill
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.storage.lock import writer_lock
from kdpipe.cache.tile import Encoded, encode_bands
from kdpipe.cache.writer import CacheWriter, open_writer, restore_root
from kdpipe.configs.errors import ConfigError, DataError, DiskFull, Interrupted, count_text
from kdpipe.configs.schema import Config
from kdpipe.data.rasters import Stretch
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import Tile, list_tiles, without_limit
from kdpipe.pipeline.devices import resolve_device
from kdpipe.pipeline.memory import fits_in_memory, sized, teacher_advice
from kdpipe.pipeline.precompute.batches import (
    Check,
    LoadedBatch,
    header_check,
    load_batch_or_scene,
    make_batches,
    teacher_batch_size,
)
from kdpipe.pipeline.precompute.costs import record_costs, teacher_seconds
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.plan import (
    Plan,
    Summary,
    complete_summary,
    complete_text,
    initial_summary,
    make_plan,
    stopped_text,
)
from kdpipe.pipeline.precompute.subjects import Subject, WholeTile, predictions_per_sample, subjects
from kdpipe.pipeline.progress import Progress, Silent, at_once
from kdpipe.pipeline.teacher import precision
from kdpipe.pipeline.teacher.frozen import FrozenTeacher, Images, open_teacher
from kdpipe.pipeline.teacher.given import GivenTeacher, handed
from kdpipe.pipeline.teacher.trial import try_teacher
from kdpipe.pipeline.text import size_text
from kdpipe.pipeline.versions import library_versions

CPU_THREADS = 2, 2  # (readers, writers) on a CPU, where the network itself uses the cores
# Pixels of computed tiles that may queue per two writing threads. Beyond that the device waits, which bounds memory.
PENDING_PX = 2**23
FORECAST_AFTER = 3  # finished tiles, from which the bytes of the rest are forecast


class Workers(Protocol):
    """Other processes that compute tiles: see `cluster.client.Cluster`."""

    def start(self, stop: threading.Event) -> torch.device:
        """Start them and return the device that they all compute on; raises `ConfigError` where they differ."""

    def resolve_precision(
        self, config: Config, recipe: CacheRecipe, tiles: list[Tile], stretch: Stretch, stop: threading.Event
    ) -> CacheRecipe:
        """The recipe of a new cache, as `precision.resolve` decides on their device; starts them if need be."""

    def compute(
        self, config: Config, plan: Plan, writer: CacheWriter, batches: Iterator[list[Subject]], batch_size: int,
        summary: Summary, stop: threading.Event,
    ) -> Generator[TileRecord, None, None]:  # fmt: skip
        """
        Store the missing tiles of `batches`, each of at most `batch_size`, yielding the record of each.

        Raises `Interrupted` once `stop` is set.
        """


def precompute(
    config: Config,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    *,
    repair: bool = False,
    workers: Workers | None = None,
    teacher: GivenTeacher | None = None,
) -> Summary:
    """
    Complete the cache and return what was done; does nothing if the cache is complete.

    `device` is where the teacher computes; None takes the first available of CUDA, Apple's MPS and the CPU. `teacher` is the network of a
    configuration whose `teacher.given` is the caller's name for it: an `nn.Module`, or any callable, from normalised images, float32
    `(N, B, H, W)`, to logits `(N, C, h, w)`. The fingerprint holds that name, and of an `nn.Module` the digests of its weights and of the
    file of its class.
    With `repair` every byte of the finished tiles is read first, and damaged tiles (`damaged` in the summary) are computed again.
    With `workers`, other processes compute the tiles on their own device. The stored bytes are the same. Unreadable images are
    `failed` in the summary, and the cache stays incomplete. Raises what `make_plan` raises, `CacheLocked`, `DiskFull`, and
    `Interrupted` once `stop` is set; finished tiles are kept in every case.
    """
    progress, stop = progress or Silent(), stop or threading.Event()
    if teacher is not None and workers is not None:
        raise ConfigError(
            "a network that is passed in Python cannot be sent to other processes: leave workers out, or name it by teacher.model, which "
            "each of them imports"
        )
    device = device if isinstance(device, torch.device) else resolve_device(device)
    with ExitStack() as set_up, handed(config, teacher):
        set_up.enter_context(at_once(stop, "stopped before a tile was computed; run the same command again"))
        return _precompute(config, device, progress, stop, set_up.close, repair=repair, workers=workers)


def _precompute(
    config: Config, device: torch.device, progress: Progress, stop: threading.Event, begin: Callable[[], None], *, repair: bool,
    workers: Workers | None,
) -> Summary:  # fmt: skip
    """See `precompute`; `begin` is called before anything is written."""
    start = time.perf_counter()
    if repair:
        _restore_root(config, progress)

    def resolve_precision(recipe: CacheRecipe, tiles: list[Tile], stretch: Stretch) -> CacheRecipe:
        if workers is not None:
            return workers.resolve_precision(config, recipe, tiles, stretch, stop)
        return precision.resolve(config, recipe, tiles, stretch, device)

    written = open_storage(config.cache.path).last_write()
    plan = make_plan(config, resolve_precision, checked=progress)
    if plan.is_done and not repair:
        summary = complete_summary(plan, config)
        progress.say(complete_text(summary))
        return summary
    summary = initial_summary(plan, config)
    if workers is not None:
        device = workers.start(stop)
    batch_size = teacher_batch_size(config, device)
    advice = partial(teacher_advice, config, batch_size, device)
    with (
        _recorded_costs(summary, config, plan, start),
        fits_in_memory("while precomputing (reading, the teacher, or encoding)", advice()),
        open_writer(plan.storage, plan.recipe, device=str(device), libraries=library_versions()) as writer,
    ):
        if written is None or plan.storage.last_write() != written:
            # Another process may have finished tiles before it released the lock.
            plan = make_plan(config, resolve_precision)
        if repair:
            plan = _without_damaged(plan, summary, progress)
        summary.kept = len(plan.finished)
        # Before anything is written: a cache begun for a teacher that is refused would refuse the right one as stale.
        teacher = None
        if plan.missing:
            teacher = open_teacher(config, plan.recipe, torch.device("cpu") if workers else device, progress.say)
            try_teacher(teacher, config, plan.recipe, lambda: ((tile.id, tile.size) for tile in plan.missing))
        begin()
        writer.begin()
        if plan.finished:
            progress.say(
                f"{len(plan.finished)} of {count_text(len(plan.tiles), summary.noun)} are finished already and kept"
            )
        records = dict(plan.finished)
        if plan.missing:
            batches = _batches_with_missing(plan, batch_size)
            check = header_check(config) if plan.checks_as_read else None
            if workers is None:
                assert teacher is not None
                computed = _compute(plan, teacher, writer, batches, check, stage_threads(device), advice, summary, stop)
            else:
                computed = workers.compute(config, plan, writer, batches, batch_size, summary, stop)
            records |= _collected(computed, plan, summary, progress)
        if not summary.failed:
            listed = plan.listed(records)
            manifest = writer.finish(listed, plan.partial_of(listed))
            summary.fingerprint, summary.cached = manifest.fingerprint, len(listed)
    return summary


def stage_threads(device: torch.device) -> tuple[int, int]:
    """
    Numbers of reading and of writing threads; decoders, NumPy and zstd release the GIL.

    With a GPU, compressing is the bottleneck: it takes a core longer than the GPU takes to predict and round the tile, and three times
    as long as reading it. So all cores are used, a quarter of them for reading.
    """
    if device.type == "cpu":
        return CPU_THREADS
    cores = os.cpu_count() or 2
    readers = max(2, cores // 4)
    return readers, max(2, cores - readers)


def _restore_root(config: Config, progress: Progress) -> None:
    tiles = list_tiles(without_limit(config.data), "train")
    storage = open_storage(config.cache.path)
    with writer_lock(storage):
        manifest = whole_manifest(storage)
        stretch = resolve_stretch(config.data, tiles)
        recipe = complete_recipe(config, stretch, manifest.recipe if manifest else None, tiles)
        ids = [tile.id for tile in subjects(config, tiles, stretch)]
        # Nothing but the receipts says which precision was decided for where the manifest is lost too.
        recipes = [recipe] if manifest else precision.candidates(config, recipe)
        if any(restore_root(storage, each, ids) for each in recipes):
            progress.say(f"{storage.url}: its root metadata was damaged or missing, and is restored")


def _without_damaged(plan: Plan, summary: Summary, progress: Progress) -> Plan:
    """The plan in which tiles whose bytes or images differ from their records are missing."""
    images = {tile.id: tile.source for tile in plan.tiles}
    with progress.bar("every byte", len(plan.finished), summary.noun) as advance:
        whole, summary.damaged = find_damage(plan.storage, plan.recipe, plan.finished.values(), images, advance)
    for tile, cause in summary.damaged.items():
        progress.say(f"tile {tile} is damaged and is computed again: {cause}")
    return replace(plan, finished=whole)


def _batches_with_missing(plan: Plan, batch_size: int) -> Iterator[list[Subject]]:
    """The batches that hold a missing tile, as headers are read."""
    for batch in make_batches(plan.tiles, plan.finished, batch_size):
        if any(tile.id not in plan.finished for tile in batch):
            yield batch


def _collected(
    computed: Generator[TileRecord, None, None], plan: Plan, summary: Summary, progress: Progress
) -> dict[str, TileRecord]:
    """
    The records of the computed tiles by id, counted in `summary`; their images are known from now on, however the run ends.

    Raises `DiskFull` early if the rest will not fit.
    """
    records: dict[str, TileRecord] = {}
    sources = {tile.id: tile.source for tile in plan.missing}
    before = states_before(sources)  # `computed` begins to read at its first record
    bar = progress.bar("teacher", len(plan.tiles), summary.noun, done=len(plan.finished))
    try:
        with bar as advance, closing(computed):
            for record in computed:
                records[record.id] = record
                summary.computed += 1
                summary.pixels += record.height * record.width
                summary.bytes_written += record.shard_bytes
                advance(1, bytes=record.shard_bytes)
                if summary.computed == FORECAST_AFTER:
                    _refuse_small_disk(plan, summary)
    finally:
        KnownImages(plan.storage).note_computed(before, ((sources[tile], record) for tile, record in records.items()))
    return records


def _refuse_small_disk(plan: Plan, summary: Summary) -> None:
    free = plan.storage.free_bytes()
    left = len(plan.missing) - summary.computed
    needed = summary.bytes_written * left // summary.computed
    if free is not None and needed > free:
        raise DiskFull(
            f"{plan.storage.url} needs about {size_text(needed)} more for {count_text(left, summary.noun)}, and its disk has "
            f"{size_text(free)} free; "
            f"make room and run the same command again: the {summary.computed + summary.kept} finished {summary.noun} are kept"
        )


@contextmanager
def _recorded_costs(summary: Summary, config: Config, plan: Plan, start: float) -> Iterator[None]:
    """Add up and record the run's costs however it ends: the tiles of an interrupted run are paid for too."""
    try:
        yield
    finally:
        summary.seconds = time.perf_counter() - start
        if summary.computed and not config.has_predictions:  # of which no live teacher would take any time
            tile, crop = teacher_seconds(config, summary.teacher_seconds, summary.computed, summary.pixels)
            summary.online_seconds = plan.samples * predictions_per_sample(config) * tile
            summary.crops_seconds = plan.samples * crop
        if not config.has_predictions:
            record_costs(config.cache.path, plan.recipe.digest(), summary)


def _compute(
    plan: Plan, teacher: FrozenTeacher, writer: CacheWriter, batches: Iterator[list[Subject]], check: Check | None,
    threads: tuple[int, int], advice: Callable[[int], list[str]], summary: Summary, stop: threading.Event,
) -> Generator[TileRecord, None, None]:  # fmt: skip
    """Compute the missing tiles in this process, yielding the record of each once it is on disk."""
    missing = {tile.id for tile in plan.missing}
    has_more = True
    loading: deque[Future[tuple[LoadedBatch, Images | None]]] = deque()
    writing: deque[tuple[int, Future[TileRecord]]] = deque()  # each with its tile's number of pixels
    num_readers, num_writers = threads
    pending_px = PENDING_PX * num_writers // 2

    def load(batch: list[Subject]) -> tuple[LoadedBatch, Images | None]:
        loaded = load_batch_or_scene(batch, writer.recipe, check)
        return loaded, None if loaded.images_NHWC is None else teacher.send(loaded.images_NHWC)

    def write(tile: str, encoded: Callable[[], Encoded], digest: ImageDigest) -> TileRecord:
        return writer.write_encoded(tile, encoded(), digest)

    with ThreadPoolExecutor(num_readers) as readers, ThreadPoolExecutor(num_writers) as writers:
        try:
            while (has_more or loading) and not stop.is_set():
                while has_more and len(loading) <= num_readers:
                    batch = next(batches, None)
                    has_more = batch is not None
                    if batch is not None:
                        loading.append(readers.submit(load, batch))
                if not loading:
                    break
                loaded, images = loading.popleft().result()
                summary.failed |= loaded.failed
                record, predicted = None, None
                # A prediction may take long, and costs only itself.
                with _given_up_once_stopped(stop), at_once(stop, stopped_text(summary)):
                    if loaded.scene is not None:
                        record = _store_scene(teacher, loaded.scene, writer, advice, summary, stop)
                    elif images is not None and loaded.images_NHWC is not None:
                        size, side = sized("tile", *loaded.images_NHWC.shape[:3]), max(loaded.images_NHWC.shape[1:3])
                        with fits_in_memory(f"while the teacher predicted {size}", advice(side)):
                            predicted = teacher.encoded(images)
                if record is not None:
                    yield record
                if predicted is None or loaded.images_NHWC is None:
                    continue
                pixels = loaded.images_NHWC[0, ..., 0].size
                for tile, encoded in zip(loaded.tiles, predicted, strict=True):
                    if tile.id in missing and tile.id in loaded.digests:
                        writing.append((pixels, writers.submit(write, tile.id, encoded, loaded.digests[tile.id])))
                while writing and (writing[0][1].done() or sum(pixels for pixels, _ in writing) > pending_px):
                    yield writing.popleft()[1].result()
            while writing:
                yield writing.popleft()[1].result()
        finally:
            summary.teacher_seconds += teacher.seconds_taken()
            for loading_future in loading:
                loading_future.cancel()
            for _, writing_future in writing:
                writing_future.cancel()
    if stop.is_set():
        raise Interrupted(stopped_text(summary))


@contextmanager
def _given_up_once_stopped(stop: threading.Event) -> Iterator[None]:
    """Let a prediction be interrupted without an error once `stop` is set; what has been predicted before is still written."""
    try:
        yield
    except Interrupted:
        if not stop.is_set():
            raise


def _store_scene(
    teacher: FrozenTeacher, scene: WholeTile, writer: CacheWriter, advice: Callable[[int], list[str]], summary: Summary,
    stop: threading.Event,
) -> TileRecord | None:  # fmt: skip
    """
    Read, predict and encode a scene from the top down, and store it; memory holds one row of windows, and `Spill` the shard.

    An unreadable image gives None, and is added to the failures of `summary`.
    """
    start = time.perf_counter()
    with closing(Spill(writer.storage)) as spill:
        try:
            with scene.open_rows() as (rows, digest):
                size = sized("tile", 1, rows.height, rows.width)
                with fits_in_memory(f"while the teacher predicted {size}", advice(max(rows.height, rows.width))):
                    bands = _until(stop, teacher.cached_bands(rows.read, rows.height, rows.width), summary)
                    encoded = encode_bands(bands, writer.recipe, rows.height, rows.width, spill)
        except (DataError, OSError) as err:
            summary.failed[scene.id] = str(err)
            return None
        summary.teacher_seconds += time.perf_counter() - start
        # Outside of `try`: errors here are the cache's, not the image's.
        return writer.write_encoded(scene.id, encoded, digest)


def _until(
    stop: threading.Event, bands: Iterator[NDArray[np.float32]], summary: Summary
) -> Iterator[NDArray[np.float32]]:
    for band_ChW in bands:
        if stop.is_set():
            raise Interrupted(stopped_text(summary))
        yield band_ChW
