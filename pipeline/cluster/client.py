"""
Stage one on many processes: the client, which holds the cache's lock, hands out batches to dask's workers and collects receipts.

What passes through the scheduler is a batch's list of tiles and its receipts, never a pixel. When the scheduler is lost,
the fence is raised anew (see `kdpipe.cache.storage.fence`), so that nothing of before is stored beside what comes after.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import CancelledError
from concurrent.futures import Future as Awaited
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch
from distributed import Client, Future, KilledWorker

from kdpipe.cache.recipe import CacheRecipe
from kdpipe.cache.records import TileRecord
from kdpipe.cache.storage.fence import open_fence
from kdpipe.cache.writer import CacheWriter, sweep
from kdpipe.configs.errors import ClusterUnreachable, ConfigError, Interrupted, KdpipeError, OutOfMemory, summarise
from kdpipe.configs.schema import Config
from kdpipe.data.rasters import Stretch
from kdpipe.data.tiles import Tile
from kdpipe.pipeline.cluster.local import local_cluster
from kdpipe.pipeline.cluster.worker import (
    IN_HAND,
    Facts,
    Job,
    Receipts,
    Sampled,
    Station,
    compute_batches,
    look,
    resolve_precision,
    station_name,
    stop_station,
    version_differences,
)
from kdpipe.pipeline.memory import teacher_advice
from kdpipe.pipeline.precompute.plan import Plan, Summary
from kdpipe.pipeline.precompute.run import stopped_text
from kdpipe.pipeline.precompute.subjects import Sent, Subject, ViewOfTile, WholeTile, absolute_tile, sent
from kdpipe.pipeline.progress import Progress
from kdpipe.pipeline.versions import library_versions

Answer = TypeVar("Answer")

SAMPLED = 100  # tiles, in the order in which `precision.resolve` tries them: it needs three that can be read
PATIENCE_SECONDS = 300.0  # for a scheduler that is being started again, and for the first worker of a queue
CONNECT_SECONDS = 5.0
ASK_SECONDS = 2.0  # between two questions to the scheduler, how many workers it has
POLL_SECONDS = 0.2  # between two looks at Ctrl-C


class Cluster:
    """The workers of a scheduler at `address`, or `local` processes of this machine; close it, or use it as a context."""

    def __init__(self, progress: Progress, device: str | None, *, address: str | None = None, local: int = 0) -> None:
        self._progress, self._device_name, self._address, self._local = progress, device, address, local
        self._open = ExitStack()
        self._client: Client | None = None
        self._device = torch.device("cpu")
        self._started = self._fast_bf16 = False

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self._disconnect()
        self._open.close()

    def start(self, stop: threading.Event) -> torch.device:
        """
        Connect, wait for the first worker, and return the device that all workers compute on.

        Raises `ClusterUnreachable` where none is there within `PATIENCE_SECONDS`, `ConfigError` where workers differ in their
        device, or from this process in their libraries.
        """
        if self._started:
            return self._device
        # Ours to say, in one line; dask's own would come with a traceback.
        for name in ("distributed.client", "distributed.batched", "distributed.core"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if self._local:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            threads = max(1, cores // self._local)
            self._progress.say(f"starting {self._local} workers of {threads} thread{'s' if threads > 1 else ''} each")
            cluster = self._open.enter_context(local_cluster(self._local, threads, self._device_name))
            self._address = cluster.scheduler_address
        facts = self._connect(stop)
        self._device = torch.device(agreed_device(facts, library_versions()))
        first = next(iter(facts.values()))
        processors = {found.processor for found in facts.values()}
        self._progress.say(
            f"{len(facts)} worker{'s' if len(facts) > 1 else ''} on {self._device} ({', '.join(sorted(processors))}), "
            f"{sum(found.threads for found in facts.values())} threads"
        )
        if len({(found.processor, found.threads) for found in facts.values()}) > 1 or len(processors) > 1:
            self._progress.say(
                "note: the workers' processors or threads differ: values agree to the encoding's bound, but the last bits, and "
                f"so the bytes of a tile, can depend on who computed it (first: {first.processor}, {first.threads} threads)"
            )
        self._started, self._fast_bf16 = True, all(found.fast_bf16 for found in facts.values())
        return self._device

    def resolved(
        self, config: Config, recipe: CacheRecipe, tiles: list[Tile], stretch: Stretch, stop: threading.Event
    ) -> CacheRecipe:
        """The recipe of a new cache as `precision.resolve` has it on a worker: `teacher.precision: auto` is decided there."""
        self.start(stop)
        if not self._fast_bf16 or all(member.precision != "auto" for member in config.members.values()):
            return recipe
        assert self._client is not None
        looked_at = np.random.default_rng(config.seed).permutation(len(tiles))[:SAMPLED]
        absolute = [absolute_tile(tile) for tile in tiles]
        future = self._client.submit(
            resolve_precision, _with_absolute_checkpoints(config), recipe, Sampled(absolute, looked_at), stretch,
            str(self._device), pure=False,
        )  # fmt: skip
        resolved: CacheRecipe = future.result()
        return resolved

    def compute(
        self, config: Config, plan: Plan, writer: CacheWriter, batches: list[list[Subject]], summary: Summary,
        stop: threading.Event,
    ) -> Generator[TileRecord, None, None]:  # fmt: skip
        """
        Have the missing tiles of `batches` stored, in order as workers are free, yielding each one's record.

        Raises `ClusterUnreachable` where the scheduler or all workers are gone for `PATIENCE_SECONDS`, what a worker raised, and
        `Interrupted` once `stop` is set.
        """
        missing = frozenset(tile.id for tile in plan.missing)
        writer.prepare(missing, [tile.id for tile in plan.tiles])
        pending = dict(enumerate(_tasks(batches)))
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
            batch_size=max(map(len, batches)),
            device=str(self._device),
            libraries=library_versions(),
            probe=(str(probe), probe.stat().st_size),
        )
        while pending and not stop.is_set():
            try:
                with open_fence(plan.storage) as token:
                    yield from self._session(replace(job, token=token), pending, missing, summary, stop)
            except _SchedulerLost as err:
                done = summary.kept + summary.computed
                self._progress.say(
                    f"lost the scheduler at {self._address} ({err}) with {done} of {summary.tiles} {summary.noun} finished; waiting for it"
                )
                self._disconnect()
                agreed_device(
                    self._connect(stop, f"; {done} of {summary.tiles} {summary.noun} are finished and kept"),
                    job.libraries,
                )
                self._progress.say("the scheduler is back")
        sweep(plan.storage)
        if stop.is_set():
            raise Interrupted(stopped_text(summary))

    def _session(
        self,
        job: Job,
        pending: dict[int, list[list[Sent]]],
        missing: frozenset[str],
        summary: Summary,
        stop: threading.Event,
    ) -> Generator[TileRecord, None, None]:
        """Work off `pending`, by number, as long as the scheduler stays; raises `_SchedulerLost` where it does not."""
        assert self._client is not None
        client, token = self._client, job.token
        done: SimpleQueue[Awaited[Receipts]] = SimpleQueue()
        outstanding: dict[Awaited[Receipts], tuple[int, Future]] = {}
        queue = deque(pending)
        told, room, asked, last_seen = False, 0, 0.0, time.monotonic()
        try:
            _of_scheduler(client, lambda: client.register_plugin(Station(job)))
            while outstanding or (queue and not stop.is_set()):
                if stop.is_set() and not told:
                    _of_scheduler(client, lambda: client.run(stop_station, token, on_error="ignore"))
                    told = True
                if time.monotonic() - asked > ASK_SECONDS:
                    threads = _of_scheduler(client, client.nthreads)
                    # One batch more than a worker has in hand, so that it need not wait for the next one.
                    room = sum(min(count, IN_HAND) + 1 for count in threads.values())
                    asked = time.monotonic()
                    last_seen = asked if threads else last_seen
                    if not threads and (stop.is_set() or asked - last_seen > PATIENCE_SECONDS):
                        raise ClusterUnreachable(self._no_workers(summary))
                while queue and len(outstanding) < room and not stop.is_set():
                    number = queue.popleft()
                    wanted = missing.intersection(tile.id for batch in pending[number] for tile in batch)
                    future = _of_scheduler(client, lambda n=number, w=wanted: client.submit(  # type: ignore[misc]
                        compute_batches, token, pending[n], w, key=f"kdpipe-{token}-{n}", priority=-n
                    ))  # fmt: skip
                    # Waited for in dask's loop: what was computed is lost with its worker until it has arrived here, and with the
                    # last worker it never arrives.
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
            with suppress(Exception):  # the fence keeps out whom this does not reach
                client.cancel([future for _, future in outstanding.values()], force=True)
                client.run(stop_station, token, on_error="ignore")
                client.unregister_worker_plugin(station_name(token))

    def _receipts(
        self, client: Client, future: Future, awaited: Awaited[Receipts], batches: list[list[Sent]], job: Job
    ) -> Receipts:
        """What a task returned; raises what it raised, with the worker's error as its cause where that is not the user's."""
        err = None if awaited.cancelled() else awaited.exception()
        if err is not None and future.status == "error":
            names = summarise(tile.id for batch in batches for tile in batch)
            if isinstance(err, KilledWorker):
                advice = "; ".join(teacher_advice(job.config, job.batch_size, self._device))
                raise OutOfMemory(
                    f"{names}: {err.allowed_failures + 1} workers died one after another while they "
                    "computed this, most often because their machine ran out of memory and the system killed them; the other "
                    f"finished tiles are kept. To fit: {advice}"
                ) from err
            if isinstance(err, KdpipeError):
                raise err
            raise KdpipeError(
                f"a worker failed at {names}: {type(err).__name__}: {err}; finished tiles are kept. "
                "Run the same command again to go on; --debug shows where it failed"
            ) from err
        try:
            return _of_scheduler(client, awaited.result)
        except CancelledError as err:
            raise _SchedulerLost("it forgot what it was asked for") from err

    def _connect(self, stop: threading.Event, state: str = "") -> dict[str, Facts]:
        """Connect, and the facts of every worker, by address, as soon as there is one."""
        start, said = time.monotonic(), False
        while not stop.is_set():
            why = "does not answer"
            try:
                self._client = self._client or self._new_client()
                facts: dict[str, Facts] = self._client.run(look, self._device_name)
                if facts:
                    return facts
                why = "has no workers"
            except ModuleNotFoundError as err:
                raise ConfigError(
                    f"the workers of {self._address} have no {err.name}: install kdpipe, in this version, for scheduler and workers"
                ) from err
            # And what dask derives from it; it asserts as well, where the loop of a client that failed has not ended yet.
            except (OSError, AssertionError):
                self._disconnect()
            if time.monotonic() - start > PATIENCE_SECONDS:
                raise ClusterUnreachable(
                    f"the dask scheduler at {self._address} {why}, for {PATIENCE_SECONDS:.0f} s now{state}; start it with its workers "
                    "(`dask scheduler`, `dask worker ADDRESS`), and run the same command again"
                )
            if not said:
                self._progress.say(
                    f"the dask scheduler at {self._address} {why}; waiting for up to {PATIENCE_SECONDS:.0f} s"
                )
                said = True
            stop.wait(1)
        raise Interrupted(f"stopped while waiting for the dask scheduler at {self._address}{state}")

    def _new_client(self) -> Client:
        try:
            return Client(self._address, timeout=CONNECT_SECONDS, set_as_default=False)
        except ValueError as err:
            raise ConfigError(
                f"--scheduler {self._address}: expected an address as `dask scheduler` prints it, such as tcp://host:8786 ({err})"
            ) from err

    def _disconnect(self) -> None:
        if self._client is not None:
            with suppress(Exception):  # it may be in the middle of connecting again
                self._client.close(timeout=CONNECT_SECONDS)
            self._client = None

    def _no_workers(self, summary: Summary) -> str:
        return (
            f"the dask scheduler at {self._address} has no workers left, for {PATIENCE_SECONDS:.0f} s now; "
            f"{summary.kept + summary.computed} of {summary.tiles} {summary.noun} are finished and kept. Start workers "
            f"(`dask worker {self._address}`; their logs say why they ended), and run the same command again"
        )


class _SchedulerLost(Exception):
    """The connection broke, or the scheduler was started anew and knows nothing of the run."""


def _of_scheduler(client: Client, call: Callable[[], Answer]) -> Answer:
    """The answer to a question to the scheduler; `_SchedulerLost` where the connection breaks meanwhile."""
    try:
        return call()
    except KdpipeError:
        raise
    except Exception as err:
        if isinstance(err, OSError | TimeoutError) or client.status != "running":
            raise _SchedulerLost(f"{type(err).__name__}: {err}".splitlines()[0][:120]) from err
        raise


def agreed_device(facts: Mapping[str, Facts], libraries: Mapping[str, str]) -> str:
    """The device of all workers; `ConfigError`, naming one, where they differ in it, or from `libraries` in a version."""
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
                "kind of device; end the workers of the other kind, or say --device cpu"
            )
    return first.device


def _with_absolute_checkpoints(config: Config) -> Config:
    """The configuration as a process in another folder reads it: a worker needs nothing else of it from a disk."""
    teacher, teachers = config.teacher, config.teachers
    absolute: Callable[[Any], Any] = lambda member: member.model_copy(  # noqa: E731
        update={"checkpoint": str(Path(member.checkpoint).absolute())}
    )
    return config.model_copy(
        update={"teacher": teacher and absolute(teacher), "teachers": [absolute(member) for member in teachers]}
    )


def _tasks(batches: list[list[Subject]]) -> list[list[list[Sent]]]:
    """The batches that a worker is given at a time: those that begin with views of one tile, so that it is decoded once."""
    tasks = groupby(batches, key=lambda batch: batch[0].view.tile if isinstance(batch[0], ViewOfTile) else batch[0].id)
    return [[[sent(subject) for subject in batch] for batch in task] for _, task in tasks]
