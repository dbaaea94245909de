"""docs/maps.md: its commands parse, its numbers and names are those of the program. Its snippet is run in test_export.py."""

import re
from pathlib import Path

import click
import pytest

from kdpipe.data.scenes import SCENE_EXTENSIONS
from kdpipe.pipeline import export, prediction
from kdpipe.pipeline.cli import cli
from kdpipe.pipeline.models.windows import MARGIN

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "maps.md").read_text()
COMMANDS = re.findall(r"^kdpipe (.+)$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_page_parse(line):
    name, *arguments = line.split()
    command = cli.commands[name]
    with click.Context(command) as context:
        command.parse_args(context, arguments)


def test_there_are_commands_for_both():
    assert {line.split()[0] for line in COMMANDS} == {"predict", "export"}


def test_names_and_numbers_of_the_page_are_the_programs():
    for suffix in SCENE_EXTENSIONS:
        assert f"`{suffix}`" in PAGE
    for suffix in prediction.SUFFIXES.values():
        assert f"`NAME{suffix}`" in PAGE
    assert f"`--window` px ({prediction.WINDOW_PX}) that share `--overlap` px ({prediction.OVERLAP_PX})" in PAGE
    assert MARGIN == 3 / 8
    assert f"more than {export.MAX_DIFFERENCE:g}" in PAGE
    assert f"opset {export.OPSET}" in PAGE
    assert export.SIZES["pt2"] in PAGE
    assert f"{prediction.GPU_BATCH} on a GPU" in PAGE
