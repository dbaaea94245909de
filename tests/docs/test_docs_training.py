"""docs/training.md: its commands run, and what it names is what a run writes."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdpipe.configs import dump_config
from kdpipe.pipeline.commands.main import cli
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.reports.terminal import curves as learning_curves
from kdpipe.pipeline.runs import checkpoint as checkpoints
from kdpipe.pipeline.training import tensorboard as board_pictures

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()
COMMANDS = re.search(r"```sh\n(.+?)```", PAGE, flags=re.DOTALL)[1].splitlines()


def test_commands_of_the_page_run_in_their_order(make_config, tmp_path, capsys):
    config = make_config(train__max_steps=2)
    precompute(config, torch.device("cpu"))
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    said = []
    for line in COMMANDS:
        program, *arguments = shlex.split(line)
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


def test_tensorboard_is_there():
    assert shutil.which("tensorboard", path=str(Path(sys.executable).parent))


@pytest.mark.parametrize("title", learning_curves.TITLES.values())
def test_curves_of_the_page_are_those_that_are_drawn(title):
    words = {"its part from labels": "its parts from labels", "its part from soft targets": "soft targets"}
    text = " ".join(PAGE.split())
    assert words.get(title, title).replace("train loss", "training loss") in text


def test_numbers_and_keys_of_the_page_are_the_programs():
    text = " ".join(PAGE.split())
    assert f"at most {board_pictures.SIDE_PX} px a side" in text
    assert f"up to {2 * learning_curves.LARGEST_WIDTH + learning_curves.GAP} (`COLUMNS`" in text
    assert board_pictures.PICTURES_A_RUN == 10
    assert board_pictures.TRAIN_SHOWN + board_pictures.VAL_SHOWN == 5
    assert ", ".join(f"`{key}`" for key in checkpoints.RESUMABLE_KEYS) in text
