"""Every kind of teacher on the small landscape, with its files and a complete cache: fixtures, for a conftest to import."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.configs import ENCODER, tiny_config, write_teacher
from helpers.foreign_networks import CLASSES, owners_logits, teacher_of
from helpers.stored_predictions import as_stored, logits_of, write_all
from PIL import Image

from kdpipe.pipeline.precompute.run import precompute

KINDS = ["smp", "model", "segformer", "mask2former", "onnx", "pt2", "predictions"]
NETWORKS = KINDS[:-1]
CPU = torch.device("cpu")
IDENTIFYING = {  # a file of each kind that determines its values
    "smp": f"{ENCODER}.pth",
    "model": "pooled.pth",
    "segformer": "segformer/preprocessor_config.json",
    "mask2former": "mask2former/preprocessor_config.json",
    "onnx": "teacher.onnx",
    "pt2": "teacher.pt2",
}


def images_of(landscape):
    return sorted(path for root in ("Train", "Val", "Unlabelled") for path in (landscape / root / "images").iterdir())


def section_of(kind, folder, landscape):
    """The section `teacher` of a kind, whose files are written into `folder`."""
    if kind == "smp":
        checkpoint = write_teacher(folder, ENCODER)
        return {"architecture": "unet", "encoder": ENCODER, "checkpoint": str(checkpoint), "classes": CLASSES}
    if kind == "predictions":
        saved = write_all(folder / "saved", images_of(landscape), "probabilities")
        return {"predictions": str(saved), "are": "probabilities", "classes": CLASSES}
    return teacher_of(kind, folder)


def scores_of_owner(teacher, image_HW3):
    """Logits `(8, H, W)` of one image by the owner's own means, which for a program's files are the files."""
    if "predictions" in teacher:
        return as_stored(logits_of(image_HW3), "logits")
    return owners_logits(teacher, image_HW3)


@pytest.fixture(scope="session")
def worlds(landscape, tmp_path_factory):
    """A function that gives the section `teacher` of a kind, the folder of its files, and a complete cache of 8 bits at T 2."""
    made = {}

    def world(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            teacher = section_of(kind, folder, landscape)
            if kind != "predictions":
                teacher["precision"] = "fp32"  # as in `tiny_config`; workers are processes of their own
            precompute(tiny_config(landscape, Path(ENCODER), folder, teacher=teacher), CPU)
            made[kind] = teacher, folder
        return made[kind]

    return world


@pytest.fixture
def config_of(worlds, kind, landscape, tmp_path, monkeypatch):
    """`tiny_config` with the kind's teacher, whose files and cache are copies, and the smallest student."""
    monkeypatch.chdir(tmp_path)
    teacher, folder = worlds(kind)
    shutil.copytree(folder, tmp_path / "teacher")
    here = json.loads(json.dumps(teacher).replace(str(folder), str(tmp_path / "teacher")))
    path = str(tmp_path / "teacher/cache.zarr")

    def config(**overrides):
        return tiny_config(landscape, Path(ENCODER), tmp_path, **({"teacher": here, "cache__path": path} | overrides))

    config.teacher, config.original = here, folder / "cache.zarr"
    return config


def pixels(path):
    return Image.open(path).convert("RGB")
