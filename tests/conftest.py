import gc
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from kdpipe.configs import Config, parse_config
from kdpipe.data.landscape import write_sample_data
from kdpipe.pipeline import cli
from kdpipe.pipeline.models.smp_models import create_smp_model
from kdpipe.pipeline.models.teacher import FrozenTeacher
from kdpipe.pipeline.models.transfers import Clock
from kdpipe.pipeline.precompute import precompute

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Tiny networks gain nothing from a second thread, and lose much where other processes want the core.
torch.set_num_threads(1)
os.environ.setdefault("COLUMNS", "160")
os.environ["OMP_NUM_THREADS"] = "1"  # in the commands that tests start
# What a power cut would lose is known to the tests' crash_disk; a real disk takes minutes.
os.fsync = lambda descriptor: None


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
    """A small U-Net with 8 classes and random weights, scaled so that its answers are neither flat nor certain."""
    torch.manual_seed(0)
    model = create_smp_model("unet", "mobilenet_v2", 8, key="teacher")
    with torch.no_grad():
        model.segmentation_head[0].weight *= 8
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(model.state_dict(), path)
    return path


def tiny_config(landscape: Path, teacher_file: Path, folder: Path, **overrides: object) -> Config:
    """A config on the small landscape, with its cache in `folder`; overrides have dotted keys, written with `__`."""
    raw: dict = {
        "name": "tiny",
        "group": "tests",
        "seed": 7,
        "classes": {"names": ["Background", "Forest", "Grassland", "Cropland", "Settlement", "SemiNatural"]},
        "data": {"train": [str(landscape / "Train")], "val": [str(landscape / "Val")]},
        "teacher": {
            "architecture": "unet",
            "encoder": "mobilenet_v2",
            "checkpoint": str(teacher_file),
            "classes": ["Tree", "Rangeland", "Cropland", "Developed", "Road", "Bareland", "Water", "Background"],
        },
        "class_map": {
            "Tree": {"Forest": 1},
            "Rangeland": {"Grassland": 0.7, "SemiNatural": 0.3},
            "Cropland": {"Cropland": 1},
            "Developed": {"Settlement": 1},
            "Road": {"Settlement": 1},
            "Bareland": {"SemiNatural": 1},
            "Water": {"Background": 1},
            "Background": {"Background": 1},
        },
        "cache": {"path": str(folder / "cache.zarr")},
        "student": {"architecture": "unet", "encoder": "mobilenet_v2"},
        "train": {"epochs": 2, "batch_size": 2, "crop": 64, "workers": 0, "lr": 1e-3, "backbone_lr": 1e-4},
    }
    for key, value in overrides.items():
        *sections, last = key.split("__")
        target = raw
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    return parse_config(raw, "test")


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


def run_command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """
    `kdpipe ARGUMENTS` by its own `main`, in this process, which has imported torch already: as `subprocess.run` answers.

    An error that `main` does not turn into an exit code is raised here, so that a traceback fails the test.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["kdpipe", *map(str, arguments)])
        # All are for the whole process, which other tests share.
        patch.setattr(cli, "keep_freed_memory", lambda: False)
        patch.setattr(cli, "ask_for_huge_pages", lambda: None)
        for name in ("freeze", "disable"):
            patch.setattr(gc, name, lambda: None)
        if cwd is not None:
            patch.chdir(cwd)
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_image(path: Path, height: int, width: int, seed: int = 0) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


class Plain(torch.nn.Module):
    """A student in which samples do not meet: no batch norm."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.head = torch.nn.Conv2d(8, 6, 1)

    def forward(self, x):
        return self.head(torch.relu(self.encoder(x)))


class CostlessTeacher(FrozenTeacher):
    """Answers by the `cached_values` of a subclass, without a network; `by` takes the place of `open_teacher`."""

    def __init__(self):
        self._transfers = None
        self._clock = Clock(torch.device("cpu"))

    def by(self, config, recipe, device):
        self._recipe = recipe
        return self


class Lines:
    """A progress that keeps what is said."""

    def __init__(self):
        self.said = []

    def say(self, line):
        self.said.append(line)

    def bar(self, *args):
        return nullcontext(lambda steps=1, **figures: None)
