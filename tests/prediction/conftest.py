from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdpipe.configs import Config
from kdpipe.pipeline.training.run import train, with_mode


@pytest.fixture(scope="session")
def made() -> dict[str, bytes]:
    """The checkpoint of a student trained for two steps, made by the first test that needs it."""
    return {}


@pytest.fixture
def trained(make_config: Callable[..., Config], made: dict[str, bytes], tmp_path: Path) -> Path:
    """`best.ckpt` in the current folder: the checkpoint of `made`."""
    if "best.ckpt" not in made:
        train(with_mode(make_config(train__epochs=1, train__max_steps=2), "none"), torch.device("cpu"))
        made["best.ckpt"] = (tmp_path / "model_weights/tests/tiny-none/best.ckpt").read_bytes()
    else:
        make_config()
    path = tmp_path / "best.ckpt"
    path.write_bytes(made["best.ckpt"])
    return path
