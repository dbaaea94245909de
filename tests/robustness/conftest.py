"""The small world of the tests of damage, crashes and repair: three tiny images, a teacher without a network, a finished cache."""

import shutil

import pytest
import torch
from helpers.configs import tiny_config
from helpers.odd_files import mounted
from helpers.small_world import PixelTeacher, write_tiles

from kdpipe.pipeline.precompute import run as stage
from kdpipe.pipeline.precompute.run import precompute


@pytest.fixture
def teacher(monkeypatch):
    """Takes the place of the network in `precompute` and `verify`."""
    monkeypatch.setattr("kdpipe.pipeline.teacher.sources.file_sha256", lambda path: "0" * 64)
    found = PixelTeacher()
    monkeypatch.setattr(stage, "open_teacher", found.by)
    return found


@pytest.fixture
def make(make_config, teacher, tmp_path):
    """Makes a config over the three images from overrides; by default its cache is `tmp_path / "cache.zarr"`."""
    write_tiles(tmp_path / "data")
    return lambda **overrides: make_config(
        **{"data__train": [str(tmp_path / "data/Mine")], "data__allow_missing_masks": True, **overrides}
    )


@pytest.fixture(scope="session")
def finished_world(landscape, teacher_file, tmp_path_factory):
    """A folder to copy: `data` and a finished `cache.zarr`, laid out as `make` expects them."""
    folder = tmp_path_factory.mktemp("world")
    write_tiles(folder / "data")
    config = tiny_config(
        landscape, teacher_file, folder, data__train=[str(folder / "data/Mine")], data__allow_missing_masks=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdpipe.pipeline.teacher.sources.file_sha256", lambda path: "0" * 64)
        patch.setattr(stage, "open_teacher", PixelTeacher().by)
        precompute(config, torch.device("cpu"))
    return folder


@pytest.fixture
def finished(make, tmp_path, finished_world):
    """`make`, and its cache is complete."""
    shutil.copytree(finished_world, tmp_path, dirs_exist_ok=True)
    return make


@pytest.fixture
def tiny_disk(tmp_path):
    """A real disk of 96 kB with a file of the user's on it."""
    (tmp_path / "disk").mkdir()
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=96k", "tmpfs") as disk:
        (disk / "thesis").write_text("my own")
        yield disk


@pytest.fixture
def read_only(tmp_path):
    """Mounts a folder read-only, at its own place."""
    held = []

    def mount(folder):
        entered = mounted(folder, "--bind", "-o", "ro", str(folder))
        entered.__enter__()
        held.append(entered)
        return folder

    yield mount
    for entered in reversed(held):
        entered.__exit__(None, None, None)
