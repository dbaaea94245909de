"""Workers of this machine: a scheduler in this process, and worker processes beside it, one for each GPU."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager

import dask
import torch
from distributed import Nanny, Scheduler, Security, SpecCluster, Status
from distributed.utils import LoopRunner
from tornado.ioloop import IOLoop

from kdpipe.configs.errors import ConfigError
from kdpipe.pipeline.progress import out_of_reach


@contextmanager
def local_cluster(count: int, threads: int, device_name: str | None) -> Iterator[SpecCluster]:
    """
    A scheduler in this process and `count` worker processes, which end with the context; each GPU serves one of them.

    Whoever reaches a scheduler or a worker can run code as its user. So all of them listen on the loopback interface alone, which
    other users of the machine reach too, and talk by TLS with certificates that live as long as the cluster.

    Raises `ConfigError` where there are fewer GPUs than workers that would compute on them.
    """
    security = Security.temporary()
    everywhere = {
        "host": "127.0.0.1", "protocol": "tls", "security": security, "dashboard": False, "dashboard_address": "127.0.0.1:0",
    }  # fmt: skip
    options = {
        **everywhere,
        "nthreads": threads,
        "memory_limit": 0,
        "preload": ["kdpipe.pipeline.cluster.worker"],
        "silence_logs": logging.ERROR,
    }
    env: list[dict[str, str]] = [{} for _ in range(count)]
    if device_name == "cuda" or (device_name is None and torch.cuda.is_available()):
        all_gpus = ",".join(map(str, range(torch.cuda.device_count())))
        gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or all_gpus).split(",")
        if count > len(gpus):
            raise ConfigError(
                f"--workers {count}: there are {len(gpus)} GPUs, and each worker needs one; set --workers {len(gpus)}, or --device cpu"
            )
        env = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:count]]
    workers = {i: {"cls": Nanny, "options": {**options, "env": env[i]}} for i in range(count)}
    scheduler = {"cls": Scheduler, "options": {**everywhere, "port": 0}}
    # In place of dask's own variables, which limit each worker to one thread and make it return freed memory at once. On a CPU the
    # threads of all workers outnumber the cores, and OpenMP's threads wait actively by default: two workers of two threads on two cores
    # took 3.0 s of CPU time for a tile, and 1.1 s with this, as with one thread each.
    environment = dask.config.set({"distributed.nanny.pre-spawn-environ": {"OMP_WAIT_POLICY": "passive"}})
    # Ctrl-C and SIGTERM are for this process, which stops its workers once it has reached a safe point.
    with environment, _loop_out_of_reach() as loop:
        cluster = SpecCluster(scheduler=scheduler, security=security, silence_logs=logging.CRITICAL, loop=loop)
        with cluster, _killed_if_it_fails(cluster):
            cluster.worker_spec.update(workers)
            cluster.scale(count)  # does not wait, unlike the constructor, which could not be left meanwhile
            cluster.wait_for_workers(count)
            yield cluster


@contextmanager
def _loop_out_of_reach() -> Iterator[IOLoop]:
    """An event loop in a thread from which the workers' processes are started, so that neither Ctrl-C nor SIGTERM reaches them."""
    runner = LoopRunner()
    with out_of_reach():
        runner.start()
    try:
        yield runner.loop
    finally:
        runner.stop()


@contextmanager
def _killed_if_it_fails(cluster: SpecCluster) -> Iterator[None]:
    """Kill the workers of a cluster if the block fails or is stopped. They might be long in a prediction, or in importing libraries."""
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        for nanny in cluster.workers.values():  # they would start new ones
            cluster.loop.add_callback(setattr, nanny, "status", Status.closing_gracefully)
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        raise
