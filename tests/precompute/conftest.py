import shutil

import pytest
import torch
from helpers.configs import tiny_config
from helpers.doubles import Plain
from helpers.views import OF_VIEWS

from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.training import run as training


@pytest.fixture
def make_views(make_config):
    """`make_config` with three recorded views of each tile, small enough to be predicted soon."""
    return lambda **overrides: make_config(**{**OF_VIEWS, **overrides})


@pytest.fixture(scope="session")
def finished_views(landscape, teacher_file, tmp_path_factory):
    """The cache of `make_views()`, computed once; tests that write take a copy, as `views_cache` does."""
    config = tiny_config(landscape, teacher_file, tmp_path_factory.mktemp("views"), **OF_VIEWS)
    precompute(config, torch.device("cpu"))
    return config.cache.path


@pytest.fixture
def views_cache(make_views, finished_views, tmp_path):
    """A copy of the cache of `make_views()`, where that configuration has it."""
    return shutil.copytree(finished_views, tmp_path / "cache.zarr")


@pytest.fixture
def plain_student(monkeypatch):
    """A student of two convolutions: fast, and without a batch norm, which would magnify the last bits."""
    monkeypatch.setattr(training, "starting_student", lambda *args, **options: Plain())
