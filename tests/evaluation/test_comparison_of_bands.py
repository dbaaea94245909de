"""Runs on images of four bands are compared, also where their students see other bands, each with its own."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.banded import CLASSES, NAMES, config_of, write_teacher, write_tiles
from helpers.commands import run_command
from helpers.files import read_raster
from PIL import Image

from kdpipe.pipeline.evaluation.evaluate import student_model
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.training.run import train, with_mode

CPU = torch.device("cpu")


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """The JSON and the page of a comparison: with a teacher that sees infrared, without one, and a student that sees it too."""
    monkeypatch.chdir(tmp_path)
    for name in ("Train", "Val"):
        write_tiles(tmp_path / name, count=2, seed=len(name))
    teacher = write_teacher(tmp_path / "teacher.pth", 4)
    data = {"bands": [1, 2, 3, 4], "band_names": NAMES}
    rgb = config_of(tmp_path, teacher, data, {}, {"bands": ["red", "green", "blue"]}, train__max_steps=1)
    precompute(rgb, CPU)
    train(rgb, CPU)
    train(with_mode(rgb, "none"), CPU)
    student = rgb.student.model_copy(update={"bands": ["nir", "red"]})
    train(with_mode(rgb.model_copy(update={"student": student, "name": "infrared"}), "none"), CPU)
    folders = [f"model_weights/tests/{name}" for name in ("banded", "banded-none", "infrared-none")]
    done = run_command("compare", *folders, "--baseline", "banded-none", "--json", "c.json", "--tiles", "1")
    assert done.returncode == 0, done.stderr
    return json.loads(Path("c.json").read_text()), Path("comparison/comparison.html").read_text(), folders


def test_arms_differ_in_their_bands_and_pictures_show_each_ones_own_prediction(compared, tmp_path):
    found, page, folders = compared
    assert {arm["label"]: arm["settings"] for arm in found["arms"]} == {
        "banded-none": {},
        "banded": {"distill.mode": "cached"},
        "infrared-none": {"student.bands": ["nir", "red"]},
    }
    image = read_raster(tmp_path / "Val/images/t0.tif")
    predicted = [student_model(f"{folder}/last.ckpt", CPU, tta=None, window=None) for folder in folders]
    counts = {
        tuple(np.bincount(model.predict(image.transpose(1, 2, 0)).argmax(axis=0).ravel(), minlength=3))
        for model in predicted
    }
    pictures = [
        np.array(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r"data:image/\w+;base64,([^\"]+)", page)
    ]
    shown = {
        tuple(sorted(np.unique(each.reshape(-1, each.shape[-1]), axis=0, return_counts=True)[1]))
        for each in pictures
        if each.ndim == 3
    }
    assert len(counts) >= 2, "the students predict alike, so that the pictures show nothing"
    for each in counts:
        assert tuple(sorted(count for count in each if count)) in shown, CLASSES
