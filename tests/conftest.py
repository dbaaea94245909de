import gc
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.configs import ENCODER, tiny_config, write_teacher

from kdpipe.configs import Config
from kdpipe.data.landscape.labels import write_sample_data
from kdpipe.pipeline.precompute.run import precompute

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Tiny networks gain nothing from a second thread, and lose much where other processes want the core.
torch.set_num_threads(1)
os.environ.setdefault("COLUMNS", "160")
os.environ["OMP_NUM_THREADS"] = "1"  # in the commands that tests start
# What a power cut would lose is known to the tests' crash_disk; a real disk takes minutes.
os.fsync = lambda descriptor: None
# What `teacher.precision: auto` decides depends on the processor, and what bf16 gives on how many images are predicted together.
torch.cpu._is_amx_tile_supported = lambda: False
# A full collection goes through no library that is imported by now: it took 0.3 s, and is run several times a test.
gc.freeze()


@pytest.fixture(scope="session")
def dubai() -> Path:
    """The real tiles, teacher and golden outputs, which a public clone does not have."""
    if not (SHARED / "data" / "dubai").is_dir():
        pytest.skip("the Dubai tiles and their teacher are not here (../shared)")
    return SHARED


@pytest.fixture(scope="session")
def landscape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six labelled, two validation and two unlabelled tiles of odd sizes, generated once."""
    folder = tmp_path_factory.mktemp("landscape") / "data"
    write_sample_data(folder, seed=3, train=6, val=2, unlabelled=2, teacher=0, side=(65, 110))
    return folder


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of the configured teacher."""
    return write_teacher(tmp_path_factory.mktemp("teacher"), ENCODER)


@pytest.fixture
def make_config(
    landscape: Path, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Config]:
    """`tiny_config` with overrides alone; runs write below `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return partial(tiny_config, landscape, teacher_file, tmp_path)


@pytest.fixture(scope="session")
def finished_cache(landscape: Path, teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `make_config()`, computed once; tests take a copy, as `cached` does."""
    config = tiny_config(landscape, teacher_file, tmp_path_factory.mktemp("finished"))
    precompute(config, torch.device("cpu"))
    return Path(config.cache.path)


@pytest.fixture
def cached(make_config: Callable[..., Config], finished_cache: Path) -> Config:
    """`make_config()`, and its cache is complete."""
    config = make_config()
    shutil.copytree(finished_cache, config.cache.path)
    return config
