"""
A dask worker in stage one: it loads the teacher once, reads images, predicts, encodes and stores, and returns receipts.

The scheduler imports this module too, when it unpickles tasks, so torch is imported only where it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import Worker, WorkerPlugin, get_worker

from kdpipe.cache.index.records import TileRecord
from kdpipe.cache.recipe import CacheRecipe
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.storage.fence import within_fence
from kdpipe.cache.writer import finished_tile, store_tile
from kdpipe.configs.errors import CheckpointError, ConfigError, DataError, ShutOut
from kdpipe.configs.schema import Config
from kdpipe.data.rasters import Stretch
from kdpipe.data.tiles import Tile
from kdpipe.pipeline.teacher.sources import source_fields

if TYPE_CHECKING:
    from kdpipe.cache.tile import Encoded
    from kdpipe.pipeline.precompute.subjects import Reference, Subject
    from kdpipe.pipeline.teacher.frozen import FrozenTeacher

# Batches that a worker handles at once, given as many threads: one is predicted, the others are read, encoded and stored. Encoding
# takes a core longer than a GPU takes to predict; more batches would cost memory, 4 bytes for each pixel and class.
CONCURRENT = 8


@dataclass(frozen=True)
class Facts:
    """The properties of a worker that decide its bytes, beside the recipe; `processor` and `threads` decide only the last bits."""

    device: str
    libraries: dict[str, str]
    processor: str
    threads: int
    fast_bf16: bool = False


@dataclass(frozen=True)
class Job:
    """
    What the workers of a run have in common; `probe` is an image that all must see, with its size in bytes.

    `threads` are torch's on a CPU; None stands for a worker's dask threads. Kernels sum in an order that depends on their number: with
    that of a single process, workers compute its bytes.

    `tiles` are all tiles of a run that computes recorded views, which may show any of them; None for a run that computes whole tiles.
    """

    config: Config
    recipe: CacheRecipe
    stretch: Stretch
    tiles: Sequence[Tile] | None
    cache: str
    token: str
    batch_size: int
    checks_headers: bool
    device: str
    libraries: Mapping[str, str]
    threads: int | None
    probe: tuple[str, int]


@dataclass
class Receipts:
    """
    The result of a task: records of the stored tiles, and causes for those whose image is unreadable.

    `teacher_seconds` is the time of the predictions; `stopped` says that some batch was not predicted because the run was stopped.
    """

    worker: str
    records: list[TileRecord] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    teacher_seconds: float = 0.0
    stopped: bool = False

    def add(self, other: Receipts) -> None:
        """Add those of a further batch."""
        self.records += other.records
        self.failed |= other.failed
        self.teacher_seconds += other.teacher_seconds
        self.stopped |= other.stopped


def facts_of_worker(device_name: str | None, dask_worker: Worker) -> Facts:
    """The facts of this worker; `device_name` is that of `--device`, and `Client.run` passes `dask_worker`."""
    import torch

    from kdpipe.pipeline.devices import ask_for_huge_pages, is_fast_at_bf16, resolve_device
    from kdpipe.pipeline.versions import library_versions

    ask_for_huge_pages()  # before the first tensor, which is made below
    device = resolve_device(device_name)
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return Facts(str(device), library_versions(), processor, dask_worker.state.nthreads, is_fast_at_bf16(device))


def resolve_precision(
    config: Config,
    recipe: CacheRecipe,
    tried: Sequence[Tile],
    stretch: Stretch,
    device: str,
) -> CacheRecipe:
    """A task: `precision.resolve_on` on this worker's device."""
    import torch

    from kdpipe.pipeline.teacher import precision

    return precision.resolve_on(config, recipe, tried, stretch, torch.device(device))


class Station(WorkerPlugin):  # type: ignore[misc]  # distributed has no types
    """
    One run in a worker process: the teacher, loaded at the first batch, and the one thread that predicts with it.

    Several batches are handled at once, each in its task's thread, so that reading and storing go on beside the predictions.
    """

    def __init__(self, job: Job) -> None:
        self.name = station_name(job.token)
        self._job = job

    def setup(self, worker: Worker) -> None:
        """Prepare; raises `ConfigError` or `DataError` where this worker would compute other bytes, or sees other files."""
        from kdpipe.pipeline.devices import ask_for_huge_pages, keep_freed_memory
        from kdpipe.pipeline.precompute.subjects import RemoteSubjects

        ask_for_huge_pages()  # `facts_of_worker` has not run on a worker that joined later
        self._address: str = worker.address
        self._teacher: FrozenTeacher | None = None
        threads = self._job.threads or worker.state.nthreads
        self._predicting = ThreadPoolExecutor(1, initializer=_use_threads, initargs=(threads,))
        self._slots = threading.Semaphore(CONCURRENT)
        self._stopped = threading.Event()
        self._check(worker)
        self._subjects = RemoteSubjects(self._job.config, self._job.stretch, self._job.tiles)
        self._storage = open_storage(self._job.cache)
        self._recipe_digest = self._job.recipe.digest()
        keep_freed_memory()

    def teardown(self, worker: Worker) -> None:
        """Release the teacher; the fence keeps out what is still to be stored."""
        self._stopped.set()
        self._predicting.shutdown(wait=False, cancel_futures=True)
        self._teacher = None

    def stop(self) -> None:
        """Predict no further batch; what has been predicted is stored."""
        self._stopped.set()

    def compute(self, batches: list[list[Reference]], wanted: frozenset[str]) -> Receipts:
        """Store the `wanted` tiles of batches; the others are predicted beside them, as in every run, and discarded."""
        receipts = Receipts(self._address)
        with self._slots:
            for batch in batches:
                receipts.add(self._compute([self._subjects.subject(reference) for reference in batch], wanted))
        return receipts

    def _compute(self, batch: list[Subject], wanted: frozenset[str]) -> Receipts:
        from kdpipe.pipeline.precompute.batches import header_check, load_batch

        receipts, job = Receipts(self._address), self._job
        if self._stopped.is_set():
            receipts.stopped = True
            return receipts
        # A batch comes again if its worker or its receipt was lost; tiles that were stored are not computed again.
        stored = (
            finished_tile(self._storage, tile.id, tile.source, self._recipe_digest)
            for tile in batch
            if tile.id in wanted
        )
        receipts.records = [record for record in stored if record is not None]
        wanted = wanted.intersection(tile.id for tile in batch).difference(record.id for record in receipts.records)
        if not wanted:
            return receipts
        loaded = load_batch(batch, header_check(job.config) if job.checks_headers else None)
        receipts.failed = loaded.failed
        if loaded.images_NHWC is None:
            return receipts
        predicted = self._predicting.submit(self._predict, loaded.images_NHWC).result()
        if predicted is None:
            receipts.stopped = True
            return receipts
        for tile, encode in zip(loaded.tiles, predicted, strict=True):
            if tile.id in wanted and tile.id in loaded.digests:
                encoded = encode()
                with within_fence(self._storage, job.token):
                    record = store_tile(self._storage, tile.id, encoded, loaded.digests[tile.id], job.recipe)
                receipts.records.append(record)
        if self._teacher is not None:
            receipts.teacher_seconds = self._teacher.seconds_taken()  # includes other batches, which then report none
        return receipts

    def _predict(self, images_NHWC: Any) -> list[Callable[[], Encoded]] | None:
        """`FrozenTeacher.encoded`, or None once the run is stopped; runs in the one thread that predicts."""
        import torch

        from kdpipe.pipeline.memory import fits_in_memory, sized, teacher_advice
        from kdpipe.pipeline.teacher.frozen import open_teacher

        if self._stopped.is_set():
            return None
        job, device = self._job, torch.device(self._job.device)
        height, width = images_NHWC.shape[1:3]
        advice = teacher_advice(job.config, job.batch_size, device, max(height, width))
        size = sized("tile", len(images_NHWC), height, width)
        with fits_in_memory(f"while the teacher predicted {size} on worker {self._address}", advice):
            if self._teacher is None:
                self._teacher = open_teacher(job.config, job.recipe, device)
            return self._teacher.encoded(images_NHWC)

    def _check(self, worker: Worker) -> None:
        job, here = self._job, facts_of_worker(self._job.device, worker)
        if dict(here.libraries) != dict(job.libraries):
            raise ConfigError(
                f"worker {self._address} has other versions than the run: {version_differences(here.libraries, job.libraries)}; "
                "install the same ones everywhere"
            )
        image, size_bytes = job.probe
        try:
            found = Path(image).stat().st_size
        except OSError as err:
            raise DataError(
                f"worker {self._address} does not see the image {image} ({err.strerror}): workers need the same folders at the "
                "same paths, on a file system that all of them share"
            ) from err
        if found != size_bytes:
            raise DataError(
                f"worker {self._address} sees another image {image}: {found} bytes, not {size_bytes}; workers need the same "
                "folders at the same paths"
            )
        for (key, member), teacher in zip(job.config.members.items(), job.recipe.teachers, strict=True):
            try:
                found_fields = source_fields(member, key, required=True)
            except CheckpointError as err:
                raise CheckpointError(f"worker {self._address}: {err}") from err
            for name, value in found_fields.items():
                wanted = getattr(teacher, name)
                if value != wanted:
                    raise CheckpointError(
                        f"{key}: worker {self._address} has another network at {member.origin}: its {name} is {_brief(value)}, not "
                        f"{_brief(wanted)}"
                    )
        try:
            with within_fence(open_storage(job.cache), job.token):
                pass
        except ShutOut as err:
            raise ConfigError(
                f"worker {self._address} does not see the cache {job.cache} that this run writes: workers need it at the same path, "
                "on a file system that all of them share, or cache.path as a URL (s3://…)"
            ) from err


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}…"


def compute_batches(token: str, batches: list[list[Reference]], wanted: frozenset[str]) -> Receipts:
    """A task: one batch, or all those of the views of one tile, computed by this worker's station of the run."""
    station = get_worker().plugins[station_name(token)]
    assert isinstance(station, Station)
    return station.compute(batches, wanted)


def stop_station(token: str, dask_worker: Worker) -> None:
    """Have a worker's station finish the batches that it has predicted, and begin no other."""
    station = dask_worker.plugins.get(station_name(token))
    if isinstance(station, Station):
        station.stop()


def station_name(token: str) -> str:
    """The name of the plugin that a run installs in its workers."""
    return f"kdpipe-{token}"


def agreed_device(facts: Mapping[str, Facts], libraries: Mapping[str, str]) -> str:
    """The device of all workers; raises `ConfigError` that names a worker of another device or of other `libraries`."""
    first_address, first = next(iter(sorted(facts.items())))
    for address, found in sorted(facts.items()):
        if found.libraries != dict(libraries):
            raise ConfigError(
                f"worker {address} has other versions than this command: {version_differences(found.libraries, libraries)}; "
                "install the same ones everywhere"
            )
        if found.device != first.device:
            raise ConfigError(
                f"worker {address} computes on {found.device}, worker {first_address} on {first.device}: a cache is computed on one "
                "kind of device; end the workers of the other kind, or set --device cpu"
            )
    return first.device


def version_differences(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """`torch 2.9.0, not 2.10.0` for each library that differs."""
    return ", ".join(f"{name} {found[name]}, not {there}" for name, there in expected.items() if found[name] != there)


def dask_setup(worker: Worker) -> None:
    """Import what a teacher needs, which takes seconds; runs in workers of `--workers` before they register."""
    import kdpipe.pipeline.models.recognise
    import kdpipe.pipeline.precompute.run  # noqa: F401


def _use_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)
