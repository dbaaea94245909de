"""Recorded views on dask workers: those of a tile together, and only references through the scheduler."""

import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cluster_runs import Told, run
from helpers.configs import tiny_config
from helpers.files import tree

from kdpipe.configs.errors import Interrupted
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.cluster import client as module
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.precompute.subjects import RemoteSubjects, absolute_tile, subjects

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]
VIEWS = {
    "distill__teacher_view": "crop",
    "cache__views": 4,
    "train__crop": 32,
    "train__mosaic": 0.5,
    "train__max_class_share": 0.6,
}


@pytest.fixture
def config(make_config):
    """Six tiles with masks, of different sizes, four crops of each, half of them mosaics that show other tiles too."""
    return make_config(**VIEWS)


@pytest.fixture(scope="module")
def whole_views(landscape, teacher_file, tmp_path_factory):
    """Every file of the cache that a single process makes."""
    config = tiny_config(landscape, teacher_file, tmp_path_factory.mktemp("views"), **VIEWS)
    precompute(config, torch.device("cpu"))
    return tree(Path(config.cache.path))


def test_ctrl_c_within_the_views_of_a_tile_keeps_and_counts_those_that_are_stored(
    two_workers, config, whole_views, tmp_path
):
    stop = threading.Event()
    with pytest.raises(Interrupted, match=r"stopped; (\d+) of 24 views are finished and kept") as interrupted:
        run(config, two_workers.address, Told(tile5=stop.set), stop)
    kept = len(list((tmp_path / "cache.zarr").glob("tiles/Train/*/*/zarr.json")))
    assert f"stopped; {kept} of 24" in str(interrupted.value)
    assert 5 <= kept < 24
    assert run(config, two_workers.address).kept == kept
    assert tree(tmp_path / "cache.zarr") == whole_views
    assert 0 <= len(two_workers.predicted()) - 24 <= 2, "at most what each worker had in hand is lost"


def test_two_workers_of_which_one_is_killed_make_the_bytes_of_one_process(two_workers, config, whole_views, tmp_path):
    killed = two_workers.first

    def kill():
        two_workers.kill(killed)
        two_workers.start_worker("c")

    summary = run(config, two_workers.address, Told(tile7=kill))
    assert tree(tmp_path / "cache.zarr") == whole_views
    assert (summary.computed, summary.noun) == (24, "views")
    predicted = two_workers.predicted()
    views = [view for _, view in predicted]
    assert len(set(views)) == 24
    assert sum(len(view.rsplit("view-", 1)[1]) > 4 for view in set(views)) >= 6, "mosaics"
    for pid, view in predicted:
        again = predicted.index((killed, view)) < predicted.index((pid, view)) if (killed, view) in predicted else False
        assert views.count(view) == 1 or pid == killed or again
    for tile in {view.rsplit("/", 1)[0] for view in views}:
        workers = {pid for pid, view in predicted if view.startswith(f"{tile}/")}
        assert len(workers - {killed}) <= 1, "the views of a tile are computed where it is decoded already"


def test_views_pass_through_the_scheduler_as_names_and_numbers(config):
    tiles = list_tiles(config.data, "train")
    batches = [[subject] for subject in subjects(config, tiles, None)]
    tasks = list(module._tasks(batches))
    assert [len(task) for task in tasks] == [4] * len(tiles)
    for task in tasks:
        assert len(pickle.dumps(task)) < 1000
    remote = RemoteSubjects(config, None, [absolute_tile(tile) for tile in tiles])
    for (subject,), reference in zip(batches, [sent for task in tasks for (sent,) in task], strict=True):
        image, digest = remote.subject(reference).load()
        expected, expected_digest = subject.load()
        np.testing.assert_array_equal(image, expected)
        assert (reference.id, digest) == (subject.id, expected_digest)
