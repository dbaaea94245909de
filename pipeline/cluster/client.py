"""
Stage one on many processes: the client holds the cache's lock, hands batches to dask's workers, and collects receipts.

Only lists of tiles and receipts pass through the scheduler, never pixels. When the scheduler is lost, a new fence is raised (see
`kdpipe.cache.storage.fence`), which keeps workers of the old session from storing beside those of the new one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError
from concurrent.futures import Future as Awaited
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
from distributed import Client, Future, KilledWorker, Security

from kdpipe.cache.index.records import TileRecord
from kdpipe.cache.recipe import CacheRecipe
from kdpipe.cache.storage.fence import open_fence
from kdpipe.cache.writer import CacheWriter, sweep
from kdpipe.configs.errors import (
    ClusterUnreachable,
    ConfigError,
    Interrupted,
    KdpipeError,
    OutOfMemory,
    count_text,
    summarise,
)
from kdpipe.configs.schema import Config
from kdpipe.data.rasters import Stretch
from kdpipe.data.tiles import Tile
from kdpipe.pipeline.cluster.addresses import is_open_to_others
from kdpipe.pipeline.cluster.local import local_cluster
from kdpipe.pipeline.cluster.worker import (
    CONCURRENT,
    Facts,
    Job,
    Receipts,
    Station,
    agreed_device,
    compute_batches,
    facts_of_worker,
    resolve_precision,
    station_name,
    stop_station,
)
from kdpipe.pipeline.memory import teacher_advice
from kdpipe.pipeline.precompute.plan import Plan, Summary, stopped_text
from kdpipe.pipeline.precompute.subjects import (
    Reference,
    Subject,
    ViewOfTile,
    WholeTile,
    absolute_tile,
    reference_to,
)
from kdpipe.pipeline.progress import Progress
from kdpipe.pipeline.teacher import precision
from kdpipe.pipeline.versions import library_versions

Result = TypeVar("Result")

PATIENCE_SECONDS = 300.0  # to wait for a scheduler to restart, or for a batch queue to start the first worker
CONNECT_SECONDS = 5.0
COUNT_SECONDS = 2.0  # between two requests for the number of workers
LEAVING_SECONDS = 3.0  # for workers to store what they predict when a run is stopped; the rest is computed again
POLL_SECONDS = 0.2  # between two checks for Ctrl-C


Task = list[list[Reference]]
"""The batches that one call of `compute_batches` is given."""


class Cluster:
    """The workers of a scheduler at `address`, or `local` processes of this machine; close it, or use it as a context."""

    def __init__(self, progress: Progress, device: str | None, *, address: str | None = None, local: int = 0) -> None:
        self._progress, self._device_name, self._address, self._local = progress, device, address, local
        self._open = ExitStack()
        self._client: Client | None = None
        self._security: Security | None = None  # None takes dask's own configuration
        self._device = torch.device("cpu")
        self._started = self._fast_bf16 = False

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: Any) -> None:
        self._disconnect()
        self._open.__exit__(*error)

    def start(self, stop: threading.Event) -> torch.device:
        """
        Connect, wait for the first worker, and return the device that all workers compute on.

        Raises `ClusterUnreachable` if none comes, and `ConfigError` if they differ in device, or from this process in libraries.
        """
        if self._started:
            return self._device
        # kdpipe reports such errors in one line; dask's logs would add a traceback.
        for name in ("distributed.client", "distributed.batched", "distributed.core"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if self._local:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            self._progress.say(f"starting {count_text(self._local, 'workers')}")
            threads = max(1, cores // self._local)
            cluster = self._open.enter_context(local_cluster(self._local, threads, self._device_name))
            self._address, self._security = cluster.scheduler_address, cluster.security
        elif is_open_to_others(self._address or ""):
            self._progress.say(
                f"warning: {self._address} has no TLS: whoever reaches the scheduler or a worker over the network can run code there, "
                "with your rights; see docs/cluster.md, Who can reach a cluster"
            )
        facts = self._connect(stop)
        self._device = torch.device(agreed_device(facts, library_versions()))
        first = next(iter(facts.values()))
        self._progress.say(
            f"{count_text(len(facts), 'workers')} on {self._device} ({', '.join(sorted({each.processor for each in facts.values()}))}), "
            f"{count_text(sum(found.threads for found in facts.values()), 'threads')}"
        )
        # On a CPU torch computes with as many threads, unless the workers are of this machine (see `Job.threads`).
        counted = self._device.type == "cpu" and not self._local
        if len({(found.processor, found.threads if counted else 0) for found in facts.values()}) > 1:
            self._progress.say(
                "note: the workers differ in processor or threads: values agree within the error bound, but the last bits, and "
                f"so the bytes of a tile, can depend on its worker (first: {first.processor}, {count_text(first.threads, 'threads')})"
            )
        self._started, self._fast_bf16 = True, all(found.fast_bf16 for found in facts.values())
        return self._device

    def resolve_precision(
        self, config: Config, recipe: CacheRecipe, tiles: list[Tile], stretch: Stretch, stop: threading.Event
    ) -> CacheRecipe:
        """The recipe of a new cache, its `auto` precisions decided by `precision.resolve` on a worker."""
        self.start(stop)
        if not self._fast_bf16 or all(member.precision != "auto" for member in config.members.values()):
            return recipe
        assert self._client is not None
        tried = [absolute_tile(tile) for tile in precision.drawn(tiles, config.seed)]
        future = self._client.submit(
            resolve_precision, _with_absolute_checkpoints(config), recipe, tried, stretch, str(self._device), pure=False
        )
        resolved: CacheRecipe = future.result()
        return resolved

    def compute(
        self, config: Config, plan: Plan, writer: CacheWriter, batches: Iterator[list[Subject]], batch_size: int,
        summary: Summary, stop: threading.Event,
    ) -> Generator[TileRecord, None, None]:  # fmt: skip
        """
        Have the workers store the missing tiles of `batches`, roughly in order, yielding the record of each.

        Raises `ClusterUnreachable` if the scheduler or all workers are gone for `PATIENCE_SECONDS`, what a worker raised, and
        `Interrupted` once `stop` is set.
        """
        missing = frozenset(tile.id for tile in plan.missing)
        writer.prepare(missing, [tile.id for tile in plan.tiles])
        tasks, pending = enumerate(_tasks(batches)), dict[int, Task]()
        first = plan.tiles[0]
        assert isinstance(first, WholeTile | ViewOfTile)
        probe = first.files[0].absolute()
        job = Job(
            config=_with_absolute_checkpoints(config),
            recipe=plan.recipe,
            stretch=first.stretch,
            tiles=[absolute_tile(tile) for tile in first.view.views.tiles] if isinstance(first, ViewOfTile) else None,
            cache=plan.storage.url if "://" in plan.storage.url else str(Path(plan.storage.url).absolute()),
            token="",
            batch_size=batch_size,
            checks_headers=plan.checks_as_read,
            device=str(self._device),
            libraries=library_versions(),
            threads=torch.get_num_threads() if self._local else None,
            probe=(str(probe), probe.stat().st_size),
        )
        is_done = False
        while not (is_done or stop.is_set()):
            try:
                with open_fence(plan.storage) as token:
                    yield from self._session(replace(job, token=token), tasks, pending, missing, summary, stop)
                is_done = not pending
            except _SchedulerLost as err:
                done = f"{summary.kept + summary.computed} of {count_text(summary.tiles, summary.noun)}"
                self._progress.say(
                    f"lost the scheduler at {self._address} ({err}) with {done} finished; waiting for it"
                )
                self._disconnect()
                agreed_device(self._connect(stop, f"; {done} are finished and kept"), job.libraries)
                self._progress.say("the scheduler is back")
        sweep(plan.storage)
        if stop.is_set():
            raise Interrupted(stopped_text(summary))

    def _session(
        self,
        job: Job,
        tasks: Iterator[tuple[int, Task]],
        pending: dict[int, Task],
        missing: frozenset[str],
        summary: Summary,
        stop: threading.Event,
    ) -> Generator[TileRecord, None, None]:
        """
        Compute the `pending` tasks, which an earlier scheduler lost, and the further `tasks`, by number, with one scheduler.

        Those that are begun are in `pending` until they are done, so that memory holds no more of them. Raises `_SchedulerLost` when the
        scheduler goes.
        """
        assert self._client is not None
        client, token = self._client, job.token
        done: SimpleQueue[Awaited[Receipts]] = SimpleQueue()
        outstanding: dict[Awaited[Receipts], tuple[int, Future]] = {}
        waiting, has_more = chain(list(pending.items()), tasks), True
        leave_at, room, counted, last_seen = float("inf"), 0, 0.0, time.monotonic()
        try:
            _from_scheduler(client, lambda: client.register_plugin(Station(job)))
            while outstanding or (has_more and not stop.is_set()):
                if stop.is_set() and leave_at == float("inf"):
                    leave_at = time.monotonic() + LEAVING_SECONDS
                    _from_scheduler(client, lambda: client.run(stop_station, token, on_error="ignore"))
                if time.monotonic() > leave_at:
                    return
                if time.monotonic() - counted > COUNT_SECONDS:
                    threads = _from_scheduler(client, client.nthreads)
                    # One batch more than a worker can handle, so that it need not wait for the next one.
                    room = sum(min(count, CONCURRENT) + 1 for count in threads.values())
                    counted = time.monotonic()
                    last_seen = counted if threads else last_seen
                    if not threads and stop.is_set():  # whoever stopped this process has stopped them too
                        return
                    if counted - last_seen > PATIENCE_SECONDS:
                        raise ClusterUnreachable(self._no_workers_text(summary))
                while has_more and len(outstanding) < room and not stop.is_set():
                    number, task = next(waiting, (-1, None))
                    if task is None:
                        has_more = False
                        break
                    pending[number] = task
                    wanted = missing.intersection(tile.id for batch in task for tile in batch)
                    future = _from_scheduler(client, lambda n=number, t=task, w=wanted: client.submit(  # type: ignore[misc]
                        compute_batches, token, t, w, key=f"kdpipe-{token}-{n}", priority=-n
                    ))  # fmt: skip
                    # Gathered asynchronously in dask's loop: if the last worker dies before its result has been fetched, a
                    # blocking call would never return.
                    awaited = asyncio.run_coroutine_threadsafe(
                        client.gather(future, asynchronous=True), client.loop.asyncio_loop
                    )
                    outstanding[awaited] = number, future
                    awaited.add_done_callback(done.put)
                try:
                    awaited = done.get(timeout=POLL_SECONDS)
                except Empty:
                    if client.status != "running":
                        raise _SchedulerLost("its connection broke") from None
                    continue
                number, future = outstanding.pop(awaited)
                receipts = self._receipts(client, future, awaited, pending[number], job)
                if not receipts.stopped:
                    del pending[number]
                summary.failed |= receipts.failed
                summary.teacher_seconds += receipts.teacher_seconds
                summary.workers[receipts.worker] = summary.workers.get(receipts.worker, 0) + len(receipts.records)
                yield from receipts.records
        finally:
            with suppress(Exception):  # the fence keeps out workers that this does not reach
                client.cancel([future for _, future in outstanding.values()], force=True)
                client.run(stop_station, token, on_error="ignore")
                client.unregister_worker_plugin(station_name(token))

    def _receipts(
        self, client: Client, future: Future, awaited: Awaited[Receipts], batches: Task, job: Job
    ) -> Receipts:
        """The receipts that a task returned; re-raises the task's `KdpipeError`, and wraps any other error in one."""
        err = None if awaited.cancelled() else awaited.exception()
        if err is not None and future.status == "error":
            names = summarise(tile.id for batch in batches for tile in batch)
            if isinstance(err, KilledWorker):
                advice = "; ".join(teacher_advice(job.config, job.batch_size, self._device))
                raise OutOfMemory(
                    f"{names}: {err.allowed_failures + 1} workers died one after another while computing this, most often because "
                    "their machine ran out of memory and the system killed them; the other finished tiles are kept. "
                    f"To fit: {advice}"
                ) from err
            if isinstance(err, KdpipeError):
                raise err
            raise KdpipeError(
                f"a worker failed at {names}: {type(err).__name__}: {err}; finished tiles are kept. "
                "Run the same command again to continue; --debug shows where it failed"
            ) from err
        try:
            return _from_scheduler(client, awaited.result)
        except CancelledError as err:
            raise _SchedulerLost("it has forgotten the run") from err

    def _connect(self, stop: threading.Event, state: str = "") -> dict[str, Facts]:
        """Connect and return the facts of every worker, by address, as soon as there is one."""
        start, said = time.monotonic(), False
        while not stop.is_set():
            problem = "does not respond"
            try:
                self._client = self._client or self._new_client()
                facts: dict[str, Facts] = self._client.run(facts_of_worker, self._device_name)
                if facts:
                    return facts
                problem = "has no workers"
            except ModuleNotFoundError as err:
                raise ConfigError(
                    f"the workers of {self._address} have no {err.name}: install kdpipe, in this version, for scheduler and workers"
                ) from err
            # dask's errors are OSErrors; it also fails an assertion while the loop of a failed client is still ending.
            except (OSError, AssertionError):
                self._disconnect()
            if time.monotonic() - start > PATIENCE_SECONDS:
                raise ClusterUnreachable(
                    f"the dask scheduler at {self._address} {problem} (waited {PATIENCE_SECONDS:.0f} s){state}; start it with its "
                    "workers (`dask scheduler`, `dask worker ADDRESS`), and run the same command again"
                )
            if not said:
                self._progress.say(
                    f"the dask scheduler at {self._address} {problem}; waiting for up to {PATIENCE_SECONDS:.0f} s"
                )
                said = True
            stop.wait(1)
        raise Interrupted(f"stopped while waiting for the dask scheduler at {self._address}{state}")

    def _new_client(self) -> Client:
        try:
            return Client(self._address, timeout=CONNECT_SECONDS, set_as_default=False, security=self._security)
        except ValueError as err:
            raise ConfigError(
                f"--scheduler {self._address}: expected an address as `dask scheduler` prints it, such as tcp://host:8786 ({err})"
            ) from err

    def _disconnect(self) -> None:
        if self._client is not None:
            with suppress(Exception):  # it may be reconnecting
                self._client.close(timeout=CONNECT_SECONDS)
            self._client = None

    def _no_workers_text(self, summary: Summary) -> str:
        return (
            f"the dask scheduler at {self._address} has no workers left (waited {PATIENCE_SECONDS:.0f} s); "
            f"{summary.kept + summary.computed} of {count_text(summary.tiles, summary.noun)} are finished and kept. Start workers "
            f"(`dask worker {self._address}`; their logs say why they ended), and run the same command again"
        )


class _SchedulerLost(Exception):
    """The connection broke, or the scheduler restarted and does not know the run."""


def _from_scheduler(client: Client, call: Callable[[], Result]) -> Result:
    """The result of a request to the scheduler; raises `_SchedulerLost` if the connection breaks meanwhile."""
    try:
        return call()
    except KdpipeError:
        raise
    except Exception as err:
        if isinstance(err, OSError | TimeoutError) or client.status != "running":
            raise _SchedulerLost(f"{type(err).__name__}: {err}".splitlines()[0][:120]) from err
        raise


def _with_absolute_checkpoints(config: Config) -> Config:
    """
    The configuration with absolute paths of the teachers' files, for a process that runs in another folder.

    They are the only files that a worker opens by the configuration's paths.
    """
    teacher, teachers = config.teacher, config.teachers
    absolute: Callable[[Any], Any] = lambda member: member.model_copy(  # noqa: E731
        update={
            name: str(Path(path).absolute())
            for name in ("checkpoint", "pretrained", "file")
            if (path := getattr(member, name)) is not None and Path(path).exists()
        }
    )
    return config.model_copy(
        update={"teacher": teacher and absolute(teacher), "teachers": [absolute(member) for member in teachers]}
    )


def _tasks(batches: Iterator[list[Subject]]) -> Iterator[Task]:
    """The batches of each task: one, or all that begin with views of the same tile, so that it is decoded once."""
    tasks = groupby(batches, key=lambda batch: batch[0].view.tile if isinstance(batch[0], ViewOfTile) else batch[0].id)
    return ([[reference_to(subject) for subject in batch] for batch in task] for _, task in tasks)
