"""Stage one on the workers of a dask cluster: real processes, killed, stopped, slow, started again and of other kinds."""

import fcntl
import json
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
import torch
from distributed import Client
from helpers.commands import run_command
from helpers.dask_processes import DaskProcesses
from helpers.doubles import Lines
from helpers.files import tree, write_image

from kdpipe.cache.storage import fence
from kdpipe.cache.storage.base import open_storage
from kdpipe.configs import dump_config
from kdpipe.configs.errors import (
    CacheLocked,
    CheckpointError,
    ClusterUnreachable,
    ConfigError,
    DataError,
    Interrupted,
    ShutOut,
)
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.cluster import client as module
from kdpipe.pipeline.cluster.client import Cluster, agreed_device
from kdpipe.pipeline.cluster.worker import Facts, SampledTiles
from kdpipe.pipeline.commands.actions.precompute import precompute_on_cluster
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.precompute.subjects import RemoteSubjects, absolute_tile, subjects
from kdpipe.pipeline.teacher import precision
from kdpipe.pipeline.versions import library_versions

CPU = torch.device("cpu")
TILES, SIDE = 16, 48
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def dask(tmp_path_factory):
    """A scheduler and two workers, started once; a test that ends some of them starts others."""
    processes = DaskProcesses(tmp_path_factory.mktemp("dask"))
    yield processes
    processes.close()


@pytest.fixture
def two_workers(dask):
    dask.end_all()
    dask.computed.unlink(missing_ok=True)
    dask.start_scheduler()
    dask.first = dask.start_worker("a")
    dask.second = dask.start_worker("b")
    dask.wait_for_workers()
    return dask


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiles") / "T"
    for i in range(TILES):
        write_image(root / f"images/t{i:02d}.png", SIDE, SIDE + i % 3, seed=i)
    return root


@pytest.fixture
def config(make_config, images):
    return make_config(data__train=[str(images)], data__allow_missing_masks=True, data__val=[])


_WHOLE = {}


@pytest.fixture
def whole(config, tmp_path):
    """Every file of the cache that a single process makes."""
    if not _WHOLE:
        cache = config.cache.model_copy(update={"path": str(tmp_path / "whole.zarr")})
        precompute(config.model_copy(update={"cache": cache}), CPU)
        _WHOLE.update(tree(tmp_path / "whole.zarr"))
    return _WHOLE


class Told(Lines):
    """Keeps what is said, and calls `at[n]` once n tiles were stored."""

    def __init__(self, **at):
        super().__init__()
        self.at, self.count = {int(key.removeprefix("tile")): call for key, call in at.items()}, 0

    @contextmanager
    def bar(self, title, total, unit, done=0):
        def advance(steps=1, **figures):
            self.count += steps
            if call := self.at.pop(self.count, None):
                call()

        yield advance


def run(config, address, progress=None, stop=None, **options):
    progress = progress or Told()
    with Cluster(progress, "cpu", address=address) as cluster:
        return precompute(config, CPU, progress, stop, workers=cluster, **options)


def beside(cache):
    """The names of the files that a cache's own begins."""
    return sorted(path.name for path in cache.parent.glob(f"{cache.name}.*"))


def test_two_workers_make_the_bytes_of_one_process_and_ask_about_each_tile_once(two_workers, config, whole, tmp_path):
    summary = run(config, two_workers.address)
    assert tree(tmp_path / "cache.zarr") == whole
    asked = two_workers.asked()
    assert sorted(tile for _, tile in asked) == [f"T/t{i:02d}" for i in range(TILES)]
    assert {pid for pid, _ in asked} == {two_workers.first, two_workers.second}
    assert sum(summary.workers.values()) == summary.computed == TILES
    assert summary.teacher_seconds > 0
    assert beside(tmp_path / "cache.zarr") == ["cache.zarr.costs.json"]  # neither lock nor fence


def kill_workers(dask, config, kills, rng):
    """Ends a random worker at random tiles, and starts another one for it; the processes that were killed."""
    killed = []

    def kill():
        pid = dask.workers[int(rng.integers(len(dask.workers)))]
        time.sleep(float(rng.uniform(0, 0.05)))
        dask.kill(pid)
        killed.append(pid)
        dask.start_worker(f"w{len(killed)}")

    at = rng.choice(np.arange(1, TILES - 2), kills, replace=False)
    run(config, dask.address, Told(**{f"tile{n}": kill for n in at}))
    asked = dask.asked()
    for tile in {tile for _, tile in asked}:
        first = [pid for pid, other in asked if other == tile][:-1]
        assert set(first) <= set(killed), f"{tile} was computed again, and nobody who had it was lost"
    assert {tile for _, tile in asked} == {f"T/t{i:02d}" for i in range(TILES)}
    return killed


def test_workers_killed_at_random_cost_the_tiles_that_they_had_and_no_byte(two_workers, config, whole, tmp_path):
    assert len(kill_workers(two_workers, config, 4, np.random.default_rng(0))) == 4
    assert tree(tmp_path / "cache.zarr") == whole


@pytest.mark.slow
def test_fifty_workers_killed_at_random_leave_the_same_bytes(two_workers, config, whole, tmp_path):
    rng = np.random.default_rng(1)
    for _ in range(5):
        kill_workers(two_workers, config, 10, rng)
        assert tree(tmp_path / "cache.zarr") == whole
        subprocess.run(["rm", "-r", str(tmp_path / "cache.zarr")], check=True)
        two_workers.computed.unlink()


def test_a_scheduler_started_again_goes_on_with_what_is_missing(two_workers, config, whole, tmp_path):
    def restart():
        two_workers.kill(two_workers.scheduler)
        two_workers.workers.clear()  # without it they end by themselves
        two_workers.start_scheduler()
        two_workers.start_worker("c")

    told = Told(tile6=restart)
    summary = run(config, two_workers.address, told)
    assert tree(tmp_path / "cache.zarr") == whole
    assert summary.computed == TILES
    lost = next(line for line in told.said if "lost the scheduler at tcp://127.0.0.1" in line)
    # Those that had arrived count as well: at most what each of two workers had in hand, and one more.
    assert re.search(r"with ([6-9]|10) of 16 tiles finished", lost), lost
    asked = [tile for _, tile in two_workers.asked()]
    assert len(asked) - len(set(asked)) <= 2, "at most what each of two workers had in hand"


def test_a_scheduler_that_stays_away_ends_the_run_and_the_same_command_goes_on(
    two_workers, config, whole, tmp_path, monkeypatch
):
    def end():
        monkeypatch.setattr(module, "PATIENCE_SECONDS", 1)
        monkeypatch.setattr(module, "CONNECT_SECONDS", 0.5)
        two_workers.kill(two_workers.scheduler)

    with pytest.raises(
        ClusterUnreachable, match=r"does not respond \(waited 1 s\); \d+ of 16 tiles are finished and kept; start it"
    ):
        run(config, two_workers.address, Told(tile5=end))
    assert beside(tmp_path / "cache.zarr") == ["cache.zarr.costs.json"]
    assert precompute(config, CPU).kept >= 5
    assert tree(tmp_path / "cache.zarr") == whole


def test_a_run_whose_workers_are_all_gone_ends_and_says_what_is_kept(two_workers, config, monkeypatch):
    def end():
        monkeypatch.setattr(module, "PATIENCE_SECONDS", 1)
        monkeypatch.setattr(module, "COUNT_SECONDS", 0.2)
        for pid in list(two_workers.workers):
            two_workers.kill(pid)

    with pytest.raises(
        ClusterUnreachable, match=r"has no workers( left)? \(waited 1 s\); \d+ of 16 tiles are finished and kept"
    ):
        run(config, two_workers.address, Told(tile5=end))


def test_results_that_are_lost_with_the_last_worker_are_not_waited_for(two_workers, config, monkeypatch):
    gather = Client._gather_remote

    async def gather_too_late(self, direct, local_worker):
        monkeypatch.setattr(module, "PATIENCE_SECONDS", 1)
        monkeypatch.setattr(module, "COUNT_SECONDS", 0.2)
        for pid in list(two_workers.workers):
            two_workers.kill(pid)
        return await gather(self, direct, local_worker)

    monkeypatch.setattr(Client, "_gather_remote", gather_too_late)
    with pytest.raises(
        ClusterUnreachable, match=r"has no workers left \(waited 1 s\); 0 of 16 tiles are finished and kept"
    ):
        run(config, two_workers.address)


def test_results_that_are_lost_with_their_worker_come_from_the_next(two_workers, config, whole, tmp_path, monkeypatch):
    gather, killed = Client._gather_remote, []

    async def gather_too_late_once(self, direct, local_worker):
        if not killed:
            for pid in list(two_workers.workers):
                two_workers.kill(pid)
                killed.append(pid)
            two_workers.start_worker("c")
        return await gather(self, direct, local_worker)

    monkeypatch.setattr(Client, "_gather_remote", gather_too_late_once)
    assert run(config, two_workers.address).computed == TILES
    assert tree(tmp_path / "cache.zarr") == whole


def test_a_slow_worker_holds_up_no_more_than_its_own_tiles(dask, config, whole, tmp_path):
    dask.end_all()
    dask.computed.unlink(missing_ok=True)
    dask.start_scheduler()
    slow, fast = dask.start_worker("slow", slow=1.0), dask.start_worker("fast")
    dask.wait_for_workers()
    run(config, dask.address)
    assert tree(tmp_path / "cache.zarr") == whole
    asked = [pid for pid, _ in dask.asked()]
    assert len(asked) == TILES
    assert asked.count(fast) > 2 * asked.count(slow) > 0


def test_ctrl_c_keeps_what_is_finished_and_the_next_run_computes_the_rest(two_workers, config, whole, tmp_path):
    stop = threading.Event()
    with pytest.raises(Interrupted, match=r"stopped; (\d+) of 16 tiles are finished and kept"):
        run(config, two_workers.address, Told(tile5=stop.set), stop)
    kept = len(list((tmp_path / "cache.zarr").glob("tiles/T/*/zarr.json")))
    assert 5 <= kept < TILES
    assert run(config, two_workers.address).kept == kept
    assert tree(tmp_path / "cache.zarr") == whole
    assert len(two_workers.asked()) - TILES in (
        0,
        1,
        2,
    )  # what a worker had in hand as the fence was taken back is lost


def command(config, tmp_path, *options):
    (tmp_path / "config.yaml").write_text(dump_config(config))
    return ["precompute-teacher", "-c", str(tmp_path / "config.yaml"), "--device", "cpu", *options]


def wait_for(condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def stop_between_stores(dask, worker, fence):
    """Stop a worker that asks or encodes: one that is stopped while it stores holds the fence, and whoever comes next waits for it."""
    while True:
        dask.kill(worker, signal.SIGSTOP)
        with fence.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                dask.kill(worker, signal.SIGCONT)
        time.sleep(0.05)


def test_workers_of_a_killed_command_store_nothing_beside_the_next_one(dask, config, whole, tmp_path):
    dask.end_all()
    dask.computed.unlink(missing_ok=True)
    dask.start_scheduler()
    worker = dask.start_worker("a", slow=0.4)
    client = dask.start_command(*command(config, tmp_path, "--scheduler", dask.address), output=tmp_path / "said")
    wait_for(lambda: len(dask.asked()) >= 3)
    dask.kill(client)
    stop_between_stores(dask, worker, tmp_path / "cache.zarr.workers")  # while it has a tile in hand
    asked = len(dask.asked())
    assert (tmp_path / "cache.zarr.workers").exists()
    summary = precompute(config, CPU)
    assert 1 <= summary.kept <= asked
    assert not (tmp_path / "cache.zarr.workers").exists()
    files = {path: path.stat().st_ino for path in (tmp_path / "cache.zarr").rglob("*")}
    dask.kill(worker, signal.SIGCONT)
    time.sleep(1.5)
    assert {path: path.stat().st_ino for path in (tmp_path / "cache.zarr").rglob("*")} == files
    assert tree(tmp_path / "cache.zarr") == whole


@pytest.mark.slow
def test_a_worker_that_was_thought_dead_and_comes_back_changes_nothing(dask, config, whole, tmp_path):
    dask.end_all()
    dask.computed.unlink(missing_ok=True)
    dask.start_scheduler(ttl_seconds=5)
    sleeper, _ = dask.start_worker("sleeper", slow=0.2), dask.start_worker("b", slow=0.2)
    dask.wait_for_workers()
    told = Told(tile4=lambda: dask.kill(sleeper, signal.SIGSTOP), tile15=lambda: dask.kill(sleeper, signal.SIGCONT))
    run(config, dask.address, told)
    time.sleep(1)
    assert tree(tmp_path / "cache.zarr") == whole


def test_the_command_says_what_single_process_says_and_an_unreadable_image_ends_it_with_1(
    two_workers, config, tmp_path, images
):
    broken = images / "images/t07.png"
    content = broken.read_bytes()
    broken.write_bytes(content[:100])
    try:
        said = tmp_path / "said"
        arguments = command(config, tmp_path, "--scheduler", two_workers.address, "--json", str(tmp_path / "run.json"))
        two_workers.start_command(*arguments, output=said)
        wait_for(lambda: said.exists() and "Repair or remove" in said.read_text())
    finally:
        broken.write_bytes(content)
    result = json.loads((tmp_path / "run.json").read_text())
    assert (result["computed"], list(result["failed"])) == (TILES - 1, ["T/t07"])
    text = " ".join(said.read_text().split())
    assert "2 workers on cpu" in text
    assert "1 of 16 tiles could not be computed: T/t07." in text
    assert "Traceback" not in text


def test_an_error_of_a_worker_is_told_with_its_place(two_workers, config, tmp_path, monkeypatch):
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(1)}, other)
    teacher = config.teacher.model_copy(update={"checkpoint": str(other)})
    with pytest.raises(
        CheckpointError, match="other.pth holds a network that is not recognised, but teacher says unet"
    ):
        run(config.model_copy(update={"teacher": teacher}), two_workers.address)
    assert beside(tmp_path / "cache.zarr") == []


def test_workers_that_see_other_files_are_named(two_workers, config, tmp_path, monkeypatch):
    """Each time one thing of the job is as on a machine that lacks the shared file system."""
    right = module.Job

    def altered(**changes):
        monkeypatch.setattr(module, "Job", lambda **fields: right(**{**fields, **changes}))
        return run(config, two_workers.address)

    with pytest.raises(
        ConfigError, match=r"worker tcp://127.* does not see the cache /nowhere/c.zarr that this run writes"
    ):
        altered(cache="/nowhere/c.zarr")
    with pytest.raises(DataError, match=r"worker tcp://127.* does not see the image /nowhere.png \(No such file"):
        altered(probe=("/nowhere.png", 1))
    image = config.data.train[0] + "/images/t00.png"
    with pytest.raises(DataError, match=r"worker tcp://127.* sees another image .*t00.png: \d+ bytes, not 1;"):
        altered(probe=(image, 1))
    gone = config.model_copy(update={"teacher": config.teacher.model_copy(update={"checkpoint": "/nowhere.pth"})})
    with pytest.raises(CheckpointError, match=r"teacher.checkpoint: worker tcp://127.* has no file at /nowhere.pth"):
        altered(config=gone)
    (tmp_path / "another.pth").write_bytes(b"x")
    there = {"checkpoint": str(tmp_path / "another.pth")}
    with pytest.raises(CheckpointError, match=r"has another file at .*another.pth: its sha256 is 2d711642b726…, not"):
        altered(config=config.model_copy(update={"teacher": config.teacher.model_copy(update=there)}))
    with pytest.raises(ConfigError, match=r"worker tcp://127.* has other versions than the run: torch .*, not 0"):
        altered(libraries={**library_versions(), "torch": "0"})


def facts(**changes):
    return Facts(**{"device": "cuda", "libraries": {"torch": "2.9"}, "processor": "H100", "threads": 4, **changes})


def test_workers_must_agree_in_device_and_libraries():
    assert agreed_device({"a": facts(), "b": facts(processor="A100")}, {"torch": "2.9"}) == "cuda"
    with pytest.raises(
        ConfigError, match="worker b computes on cpu, worker a on cuda: .* end the workers of the other kind"
    ):
        agreed_device({"a": facts(), "b": facts(device="cpu")}, {"torch": "2.9"})
    with pytest.raises(ConfigError, match="worker b has other versions than this command: torch 2.8, not 2.9"):
        agreed_device({"a": facts(), "b": facts(libraries={"torch": "2.8"})}, {"torch": "2.9"})


def test_a_wrong_address_and_an_absent_scheduler_are_told(config, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 3)
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.3)
    with pytest.raises(ConfigError, match=r"--scheduler nonsense://x: expected an address .* such as tcp://host:8786"):
        run(config, "nonsense://x")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        told = Told()
        with pytest.raises(
            ClusterUnreachable, match=f"the dask scheduler at {address} does not respond, .* start it with its"
        ):
            run(config, address, told)
    assert told.said == [f"the dask scheduler at {address} does not respond; waiting for up to 3 s"]


def test_a_fence_holds_workers_out_once_it_is_down_and_waits_for_those_that_store(tmp_path, monkeypatch):
    storage = open_storage(str(tmp_path / "c.zarr"))
    order = []
    with fence.open_fence(storage) as token:
        with (
            pytest.raises(ShutOut, match="the worker stores nothing; start that run again"),
            fence.within_fence(storage, "x"),
        ):
            pass
        entered, go = threading.Event(), threading.Event()

        def store():
            with fence.within_fence(storage, token):
                entered.set()
                go.wait(10)
                order.append("stored")

        worker = threading.Thread(target=store)
        worker.start()
        assert entered.wait(10)
        monkeypatch.setattr(fence, "PATIENCE_SECONDS", 0.1)
        with pytest.raises(
            CacheLocked, match=r"a worker of an earlier run has been storing a tile .*c.zarr.workers\); end that"
        ):
            fence.shut_out_workers(storage)
        monkeypatch.undo()
        threading.Timer(0.2, go.set).start()
    order.append("down")
    worker.join()
    assert order == ["stored", "down"]
    with pytest.raises(ShutOut), fence.within_fence(storage, token):
        pass
    assert not (tmp_path / "c.zarr.workers").exists()


def test_a_fence_on_an_object_store_holds_workers_out_too():
    storage = open_storage("memory://fence/c.zarr")
    with fence.open_fence(storage) as token:
        with fence.within_fence(storage, token):
            pass
        with pytest.raises(ShutOut), fence.within_fence(storage, "x"):
            pass
    with pytest.raises(ShutOut), fence.within_fence(storage, token):
        pass


def test_without_dask_distributed_the_command_says_how_to_install_it(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "kdpipe.pipeline.cluster.client")
    monkeypatch.delitem(sys.modules, "kdpipe.pipeline.cluster.worker")
    with pytest.raises(ConfigError, match=r"need dask.distributed: pip install 'kdpipe\[cluster\]'"):
        precompute_on_cluster(config, None, Lines(), repair=False, workers=2, scheduler=None)


def test_workers_of_this_machine_are_started_and_ended_by_the_command(config, whole, tmp_path, capfd):
    before = psutil.Process().children(recursive=True)
    done = run_command(*command(config, tmp_path, "--workers", "2"))
    assert (done.returncode, done.stderr) == (0, "")
    assert capfd.readouterr().err == "", "of the workers"
    left = [child for child in psutil.Process().children(recursive=True) if child not in before]
    assert [child for child in left if "resource_tracker" not in " ".join(child.cmdline())] == []
    assert "starting 2 workers" in done.stdout
    assert "16 tiles, " in done.stdout
    assert tree(tmp_path / "cache.zarr") == whole


def test_precision_auto_is_decided_on_a_worker(two_workers, config, monkeypatch):
    """As if the workers were fast at bf16, which this process is not asked about."""
    recipe = complete_recipe(config, None, None)
    tiles = list_tiles(config.data, "train")
    with Cluster(Told(), "cpu", address=two_workers.address) as cluster:
        assert cluster.resolve_precision(config, recipe, tiles, None, threading.Event()) == recipe
        cluster._fast_bf16 = True
        # The worker's own processor decides in the end; that it was asked with the tiles it needs is what is seen here.
        expected = precision.resolve(config, recipe, tiles, None, CPU)
        assert cluster.resolve_precision(config, recipe, tiles, None, threading.Event()) == expected
    sampled = SampledTiles(tiles, [3, 5])
    assert (len(sampled), sampled[np.int64(5)]) == (TILES, tiles[5])


@pytest.fixture
def of_views(make_config):
    """Six tiles with masks, of different sizes, four crops of each, half of them mosaics that show other tiles too."""
    return make_config(
        distill__teacher_view="crop", cache__views=4, train__crop=32, train__mosaic=0.5, train__max_class_share=0.6
    )


def single_process(config, tmp_path):
    cache = config.cache.model_copy(update={"path": str(tmp_path / "whole.zarr")})
    precompute(config.model_copy(update={"cache": cache}), CPU)
    return tree(tmp_path / "whole.zarr")


def test_recorded_views_on_two_workers_of_which_one_is_killed_are_those_of_one_process(two_workers, of_views, tmp_path):
    whole = single_process(of_views, tmp_path)
    killed = two_workers.first

    def kill():
        two_workers.kill(killed)
        two_workers.start_worker("c")

    summary = run(of_views, two_workers.address, Told(tile7=kill))
    assert tree(tmp_path / "cache.zarr") == whole
    assert (summary.computed, summary.noun) == (24, "views")
    asked = two_workers.asked()
    views = [view for _, view in asked]
    assert len(set(views)) == 24
    assert sum(len(view.rsplit("view-", 1)[1]) > 4 for view in set(views)) >= 6, "mosaics"
    for pid, view in asked:
        assert views.count(view) == 1 or pid == killed or asked.index((killed, view)) < asked.index((pid, view))
    for tile in {view.rsplit("/", 1)[0] for view in views}:
        workers = {pid for pid, view in asked if view.startswith(f"{tile}/")}
        assert len(workers - {killed}) <= 1, "the views of a tile are computed where it is decoded already"


def test_ctrl_c_within_the_views_of_a_tile_keeps_and_counts_those_that_are_stored(two_workers, of_views, tmp_path):
    whole = single_process(of_views, tmp_path)
    stop = threading.Event()
    with pytest.raises(Interrupted, match=r"stopped; (\d+) of 24 views are finished and kept") as interrupted:
        run(of_views, two_workers.address, Told(tile5=stop.set), stop)
    kept = len(list((tmp_path / "cache.zarr").glob("tiles/Train/*/*/zarr.json")))
    assert f"stopped; {kept} of 24" in str(interrupted.value)
    assert 5 <= kept < 24
    assert run(of_views, two_workers.address).kept == kept
    assert tree(tmp_path / "cache.zarr") == whole
    assert len(two_workers.asked()) - 24 in (0, 1, 2)  # one in a worker's hand may be lost


def test_what_goes_through_the_scheduler_for_views_is_names_and_numbers(of_views):
    tiles = list_tiles(of_views.data, "train")
    batches = [[subject] for subject in subjects(of_views, tiles, None)]
    tasks = module._tasks(batches)
    assert [len(task) for task in tasks] == [4] * len(tiles)
    for task in tasks:
        assert len(pickle.dumps(task)) < 1000
    elsewhere = RemoteSubjects(of_views, None, [absolute_tile(tile) for tile in tiles])
    for (subject,), found in zip(batches, [found for task in tasks for (found,) in task], strict=True):
        image, digest = elsewhere.subject(found).load()
        expected, expected_digest = subject.load()
        np.testing.assert_array_equal(image, expected)
        assert (found.id, digest) == (subject.id, expected_digest)
