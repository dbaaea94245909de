"""docs/training.md: its commands run in their order, and write what it names."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.docs_pages import blocks, page_text
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdpipe.configs import dump_config
from kdpipe.pipeline.commands.main import cli
from kdpipe.pipeline.training.run import train

PAGE = page_text("docs/training.md")


@pytest.mark.long
def test_commands_of_the_page_run_in_their_order(make_config, finished_cache, tmp_path, capsys):
    config = make_config(train__max_steps=2)
    shutil.copytree(finished_cache, config.cache.path)
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    said = []
    for program, *arguments in blocks("docs/training.md")[0].commands():
        if program == "tensorboard":
            assert arguments == ["--logdir", "lightning_logs"]
            continue
        cli.main(arguments, standalone_mode=False)
        said.append(capsys.readouterr().out)
    assert [text.count("Learning curves, against steps") for text in said] == [1, 1, 1]
    assert ["its part from soft targets" in text for text in said] == [True, True, False]
    assert "resuming after step 2" in said[1]
    assert {path.name for path in Path("model_weights/tests").iterdir()} == {"tiny", "tiny-none"}
    assert {path.name for path in Path("lightning_logs/tests/tiny").iterdir()} == {"version_0", "version_1"}
    for pattern in re.findall(r"^\| `(\w+/.+?)` \|", PAGE, flags=re.MULTILINE):
        place = pattern.replace("<group>", "tests").replace("<name>", "tiny").replace("version_N", "version_0")
        assert list(Path().glob(place)), place
    board = EventAccumulator("lightning_logs/tests/tiny/version_0").Reload()
    titles = {tag.split("/")[-1] for tag in board.Tags()["images"]}
    assert titles == {*re.findall(r"^\| `(\d .+?)` \|", PAGE, flags=re.MULTILINE), "classes"}


def test_the_losses_of_the_page_train(make_config, finished_cache, tmp_path, monkeypatch):
    """And the loss of one's own is the Jensen-Shannon divergence, SciPy's distance squared."""
    (snippet,) = [yaml.safe_load(block.text) for block in blocks("docs/training.md") if block.language == "yaml"]
    (module,) = [block.text for block in blocks("docs/training.md") if block.language == "python"]
    (tmp_path / module.splitlines()[0].removeprefix("# ")).write_text(module)
    monkeypatch.setattr(sys, "path", [*sys.path])
    keys = {f"{section}__{key}": value for section, keys in snippet.items() for key, value in keys.items()}
    (own,) = re.findall(r"`distill\.loss: (\w+:\w+)`", PAGE)
    for name, more in (("chosen", {}), ("own", {"distill__loss": own})):
        config = make_config(name=name, train__max_steps=2, data__val=[], **{**keys, **more})
        if name == "chosen":
            shutil.copytree(finished_cache, config.cache.path)
        assert np.isfinite(train(config, torch.device("cpu")).losses).all()
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 2, (1, 6, 4, 5)), rng.dirichlet(np.ones(6), (1, 4, 5)).transpose(0, 3, 1, 2)
    counts = rng.random((1, 4, 5)) < 0.7
    q = softmax(logits / 2, axis=1)
    expected = (jensenshannon(targets, q, axis=1) ** 2)[counts].mean()
    found = sys.modules.pop("my_losses").js(*map(torch.tensor, (logits, targets, counts)))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_tensorboard_is_there():
    assert shutil.which("tensorboard", path=str(Path(sys.executable).parent))
