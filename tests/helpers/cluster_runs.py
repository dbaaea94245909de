"""Stage one on a cluster, from the tests' process, and progress that acts after some tiles."""

import time
from contextlib import contextmanager

import torch
from helpers.doubles import Lines

from kdpipe.configs import dump_config
from kdpipe.pipeline.cluster.client import Cluster
from kdpipe.pipeline.precompute.run import precompute


class Told(Lines):
    """Keeps what is said, and calls `tile3` once three tiles are stored."""

    def __init__(self, **calls):
        super().__init__()
        self.calls, self.count = {int(key.removeprefix("tile")): call for key, call in calls.items()}, 0

    @contextmanager
    def bar(self, title, total, unit, done=0):
        def advance(steps=1, **figures):
            self.count += steps
            if call := self.calls.pop(self.count, None):
                call()

        yield advance


def run(config, address, progress=None, stop=None):
    progress = progress or Told()
    with Cluster(progress, "cpu", address=address) as cluster:
        return precompute(config, torch.device("cpu"), progress, stop, workers=cluster)


def command(config, folder, *options):
    """The arguments of `kdpipe precompute-teacher`."""
    (folder / "config.yaml").write_text(dump_config(config))
    return ["precompute-teacher", "-c", str(folder / "config.yaml"), "--device", "cpu", *options]


def beside(cache):
    """The names of the files beside a cache that begin with its name."""
    return sorted(path.name for path in cache.parent.glob(f"{cache.name}.*"))


def wait_for(condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found
