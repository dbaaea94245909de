"""Stage one on dask workers: the bytes of one process, whoever is killed, slow, stopped or restarted."""

import fcntl
import re
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch
from distributed import Client
from helpers.cluster_runs import Told, beside, command, run, wait_for
from helpers.files import tree

from kdpipe.configs.errors import ClusterUnreachable, Interrupted
from kdpipe.pipeline.cluster import client as module
from kdpipe.pipeline.precompute.run import precompute

CPU = torch.device("cpu")
TILES = 16
pytestmark = [pytest.mark.timeout(300), pytest.mark.long]


def test_two_workers_make_the_bytes_of_one_process_and_predict_each_tile_once(two_workers, config, whole, tmp_path):
    summary = run(config, two_workers.address)
    assert tree(tmp_path / "cache.zarr") == whole
    predicted = two_workers.predicted()
    assert sorted(tile for _, tile in predicted) == [f"T/t{i:02d}" for i in range(TILES)]
    assert {pid for pid, _ in predicted} == {two_workers.first, two_workers.second}
    assert sum(summary.workers.values()) == summary.computed == TILES
    assert summary.teacher_seconds > 0
    assert set(beside(tmp_path / "cache.zarr")) - {"cache.zarr.images"} == {
        "cache.zarr.costs.json"
    }  # neither lock nor fence


def test_ctrl_c_keeps_what_is_finished_and_the_next_run_computes_the_rest(two_workers, config, whole, tmp_path):
    stop = threading.Event()
    with pytest.raises(Interrupted, match=r"stopped; (\d+) of 16 tiles are finished and kept"):
        run(config, two_workers.address, Told(tile5=stop.set), stop)
    kept = len(list((tmp_path / "cache.zarr").glob("tiles/T/*/zarr.json")))
    assert 5 <= kept < TILES
    assert run(config, two_workers.address).kept == kept
    assert tree(tmp_path / "cache.zarr") == whole
    assert 0 <= len(two_workers.predicted()) - TILES <= 2, "at most what each worker had in hand is lost"


def run_while_killing(dask, config, kills, rng):
    """Kill a random worker at random tiles, starting another one each time; the killed processes."""
    killed = []

    def kill():
        pid = dask.workers[int(rng.integers(len(dask.workers)))]
        time.sleep(float(rng.uniform(0, 0.05)))
        dask.kill(pid)
        killed.append(pid)
        dask.start_worker(f"w{len(killed)}")

    at = rng.choice(np.arange(1, TILES - 2), kills, replace=False)
    run(config, dask.address, Told(**{f"tile{n}": kill for n in at}))
    predicted = dask.predicted()
    for tile in {tile for _, tile in predicted}:
        first = [pid for pid, other in predicted if other == tile][:-1]
        assert set(first) <= set(killed), f"{tile} was computed again, and no worker that had it was lost"
    assert {tile for _, tile in predicted} == {f"T/t{i:02d}" for i in range(TILES)}
    return killed


def test_workers_killed_at_random_cost_the_tiles_in_their_hands_and_no_byte(two_workers, config, whole, tmp_path):
    assert len(run_while_killing(two_workers, config, 4, np.random.default_rng(0))) == 4
    assert tree(tmp_path / "cache.zarr") == whole


@pytest.mark.slow
def test_fifty_workers_killed_at_random_leave_the_same_bytes(two_workers, config, whole, tmp_path):
    rng = np.random.default_rng(1)
    for _ in range(5):
        run_while_killing(two_workers, config, 10, rng)
        assert tree(tmp_path / "cache.zarr") == whole
        shutil.rmtree(tmp_path / "cache.zarr")
        two_workers.computed.unlink()


def test_a_restarted_scheduler_continues_with_what_is_missing(two_workers, config, whole, tmp_path):
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
    # Receipts that had arrived count too: at most what each of two workers had in hand, and one more.
    assert re.search(r"with ([6-9]|10) of 16 tiles finished", lost), lost
    predicted = [tile for _, tile in two_workers.predicted()]
    assert len(predicted) - len(set(predicted)) <= 2, "at most what each of two workers had in hand"


def short_patience(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 1)
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(module, "COUNT_SECONDS", 0.2)


def test_a_scheduler_that_stays_away_ends_the_run_and_the_same_command_continues(
    two_workers, config, whole, tmp_path, monkeypatch
):
    def end():
        short_patience(monkeypatch)
        two_workers.kill(two_workers.scheduler)

    with pytest.raises(
        ClusterUnreachable, match=r"does not respond \(waited 1 s\); \d+ of 16 tiles are finished and kept; start it"
    ):
        run(config, two_workers.address, Told(tile5=end))
    assert set(beside(tmp_path / "cache.zarr")) - {"cache.zarr.images"} == {"cache.zarr.costs.json"}
    assert precompute(config, CPU).kept >= 5
    assert tree(tmp_path / "cache.zarr") == whole


def test_a_run_whose_workers_are_all_gone_ends_and_says_what_is_kept(two_workers, config, monkeypatch):
    def end():
        short_patience(monkeypatch)
        two_workers.kill_workers()

    with pytest.raises(
        ClusterUnreachable, match=r"has no workers( left)? \(waited 1 s\); \d+ of 16 tiles are finished and kept"
    ):
        run(config, two_workers.address, Told(tile5=end))


@pytest.mark.parametrize("another", [False, True])
def test_results_lost_with_their_workers_are_not_waited_for(two_workers, config, whole, tmp_path, monkeypatch, another):
    """They come from another worker, or the run ends without one."""
    gather, killed = Client._gather_remote, []

    async def gather_too_late_once(self, direct, local_worker):
        if not killed:
            killed.extend(two_workers.kill_workers())
            if another:
                two_workers.start_worker("c")
            else:
                short_patience(monkeypatch)
        return await gather(self, direct, local_worker)

    monkeypatch.setattr(Client, "_gather_remote", gather_too_late_once)
    if another:
        assert run(config, two_workers.address).computed == TILES
        assert tree(tmp_path / "cache.zarr") == whole
        return
    with pytest.raises(
        ClusterUnreachable, match=r"has no workers left \(waited 1 s\); 0 of 16 tiles are finished and kept"
    ):
        run(config, two_workers.address)


def test_a_slow_worker_holds_up_no_more_than_its_own_tiles(fresh, config, whole, tmp_path):
    slow, fast = fresh.start_worker("slow", slow=1.0), fresh.start_worker("fast")
    fresh.wait_for_workers()
    run(config, fresh.address)
    assert tree(tmp_path / "cache.zarr") == whole
    pids = [pid for pid, _ in fresh.predicted()]
    assert len(pids) == TILES
    assert pids.count(fast) > 2 * pids.count(slow) > 0


def stop_between_stores(dask, worker, fence):
    """Pause a worker that does not hold the fence: one paused while it stores would block whoever comes next."""
    while True:
        dask.kill(worker, signal.SIGSTOP)
        with fence.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                dask.kill(worker, signal.SIGCONT)
        time.sleep(0.05)


def test_workers_of_a_killed_command_store_nothing_beside_the_next_one(fresh, config, whole, tmp_path):
    worker = fresh.start_worker("a", slow=0.4)
    client = fresh.start_command(*command(config, tmp_path, "--scheduler", fresh.address), output=tmp_path / "said")
    wait_for(lambda: len(fresh.predicted()) >= 3)
    fresh.kill(client)
    stop_between_stores(fresh, worker, tmp_path / "cache.zarr.workers")  # while it has a tile in hand
    predicted = len(fresh.predicted())
    assert (tmp_path / "cache.zarr.workers").exists()
    summary = precompute(config, CPU)
    assert 1 <= summary.kept <= predicted
    assert not (tmp_path / "cache.zarr.workers").exists()
    files = {path: path.stat().st_ino for path in (tmp_path / "cache.zarr").rglob("*")}
    fresh.kill(worker, signal.SIGCONT)
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
