"""`inspect` and `init` on whole networks of other libraries: what their files say is shown, and becomes a configuration that loads."""

import json

import pytest
import torch
import yaml
from helpers.commands import run_command
from helpers.foreign_networks import export, save_transformers
from torch import nn

from kdpipe.configs.schema.teacher import Teacher
from kdpipe.pipeline.teacher.loading import load_teacher


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def network():
    return nn.Conv2d(3, 8, 1).eval()


def test_a_folder_of_transformers_is_described_and_offered_as_a_teacher(here):
    save_transformers("segformer", here / "seg")
    found = run_command("inspect", "seg", "--json", "seg.json")
    assert found.returncode == 0, found.stderr
    content = json.loads((here / "seg.json").read_text())
    assert content["classes"] == [f"c{i}" for i in range(8)]
    assert content["preprocessing"]["size"] == {"height": 64, "width": 64}
    assert content["preprocessing"]["image_mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert "SegformerForSemanticSegmentation" in found.stdout
    offered = yaml.safe_load(found.stdout[found.stdout.index("    teacher:") :])["teacher"]
    load_teacher(Teacher(**offered))


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "size", "window"), [("any.onnx", None, None), ("fixed.onnx", 64, 64), ("fixed.pt2", 64, 64)]
)
def test_init_writes_what_an_exported_file_says(here, network, landscape, name, size, window):
    export(network, here / name, size)
    classes = "Tree,Rangeland,Cropland,Developed,Road,Bareland,Water,Background"
    done = run_command(
        "init", landscape / "Train", "--teacher", name, "--teacher-classes", classes, "--teacher-normalize", "unit"
    )
    assert done.returncode == 0, done.stderr
    written = yaml.safe_load((here / "mine.yaml").read_text())["teacher"]
    assert (written["file"], written.get("window")) == (name, window)
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(load_teacher(Teacher(**written))(images), network(images), rtol=0, atol=1e-5)


def test_a_wrong_number_of_classes_is_told_from_the_file(here, network, landscape):
    export(network, here / "teacher.onnx")
    done = run_command("init", landscape / "Train", "--teacher", "teacher.onnx", "--teacher-classes", "Tree,Road")
    assert done.returncode == 2
    assert "names 2 classes, but teacher.onnx has 8 channels" in " ".join(done.stderr.split())


def test_a_folder_that_is_neither_cache_nor_network_says_so(here):
    (here / "empty").mkdir()
    assert run_command("inspect", "empty").returncode == 3
    (here / "empty/config.json").write_text("{}")
    done = run_command("inspect", "empty")
    assert done.returncode == 2
    assert "is not a configuration of transformers" in " ".join(done.stderr.split())
