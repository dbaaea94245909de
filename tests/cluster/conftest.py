"""A scheduler and workers as real processes, sixteen small tiles, and the cache that one process makes of them."""

from pathlib import Path

import pytest
import torch
from helpers.configs import tiny_config
from helpers.dask_processes import DaskProcesses
from helpers.files import tree, write_image
from helpers.teacher_kinds import config_of, worlds  # noqa: F401 (fixtures)

from kdpipe.pipeline.precompute.run import precompute

TILES, SIDE = 16, 48


@pytest.fixture(scope="session")
def dask(tmp_path_factory):
    """The launcher of schedulers and workers, started once."""
    processes = DaskProcesses(tmp_path_factory.mktemp("dask"))
    yield processes
    processes.close()


@pytest.fixture
def two_workers(dask):
    """A scheduler with two workers: those of an earlier test, unless it ended one."""
    dask.computed.unlink(missing_ok=True)
    if not dask.pair_is_alive():
        dask.start_pair()
    return dask


@pytest.fixture
def fresh(dask):
    """A scheduler of this test alone, without workers."""
    dask.end_all()
    dask.computed.unlink(missing_ok=True)
    dask.start_scheduler()
    return dask


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiles") / "T"
    for i in range(TILES):
        write_image(root / f"images/t{i:02d}.png", SIDE, SIDE + i % 3, seed=i)
    return root


def over(images):
    return {"data__train": [str(images)], "data__allow_missing_masks": True, "data__val": []}


@pytest.fixture
def config(make_config, images):
    return make_config(**over(images))


@pytest.fixture(scope="session")
def whole(landscape, teacher_file, images, tmp_path_factory):
    """Every file of the cache that a single process makes."""
    config = tiny_config(landscape, teacher_file, tmp_path_factory.mktemp("whole"), **over(images))
    precompute(config, torch.device("cpu"))
    return tree(Path(config.cache.path))
