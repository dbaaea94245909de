"""docs/training.md: its commands run in their order, and write what it names."""

import re
import shutil
import sys
from pathlib import Path

from helpers.docs_pages import blocks, page_text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdpipe.configs import dump_config
from kdpipe.pipeline.commands.main import cli

PAGE = page_text("docs/training.md")


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


def test_tensorboard_is_there():
    assert shutil.which("tensorboard", path=str(Path(sys.executable).parent))
