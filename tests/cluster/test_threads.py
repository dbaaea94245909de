"""Threads of torch on workers: their number decides a prediction's last bits, so workers of this machine take that of one process."""

import os
import threading
from contextlib import contextmanager, suppress

import psutil
import pytest
import torch
from helpers.cluster_runs import command
from helpers.commands import run_command
from helpers.configs import ENCODER
from helpers.doubles import Lines
from helpers.files import tree, write_image

from kdpipe.pipeline.cluster import client as module
from kdpipe.pipeline.cluster.client import Cluster
from kdpipe.pipeline.cluster.worker import Facts
from kdpipe.pipeline.models.smp import create_smp_model
from kdpipe.pipeline.precompute.run import precompute

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def listening():
    """`(process id, address, port)` of all sockets on which this process or one below it listens."""
    found, this = set(), psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        with suppress(psutil.Error):
            sockets = process.net_connections(kind="inet")
            found.update((process.pid, *s.laddr) for s in sockets if s.status == psutil.CONN_LISTEN)
    return found


@contextmanager
def listeners():
    """A set of all that is `listening` at any time in the block, and was not before it: servers of other tests."""
    before, found, ended = listening(), set(), threading.Event()

    def look():
        while not ended.wait(0.1):
            found.update(listening() - before)

    watching = threading.Thread(target=look)
    watching.start()
    try:
        yield found
    finally:
        ended.set()
        watching.join()


@pytest.fixture(scope="module")
def fpn_file(tmp_path_factory):
    """Weights of a network with group norms, whose sums depend on the number of threads."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "fpn.pth"
    torch.save(create_smp_model("fpn", ENCODER, 8, key="teacher").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def two_images(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiles") / "T"
    for i in range(2):
        write_image(root / f"images/t{i}.png", 96, 96, seed=i)
    return root


def test_workers_of_this_machine_make_the_bytes_of_one_process_of_several_threads_and_end(
    make_config, two_images, fpn_file, tmp_path, capfd, monkeypatch
):
    def config(name):
        return make_config(
            data__train=[str(two_images)], data__allow_missing_masks=True, data__val=[], cache__kind="logits",
            teacher__architecture="fpn", teacher__checkpoint=str(fpn_file), cache__path=str(tmp_path / name),
        )  # fmt: skip

    def of_one_process(count):
        with threads(count):
            precompute(config(f"{count}.zarr"), torch.device("cpu"))
        return tree(tmp_path / f"{count}.zarr")

    share = max(1, len(os.sched_getaffinity(0)) // 2)  # of the cores, for each worker
    whole = of_one_process(share + 1)
    before = psutil.Process().children(recursive=True)
    addresses, client = [], module.Client
    monkeypatch.setattr(
        module, "Client", lambda address, **options: addresses.append(address) or client(address, **options)
    )
    with threads(share + 1), listeners() as found:
        done = run_command(*command(config("workers.zarr"), tmp_path, "--workers", "2"))
    assert (done.returncode, done.stderr) == (0, "")
    assert capfd.readouterr().err == "", "of the workers"
    left = [child for child in psutil.Process().children(recursive=True) if child not in before]
    assert [child for child in left if "resource_tracker" not in " ".join(child.cmdline())] == []
    # A scheduler here, and two workers with a nanny each: nobody reaches them from elsewhere, nor without this run's certificate.
    assert len({process for process, *_ in found}) >= 3
    assert {ip for _, ip, _ in found} == {"127.0.0.1"}
    assert all(address.startswith("tls://127.0.0.1:") for address in addresses)
    assert "starting 2 workers" in done.stdout
    assert "2 tiles, " in done.stdout
    assert tree(tmp_path / "workers.zarr") == whole
    if of_one_process(share) == whole:
        pytest.skip(f"the rest holds, but this processor's kernels sum alike with {share} and {share + 1} threads")


@pytest.mark.parametrize(
    ("device", "other", "told"),
    [
        ("cpu", {"threads": 8}, True),
        ("cuda", {"threads": 8}, False),  # a GPU's kernels do not depend on the processor's threads
        ("cpu", {"processor": "AVX2"}, True),
        ("cuda", {"processor": "A100"}, True),
        ("cpu", {}, False),
    ],
)
def test_workers_are_said_to_differ_where_that_changes_the_last_bits(monkeypatch, device, other, told):
    same = {"device": device, "libraries": {}, "processor": "P", "threads": 4}
    monkeypatch.setattr(Cluster, "_connect", lambda self, stop: {"a": Facts(**same), "b": Facts(**same | other)})
    monkeypatch.setattr(module, "library_versions", dict)
    progress = Lines()
    Cluster(progress, device, address="tcp://x:1").start(None)
    assert any("workers differ in processor or threads" in line for line in progress.said) == told
