"""docs/report.md: its commands run, its names and numbers are the program's."""

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kdpipe.configs import dump_config
from kdpipe.pipeline.commands.main import cli
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.reports.html import layers as tile_pictures
from kdpipe.pipeline.reports.html import run_content as run_report
from kdpipe.pipeline.reports.html import tiles as tile_browser
from kdpipe.pipeline.training.run import train, with_mode

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "report.md").read_text()
COMMANDS = re.findall(r"^kdpipe (.+)$", PAGE, flags=re.MULTILINE)
CPU = torch.device("cpu")


def test_commands_of_the_page_run_and_write_what_it_says(make_config, tmp_path):
    """On the small landscape, under the names that the page uses."""
    config = make_config(name="dubai-linknet-kd", group="dubai", train__epochs=1)
    precompute(config, CPU)
    train(config, CPU)
    train(with_mode(config, "none"), CPU)
    (tmp_path / "linknet.yaml").write_text(dump_config(config))
    for line in COMMANDS:
        arguments = line.replace("dubai/linknet_kd", "linknet.yaml").split()
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        # A teacher with random weights may find that the labels fit another map: a finding, and the page is written all the same.
        assert done.exit_code in ((0, 1) if "parity" in line else (0,)), (line, done.output)
    for written in (
        "report.html",
        "both.html",
        "report.json",
        "cache.html",
        "parity.html",
        "comparison/comparison.html",
    ):
        assert (tmp_path / written).stat().st_size > 10_000 or written.endswith("json"), written
    assert "|Δp|" in (tmp_path / "parity.html").read_text()
    assert {line.split()[0] for line in COMMANDS} == {"report", "verify-cache", "compare"}


def test_layers_keys_and_numbers_of_the_page_are_the_programs():
    for layer in tile_pictures.LAYERS:
        assert f"`{layer}`" in PAGE
    assert f"`--tiles N` ({run_report.SHOWN_TILES})" in PAGE
    assert f"at most {tile_pictures.SHOWN_PX} px a side" in PAGE
    for key in ("←", "→", "N", "P", "Esc", "Shift"):
        assert f"`{key}`" in PAGE
        assert f"<kbd>{key}</kbd>" in tile_browser.VIEWER


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", PAGE))
def test_links_lead_to_files(link):
    assert (Path(__file__).resolve().parents[2] / "docs" / link).exists()
