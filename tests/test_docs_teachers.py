"""docs/teachers.md: its YAML is accepted, its commands and names exist."""

import re
from pathlib import Path

import click
import pytest
import yaml

from kdpipe.configs import load_config, parse_config
from kdpipe.pipeline.cli import cli
from kdpipe.pipeline.models.weights import PREFIXES

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "teachers.md").read_text()
SNIPPETS = re.findall(r"^```yaml\n(.+?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def config_with(snippet):
    """The guide's config with the snippet's keys; a class map and a list of teachers take the place of the old."""
    raw = load_config("biodiversity/ftunetformer_kd").model_dump(mode="json")
    for key, value in yaml.safe_load(snippet).items():
        raw[key] = {**raw[key], **value} if key == "teacher" else value
        if key == "teachers":
            raw["teacher"] = None
    return parse_config(raw, "the snippet")


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[f"snippet {i}" for i in range(len(SNIPPETS))])
def test_snippets_are_accepted_and_change_something_or_are_the_guides(snippet):
    config = config_with(snippet)
    guide = load_config("biodiversity/ftunetformer_kd")
    assert (config == guide) == ("checkpoint: pretrain_weights" in snippet and "teachers:" not in snippet)


def test_there_is_a_snippet_for_each_topic():
    assert len(SNIPPETS) == 6


def test_the_page_says_that_nine_channels_are_shipped_as_they_are():
    shipped = load_config("biodiversity/ftunetformer_kd_openearthmap")
    config = config_with(SNIPPETS[1])
    assert (config.members, config.class_map) == (shipped.members, shipped.class_map)


def test_commands_of_the_page_parse():
    lines = re.findall(r"^kdpipe (.+)$|`kdpipe ([^`]+)`", PAGE, flags=re.MULTILINE)
    assert len(lines) >= 3
    for line in ("".join(pair) for pair in lines):
        name, *arguments = line.split()
        command = cli.commands[name]
        arguments += [] if name == "inspect" else ["-c", "demo"]
        with click.Context(command) as context:
            command.parse_args(context, arguments)


def test_prefixes_of_the_page_are_those_that_are_removed():
    row = next(line for line in PAGE.splitlines() if line.startswith("| prefix"))
    assert set(re.findall(r"`(\w+\.)`", row)) == set(PREFIXES)
