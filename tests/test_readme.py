"""The README says what the program does: its commands, options, keys and snippets exist."""

import re
from pathlib import Path

import click
import pytest

from kdpipe.configs import load_config
from kdpipe.pipeline.cli import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_every_kdpipe_command_parses():
    """Each `kdpipe …` line of the README's code blocks, without running it."""
    lines = re.findall(r"^\.venv/bin/kdpipe (.+)$", README, flags=re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        name, *arguments = line.split()
        command = cli.commands[name]
        with click.Context(command) as context:
            command.parse_args(context, arguments)


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)$|`make (\w+)`", README, flags=re.MULTILINE)
    targets = [first or second for first, second in targets]
    assert {"demo", "test", "bench"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_to_files(link):
    assert (ROOT / link).exists()


def test_stretches_of_the_readme_are_accepted():
    for stretch in ("{range: [0, 3000]}", "{percentiles: [2, 98]}"):
        assert stretch in README
        load_config("demo", ["data.bands=[4, 3, 2]", f"data.stretch={stretch}"])


def test_ci_runs_the_readmes_test_command():
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()


def test_the_snippet_of_the_readme_runs(make_config):
    import torch

    from kdpipe.cache import SoftTargetCache
    from kdpipe.pipeline.precompute import precompute

    config = make_config()
    precompute(config, torch.device("cpu"))
    snippet = re.search(r"```python\n(.+?)```", README, flags=re.DOTALL)[1]
    tile = SoftTargetCache.open(config.cache.path).tile_ids[0]
    snippet = snippet.replace("caches/mine.zarr", config.cache.path).replace("Train/t1_001", tile)
    exec(snippet.replace("(0, 128, 512, 512)", "(0, 8, 32, 32)"), {})
