"""docs/own-data.md: its commands run or parse, what it quotes is what is written, its names and numbers are the program's."""

import re
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from kdpipe.configs.errors import UnfilledConfig
from kdpipe.configs.load import load_config
from kdpipe.configs.schema import Data
from kdpipe.data import survey
from kdpipe.pipeline.commands.main import cli
from kdpipe.pipeline.starter.classes import NO_LABEL_VALUES
from kdpipe.pipeline.starter.layouts import split_of
from kdpipe.pipeline.starter.teacher import WINDOW_FROM_PX
from kdpipe.pipeline.training.run import with_mode

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "own-data.md").read_text()
COMMANDS = re.findall(
    r"^kdpipe (.+)$", "\n".join(re.findall(r"```sh\n(.+?)```", PAGE, flags=re.DOTALL)), flags=re.MULTILINE
)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_page_parse(line):
    name, *arguments = line.split()
    command = cli.commands[name]
    with click.Context(command) as context:
        command.parse_args(context, arguments)


@pytest.mark.long
def test_the_page_leads_from_tiles_to_a_config_that_lacks_rows_alone(landscape, teacher_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiles").symlink_to(landscape)
    Path("teacher.pth").symlink_to(teacher_file)
    first, second = (line.split() for line in COMMANDS if line.startswith("init "))
    for arguments, asked in ((first, "classes.names (lines "), (second, ": class_map (lines ")):
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        with pytest.raises(UnfilledConfig, match="mine.yaml is not filled in yet") as refused:
            load_config("mine.yaml")
        assert asked in str(refused.value)
    suggest = next(line.split() for line in COMMANDS if line.startswith("suggest-map"))
    done = CliRunner().invoke(cli, [*suggest, "--device", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "class_map:" in done.output


def test_the_yaml_of_the_page_is_what_is_written_of_the_dubai_tiles(dubai, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["init", str(dubai / "data/dubai/Train")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert re.search(r"```yaml\n(.+?)```", PAGE, flags=re.DOTALL)[1] in Path("mine.yaml").read_text()


def test_the_keys_of_the_layouts_are_those_of_a_configuration():
    table = PAGE[PAGE.index("| your data |") : PAGE.index("`init` finds these keys")]
    pieces = [piece for line in table.splitlines()[2:] for piece in re.findall(r"`([^`]+: [^`]+)`", line)]
    assert len(pieces) >= 9
    for piece in pieces:
        Data.model_validate({"train": ["mine"]} | yaml.safe_load(piece))


def test_stretches_of_the_page_are_accepted():
    assert "`data.bands: [4, 3, 2]`" in PAGE
    for stretch in ("{range: [0, 3000]}", "{percentiles: [2, 98]}"):
        assert stretch in PAGE
        load_config("demo", ["data.bands=[4, 3, 2]", f"data.stretch={stretch}"])


def test_a_run_of_another_mode_has_the_name_that_the_page_says():
    assert "`kdpipe train-student -c mine.yaml --kd none`" in PAGE
    assert "`mine-none`" in PAGE
    assert with_mode(load_config("demo", ["name=mine"]), "none").name == "mine-none"


def test_names_and_numbers_of_the_page_are_the_programs():
    assert "Val, Valid or Validation (also `city_val`, `Val/Urban`)" in PAGE
    roots = [
        f"mine/{name}" for name in ("Train", "Val", "Valid", "Validation", "city_val", "Val/Urban", "Test", "Valdivia")
    ]
    assert [split_of(root, roots) for root in roots] == ["train", *["val"] * 5, "test", None]
    assert f"up to {survey.MAX_HEADERS} tiles" in PAGE
    assert f"up to {survey.MAX_READ} images and {survey.MAX_READ} masks" in PAGE
    assert ", ".join(map(str, NO_LABEL_VALUES)) in PAGE
    assert f"more than {WINDOW_FROM_PX // 10**6} MP" in PAGE
    assert {f"--{name}" for name in ("images", "masks", "val", "overwrite", "json")} <= set(
        re.findall(r"--[a-z-]+", PAGE)
    )


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", PAGE))
def test_links_lead_to_files(link):
    assert (Path(__file__).resolve().parents[2] / "docs" / link).exists()
