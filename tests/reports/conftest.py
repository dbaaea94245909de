"""Two runs of a few steps, trained once for all tests of reports."""

from pathlib import Path

import pytest
import torch
from helpers.configs import tiny_config

from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.training.run import train, with_mode

CPU = torch.device("cpu")
RUN = "model_weights/tests/tiny"


@pytest.fixture(scope="session")
def trained(landscape, teacher_file, tmp_path_factory):
    """A folder with a cache, a run from it and one without a teacher, in `RUN` and `RUN-none`; and the config."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = tiny_config(landscape, teacher_file, folder, train__epochs=1, train__max_steps=2)
        precompute(config, CPU)
        train(config, CPU)
        train(with_mode(config, "none"), CPU)
    assert Path(folder, f"{RUN}-none").is_dir()
    return folder, config


@pytest.fixture
def inside(trained, monkeypatch):
    """The config of `trained`, in its folder."""
    monkeypatch.chdir(trained[0])
    return trained[1]
