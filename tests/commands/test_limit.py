"""`--limit N`: every command that goes over tiles has it, in the same words, and what a trial writes is told from the whole."""

import json

import click
import pytest
from helpers.commands import arguments, run_command

from kdpipe.pipeline.commands.main import cli

WORDS = "For a trial: take at most N tiles, spread evenly over all."
OVER_TILES = {"init", "inspect", "suggest-map", "precompute-teacher", "verify-cache", "train-student", "evaluate", "forecast",
              "report", "export"}  # fmt: skip


def test_every_command_over_tiles_has_the_option_in_the_same_words():
    helps = {
        name: option.help
        for name, command in cli.commands.items()
        for option in command.params
        if isinstance(option, click.Option) and "--limit" in option.opts
    }
    assert helps.keys() >= OVER_TILES
    assert {helps[name] for name in OVER_TILES} == {WORDS}
    assert helps["predict"] == WORDS.replace("tiles", "scenes")


@pytest.fixture
def run(make_config, tmp_path):
    """Runs a command on a configuration of six training and two validation tiles, and reads its JSON."""
    config = make_config(data__unlabelled=[], train__max_steps=2)

    def ran(command, *options, code=0):
        done = run_command(*arguments(config, command, *options, "--json", "out.json", folder=tmp_path))
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads((tmp_path / "out.json").read_text()) if code in (0, 1) else None, done.stdout + done.stderr

    return ran


@pytest.mark.long
def test_a_trial_goes_from_end_to_end_and_says_so_everywhere(run, tmp_path):
    found, said = run("precompute-teacher", "--limit", 2, "--dry-run")
    assert (found["limit"], found["tiles"], found["configured"]) == (2, 2, 6)
    assert "2 tiles of 6 (--limit 2), 0 finished" in said

    found, said = run("precompute-teacher", "--limit", 2)
    assert (found["limit"], found["computed"], found["cached"], found["configured"]) == (2, 2, 2, 6)
    assert "it holds 2 of 6 tiles: verify and train with --limit 2" in said

    found, said = run("verify-cache", "--limit", 2)
    assert (found["limit"], found["tiles"], found["configured"], found["passes"]) == (2, 2, 6, True)
    assert "PASS (full): 2 tiles of 6 (--limit 2)" in said
    assert "The other tiles were not looked at" in said

    found, said = run("train-student", "--limit", 2)
    assert (found["limit"], found["name"]) == (2, "tiny-limit-2")
    assert "a trial on at most 2 tiles" in said
    folder = tmp_path / "model_weights/tests/tiny-limit-2"
    assert json.loads((folder / "run.json").read_text())["config"]["data"]["limit"] == 2

    done = run_command("evaluate", folder / "best.ckpt", "--limit", 1, "--json", "scores.json")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["limit"], scores["roots"][0]["tiles"], scores["roots"][0]["labelled"]) == (1, 1, 2)
    assert "1 tile of 2 (--limit 1)" in done.stdout

    done = run_command("report", folder, "--limit", 1, "--tiles", 2)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert "This is a trial on at most 2 tiles (data.limit)" in page
    assert "on 1 validation tile of 2 (--limit 1)" in page

    done = run_command("inspect", "cache.zarr", "--stats", "--limit", 1)
    assert "2 of 6 (a trial, --limit)" in done.stdout
    assert "statistics of 1 tile of 2 (--limit 1)" in done.stdout


@pytest.mark.long
def test_the_cache_of_a_trial_is_refused_for_more_tiles_and_completed(run):
    run("precompute-teacher", "--limit", 2)
    _, said = run("train-student", code=3)
    assert (
        "is the cache of a trial: it holds 2 of 6 tiles, as --limit asked; run `kdpipe precompute-teacher` without"
        in said
    )
    _, said = run("train-student", "--limit", 3, code=3)
    assert "1 missing tile: Train/" in said
    assert "run `kdpipe precompute-teacher` with --limit 3: it computes only these" in said
    found, said = run("verify-cache", "--level", "quick", code=1)
    assert found["findings"][0]["code"] == "incomplete"
    assert "a trial computed the cache: it holds 2 of 6 tiles" in said

    found, said = run("precompute-teacher")
    assert (found["kept"], found["computed"], found["limit"]) == (2, 4, None)
    assert "2 of 6 tiles are finished already and kept" in said
    run("verify-cache")
    _, said = run("precompute-teacher", "--limit", 1)
    assert "the 1 tile of this trial is in" in said


@pytest.mark.long
def test_predict_and_init_take_some_and_say_so(run, landscape, tmp_path):
    run("precompute-teacher", "--limit", 2)
    run("train-student", "--limit", 2)
    checkpoint = tmp_path / "model_weights/tests/tiny-limit-2/last.ckpt"
    scenes = landscape / "Train/images"
    done = run_command("predict", scenes, "--checkpoint", checkpoint, "--out", "maps", "--limit", 1, "--window", 128, "--overlap", 32,
                       "--json", "maps.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a trial: 1 scene of 6 (--limit 1)" in done.stdout
    found = json.loads((tmp_path / "maps.json").read_text())
    assert (found["limit"], found["scenes"], len(list((tmp_path / "maps").glob("*.tif")))) == (1, 6, 1)

    done = run_command("init", landscape, "--limit", 1, "--json", "first.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "first.json").read_text())
    assert found["limit"] == 1
    assert {root["headers_read"] for root in found["roots"]} == {1}
    assert "Only a sample was read, evenly spread: 1 header, 1 image and 1 mask of" in done.stdout
