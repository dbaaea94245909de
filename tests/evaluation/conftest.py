"""A student that was trained once, for all tests that score one."""

import pytest
import torch
from helpers.configs import tiny_config

from kdpipe.pipeline.training.run import train, with_mode


@pytest.fixture(scope="session")
def student_run(landscape, teacher_file, tmp_path_factory):
    """The folder and the config of a student trained for two steps without its teacher, and the run's summary."""
    folder = tmp_path_factory.mktemp("student")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = tiny_config(landscape, teacher_file, folder, train__epochs=1, train__max_steps=2)
        summary = train(with_mode(config, "none"), torch.device("cpu"))
    return folder, config, summary


@pytest.fixture
def trained(student_run, monkeypatch):
    """The config of `student_run`, in its folder, where the checkpoint is model_weights/tests/tiny-none/best.ckpt."""
    monkeypatch.chdir(student_run[0])
    return student_run[1]
