"""A cache read by DataLoader workers: the same samples by every start method, no hang, no leak."""

import contextlib
import multiprocessing
import os
import sys
import time
from functools import cache as once
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from helpers.ports import free_port
from torch.utils.data import DataLoader, Dataset

from kdpipe.cache import SoftTargetCache
from kdpipe.cache.index.records import ImageDigest
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.writer import open_writer
from kdpipe.pipeline.training.loaders import _worker_options, report_unless_disconnected, train_loader

sys.path.insert(0, str(Path(__file__).parents[1]))  # in spawned processes too: they unpickle this module's classes
from helpers.caches import RECIPE, distributions

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker processes"),  # more than there are cores
]
TILE_PX, CROP_PX, SAMPLES = 300, 32, 32  # a batch for each of eight workers


@pytest.mark.parametrize(
    ("err", "is_said"), [(ConnectionResetError("gone"), False), (EOFError(), False), (ValueError("wrong"), True)]
)
def test_a_worker_says_nothing_of_a_reader_that_ended(err, is_said, capsys):
    report_unless_disconnected(type(err), err, None)
    assert ("wrong" in capsys.readouterr().err) is is_said


class Crops(Dataset):
    """Windows of a cache, each with the worker that read it: its process, open files and resident bytes."""

    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return SAMPLES

    def __getitem__(self, k):
        rng = np.random.default_rng(k)
        top, left = (int(v) for v in rng.integers(0, TILE_PX - CROP_PX, 2))
        tile = self.cache.tile_ids[k % len(self.cache.tile_ids)]
        target = self.cache.read(tile, window=(top, left, CROP_PX, CROP_PX))
        return {"target": target, "pid": os.getpid(), "files": open_files(), "k": k}


def open_files():
    """The number of open files, without the shared memory of batches in transit."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own, and what other threads close
            links.append(descriptor.readlink())
    return sum("torch_" not in str(link) for link in links)


def resident_bytes():
    return psutil.Process().memory_info().rss


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A cache of four tiles of 300 px."""
    path = str(tmp_path_factory.mktemp("workers") / "c.zarr")
    with open_writer(open_storage(path), RECIPE, device="cpu", libraries={}) as writer:
        writer.begin()
        image = ImageDigest(size_bytes=1, sha256="0" * 64)
        probs = [distributions(len(RECIPE.classes), TILE_PX, TILE_PX, seed=n) for n in range(4)]
        writer.finish([writer.write(f"T/{n}", p, image) for n, p in enumerate(probs)])
    return path


@once
def expected(url):
    crops = Crops(SoftTargetCache.open(url))
    return torch.stack([torch.from_numpy(crops[k]["target"]) for k in range(SAMPLES)])


def epochs(url, workers, start_method, persistent, count=2):
    """The targets of each epoch, and every worker's largest number of open files in it."""
    options = _worker_options(workers)
    if workers:
        options |= {"multiprocessing_context": start_method, "persistent_workers": persistent}
    loader = DataLoader(Crops(SoftTargetCache.open(url)), batch_size=4, timeout=120 if workers else 0, **options)
    for _ in range(count):
        batches = list(loader)
        files = {}
        for batch in batches:
            for pid, number in zip(batch["pid"].tolist(), batch["files"].tolist(), strict=True):
                files.setdefault(pid, []).append(number)
        yield torch.cat([batch["target"] for batch in batches]), files
    if workers and persistent:
        loader._iterator._shutdown_workers()


def check(url, workers, start_method, persistent):
    seen = []
    for targets, files in epochs(url, workers, start_method, persistent):
        assert torch.equal(targets, expected(url))
        assert len(files) == max(1, min(workers, SAMPLES // 4))
        seen.append(files)
    assert (set(seen[0]) == set(seen[1])) == (persistent or workers == 0)
    if persistent and workers:
        for pid, numbers in seen[1].items():
            assert numbers[-1] <= seen[0][pid][-1] + 2, "sockets of a batch in transit, no file of a tile"


ECONOMICAL = [(0, None, False), (1, "spawn", True), (1, "forkserver", False), (2, "fork", True)]
FULL = [
    (workers, method, persistent)
    for workers in (1, 8)
    for method in ("spawn", "forkserver", "fork")
    for persistent in (True, False)
]


@pytest.mark.long
@pytest.mark.parametrize(("workers", "start_method", "persistent"), ECONOMICAL)
def test_workers_read_the_same_samples_by_every_start_method(url, workers, start_method, persistent):
    check(url, workers, start_method, persistent)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "start_method", "persistent"), FULL)
def test_every_combination_of_workers_reads_the_same_samples(url, workers, start_method, persistent):
    check(url, workers, start_method, persistent)


class Counted(Dataset):
    """Eight samples, and the number made by all processes."""

    def __init__(self):
        self.made = multiprocessing.get_context("spawn").Value("i", 0)

    def __len__(self):
        return 8

    def __getitem__(self, k):
        with self.made:
            self.made.value += 1
        return {"image": np.zeros((3, 8, 8), np.uint8), "target": np.full((2, 8, 8), 0.5, np.float32)}


@pytest.mark.long
def test_the_next_batch_is_made_before_it_is_requested(make_config):
    """So a training step, here the sleep, does not wait for the batch after it."""
    dataset = Counted()
    batches = iter(train_loader(make_config(train__batch_size=2), dataset, 0, workers=1, pin=False))
    next(batches)
    deadline = time.monotonic() + 60
    while dataset.made.value < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert dataset.made.value >= 4


@pytest.mark.long
def test_memory_and_open_files_stay_flat_over_10000_windows(url):
    cache = SoftTargetCache.open(url)
    crops = Crops(cache)
    rng = np.random.default_rng(0)

    def read(times):
        for _ in range(times):
            top, left = (int(v) for v in rng.integers(0, TILE_PX - CROP_PX, 2))
            cache.read(cache.tile_ids[rng.integers(4)], window=(top, left, CROP_PX, CROP_PX))

    read(1000)  # lets the allocator grow to what reading needs
    files, memory = open_files(), resident_bytes()
    read(10_000)
    assert open_files() == files
    # A leak of one window (3 classes of 32 px in float32) at each read would be 123 MB; the allocator's pages come and go.
    assert resident_bytes() - memory < 10_000 * 3 * CROP_PX**2 * 4 / 10
    assert len(crops) == SAMPLES


def rank_reads(rank, port, url, queue):
    import torch.distributed as dist
    from torch.utils.data import DistributedSampler

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    dataset = Crops(SoftTargetCache.open(url))
    sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=True, seed=3)
    loader = DataLoader(dataset, batch_size=4, sampler=sampler, timeout=120, **_worker_options(1))
    batches = list(loader)
    total = torch.tensor([sum(len(batch["k"]) for batch in batches)])
    dist.all_reduce(total)
    queue.put(
        (
            rank,
            torch.cat([b["k"] for b in batches]).numpy(),
            torch.cat([b["target"] for b in batches]).numpy(),
            int(total),
        )
    )
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
def test_two_ddp_processes_split_the_samples_and_read_the_same_values(url):
    context = multiprocessing.get_context("spawn")
    queue, port = context.Queue(), free_port()
    ranks = [context.Process(target=rank_reads, args=(rank, port, url, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        found = [queue.get(timeout=150) for _ in ranks]
        for process in ranks:
            process.join(timeout=60)
        assert [process.exitcode for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
    queue.close()
    numbers = np.concatenate([ks for _, ks, _, _ in found])
    assert sorted(numbers) == list(range(SAMPLES)), "every sample once, by one rank"
    assert {total for *_, total in found} == {SAMPLES}
    np.testing.assert_array_equal(
        np.concatenate([targets for _, _, targets, _ in found]), expected(url).numpy()[numbers]
    )
