"""Fixtures for rooms whose tests need a teacher that kdpipe recognises from its tensors: import both into the room's conftest."""

from pathlib import Path

import pytest
import torch
from helpers.configs import RECOGNISED, tiny_config, write_teacher

from kdpipe.pipeline.precompute.run import precompute


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a teacher whose network is recognised."""
    return write_teacher(tmp_path_factory.mktemp("recognised"), RECOGNISED)


@pytest.fixture(scope="session")
def finished_cache(landscape: Path, teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `make_config()` with that teacher, computed once."""
    config = tiny_config(landscape, teacher_file, tmp_path_factory.mktemp("recognised_cache"))
    precompute(config, torch.device("cpu"))
    return Path(config.cache.path)
