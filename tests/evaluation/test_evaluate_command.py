"""`kdpipe evaluate`: what it prints and writes, its mistakes, and its page of the docs."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from helpers.commands import run_command
from helpers.scored_tiles import random_tile, stub, write_tile
from PIL import Image

from kdpipe.configs import dump_config
from kdpipe.pipeline.commands.main import cli
from kdpipe.pipeline.evaluation.evaluate import BOUNDARY_WIDTH_PX, evaluate, student_model
from kdpipe.pipeline.reports.plots import draw_confusion

CPU = torch.device("cpu")
DOCS = (Path(__file__).resolve().parents[2] / "docs" / "evaluate.md").read_text()
BEST = "model_weights/tests/tiny-none/best.ckpt"


def png_size(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.size


@pytest.mark.long
def test_the_picture_is_a_png_with_one_panel_a_root_and_one_of_all(make_config, tmp_path):
    config = make_config()
    for name in "AB":
        write_tile(tmp_path / name, "t", *random_tile(ord(name)))
    one = evaluate(stub(config), [str(tmp_path / "A")])
    two = evaluate(stub(config), [str(tmp_path / "A"), str(tmp_path / "B")])
    draw_confusion(one, tmp_path / "one.png")
    draw_confusion(two, tmp_path / "two.png")
    (width, height), (wide, high) = png_size(tmp_path / "one.png"), png_size(tmp_path / "two.png")
    assert wide > 1.6 * width
    assert high > 1.6 * height


@pytest.mark.long
def test_the_command_prints_and_writes_what_the_library_finds(trained, tmp_path):
    write_tile(tmp_path / "A", "t", *random_tile(1))
    roots = [*trained.data.val, str(tmp_path / "A")]
    options = ["--tta", "flips", "--boundary-width", "5", "--json", "e.json", "--png", "deep/e.png"]
    done = run_command("evaluate", f"{Path.cwd()}/{BEST}", *roots, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "e.json").read_text(), parse_constant=pytest.fail)  # no NaN
    expected = evaluate(student_model(Path.cwd() / BEST, CPU, tta="flips", window=None), roots, boundary_width_px=5)
    assert content == json.loads(json.dumps(expected.as_dict()))
    assert content["roots"][0]["boundary"]["width_px"] == 5
    assert sum(b["pixels"] for b in content["together"]["calibration"]["bins"]) == content["together"]["pixels"]
    assert "F1 5 px" in done.stdout
    assert f"all roots: {expected.together.tiles} tiles" in done.stdout
    assert png_size(tmp_path / "deep/e.png")
    (tmp_path / "c.yaml").write_text(dump_config(trained))
    done = run_command("evaluate", "--teacher", "-c", "c.yaml", cwd=tmp_path)
    assert (done.returncode, "the teacher of tiny" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'CHECKPOINT'"),
        (["-c", "demo"], "Missing argument 'CHECKPOINT'"),
        (["x.ckpt", "--teacher"], "--teacher needs -c CONFIG"),
        (["x.ckpt", "--set", "name=a"], "--set overrides a key of -c CONFIG"),
        (["x.ckpt"], "no checkpoint at "),
        (["x.ckpt", "--tta", "d8"], "'d8' is not one of"),
        (["x.ckpt", "--window", "3"], "3 is not in the range"),
        (["x.ckpt", "--boundary-width", "0"], "0 is not in the range"),
        (["--teacher", "-c", "demo"], "demo_output/teacher.pth"),
        (
            ["x.ckpt", "--json", "file/scores.json"],
            "--json: writing file/scores.json failed, as something else is there",
        ),
        (["x.ckpt", "--png", "locked.png"], "--png: writing locked.png failed, as there is no permission"),
    ],
)
def test_mistakes_end_with_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("locked.png").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or Path(path).name != "locked.png")
    done = run_command("evaluate", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_options_and_keys_of_the_docs_exist(make_config, tmp_path):
    documented = [cli.commands[name] for name in ("evaluate", "forecast", "compare")]
    options = {option for command in documented for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"`(--[a-z-]+)", DOCS)) <= options
    write_tile(tmp_path / "A", "t", *random_tile(1))
    content = evaluate(stub(make_config()), [str(tmp_path / "A")]).as_dict()
    table = re.findall(r"^\| `([a-z_0-9.]+)`", DOCS, flags=re.MULTILINE)
    assert len(table) >= 9
    for path in table:
        value = content["roots"][0]
        for key in path.split("."):
            assert key in value, path
            value = value[key]


def test_the_default_boundary_width_of_command_and_library_are_one():
    (option,) = (p for p in cli.commands["evaluate"].params if p.name == "boundary_width")
    assert option.default == BOUNDARY_WIDTH_PX
