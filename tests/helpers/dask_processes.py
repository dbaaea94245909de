"""
Dask schedulers and workers as processes, forked from one that has imported everything, so that each starts in a moment.

Run as a program, it forks a process for each line of JSON that it reads, and prints its id.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def _be_command(arguments, output):
    """`kdpipe`, with its output in a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    from kdpipe.pipeline.commands.main import main

    sys.argv = ["kdpipe", *arguments]
    main()


def _be_scheduler(port, ttl_seconds):
    import asyncio

    import dask
    from distributed import Scheduler

    dask.config.set({"distributed.scheduler.worker-ttl": f"{ttl_seconds}s"})

    async def run():
        async with Scheduler(host="127.0.0.1", port=port, dashboard=False) as scheduler:
            await scheduler.finished()

    asyncio.run(run())


def _known(folder, pid):
    """A file that exists once the scheduler knows the worker `pid`."""
    return Path(folder) / f"known.{pid}"


def _runs(pid):
    return Path(f"/proc/{pid}").exists()


def _be_worker(address, name, threads, folder, computed, slow):
    """A worker without a nanny, which writes the ids of every batch that its teacher predicts as a line into `computed`."""
    import asyncio

    import torch
    from distributed import Worker

    import kdpipe.pipeline.cluster.worker as module

    torch.set_num_threads(1)
    os.chdir(folder)
    compute, predict = module.Station._compute, module.Station._predict

    def noted_compute(self, batch, wanted):
        self.batch_ids = [tile.id for tile in batch]
        return compute(self, batch, wanted)

    def noted_predict(self, images_NHWC):
        if not self._stopped.is_set():  # else nothing is predicted
            with Path(computed).open("a") as file:  # a short line is written whole among those of others
                file.write(json.dumps([name, os.getpid(), self.batch_ids]) + "\n")
            time.sleep(slow)
        return predict(self, images_NHWC)

    module.Station._compute, module.Station._predict = noted_compute, noted_predict

    async def run():
        async with Worker(address, nthreads=threads, name=name, dashboard=False, local_directory=folder) as worker:
            _known(folder, os.getpid()).touch()
            await worker.finished()

    asyncio.run(run())


def _launch():
    import dask
    import numcodecs.zstd  # noqa: F401
    import torch
    import zarr.codecs
    import zarr.storage  # noqa: F401

    import kdpipe.pipeline.cluster.client
    import kdpipe.pipeline.cluster.worker  # noqa: F401

    torch.set_num_threads(1)
    # Tests kill workers, so many deaths must not fail a task; and a dead scheduler or worker is to be noticed soon.
    dask.config.set({"distributed.scheduler.allowed-failures": 1000, "distributed.comm.timeouts.connect": "5s"})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1):
                os.dup2(null, descriptor)
            try:
                {"scheduler": _be_scheduler, "worker": _be_worker, "command": _be_command}[kind](**arguments)
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(end.code or 0)
            finally:
                os._exit(0)
        print(pid, flush=True)


class DaskProcesses:
    """Starts and kills schedulers, workers and commands; `close` ends every one."""

    def __init__(self, folder):
        self.folder = Path(folder)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.computed = self.folder / "computed.jsonl"
        self.scheduler, self.workers = 0, []
        self.first = self.second = 0  # the workers of `start_pair`
        self.errors = self.folder / "errors.txt"  # of schedulers and workers
        with self.errors.open("w") as errors:
            self._launcher = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},  # where networks of the tests are defined
            )  # fmt: skip
        assert self._launcher.stdout.readline().strip() == "ready"

    def _fork(self, kind, **arguments):
        self._launcher.stdin.write(json.dumps([kind, arguments]) + "\n")
        self._launcher.stdin.flush()
        return int(self._launcher.stdout.readline())

    def start_command(self, *arguments, output):
        """Start `kdpipe ARGUMENTS`; its end shows in its lock, its output or its process."""
        return self._fork("command", arguments=list(arguments), output=str(output))

    def start_scheduler(self, ttl_seconds=60):
        self.scheduler = self._fork("scheduler", port=self.port, ttl_seconds=ttl_seconds)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if not _runs(self.scheduler):
                raise ChildProcessError(f"the scheduler ended: {self.errors.read_text()[-2000:]}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise TimeoutError("the scheduler does not listen")

    def start_worker(self, name, threads=1, slow=0.0):
        pid = self._fork("worker", address=self.address, name=name, threads=threads, folder=str(self.folder),
                         computed=str(self.computed), slow=slow)  # fmt: skip
        self.workers.append(pid)
        return pid

    def start_pair(self):
        self.end_all()
        self.start_scheduler()
        self.first, self.second = self.start_worker("a"), self.start_worker("b")
        self.wait_for_workers()

    def pair_is_alive(self):
        return self.workers == [self.first, self.second] and all(map(_runs, (self.scheduler, *self.workers)))

    def wait_for_workers(self):
        """Wait until the scheduler knows all that were started: a client begins with those."""
        deadline = time.monotonic() + 30
        while unknown := [pid for pid in self.workers if not _known(self.folder, pid).exists()]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"workers {unknown} did not register: {self.errors.read_text()[-2000:]}")
            time.sleep(0.02)

    def kill(self, pid, number=signal.SIGKILL):
        os.kill(pid, number)
        # Its locks and its port are released with it, a moment later.
        while number == signal.SIGKILL and _runs(pid):
            time.sleep(0.001)
        if pid in self.workers and number == signal.SIGKILL:
            self.workers.remove(pid)

    def kill_workers(self):
        killed = list(self.workers)
        for pid in killed:
            self.kill(pid)
        return killed

    def predicted(self):
        """(process, tile id) of every prediction so far."""
        lines = self.computed.read_text().splitlines() if self.computed.exists() else []
        return [(pid, tile) for line in lines for _, pid, ids in [json.loads(line)] for tile in ids]

    def end_all(self):
        for pid in [*self.workers, self.scheduler]:
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    self.kill(pid)
        for known in self.folder.glob("known.*"):  # process ids come again
            known.unlink()
        self.workers, self.scheduler = [], 0

    def close(self):
        self.end_all()
        self._launcher.stdin.close()
        self._launcher.wait()
        self._launcher.stdout.close()


if __name__ == "__main__":
    _launch()
