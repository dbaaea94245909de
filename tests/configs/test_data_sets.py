"""The shipped configurations of public data sets and teachers, on made files in the published layout: from labels to a trained student."""

import json
import re
import subprocess

import numpy as np
import pytest
import torch
from helpers import data_sets
from helpers.commands import run_command
from helpers.configs import ENCODER
from helpers.foreign_networks import save_transformers
from PIL import Image

from kdpipe.configs import load_config
from kdpipe.configs.load import find_config
from kdpipe.data.rasters import read_image, read_mask
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.models.smp import create_smp_model

TINY = {"train.max_steps": 2, "train.epochs": 1, "train.batch_size": 2, "train.crop": 64, "train.crops_per_tile": 1,
        "train.workers": 0, "student.encoder": ENCODER, "student.encoder_weights": "null"}  # fmt: skip
FILES = {
    "loveda": data_sets.loveda,
    "potsdam": data_sets.potsdam,
    "mmseg": data_sets.potsdam_by_mmseg,
    "tiles": data_sets.own_tiles,
}
# By configuration: whose files it reads, what is added to a code of its masks to get the class, and the number of training tiles.
CASES = {
    "loveda/linknet_kd": ("loveda", -1, 6),
    "loveda/teacher": ("loveda", -1, 6),
    "potsdam/rgb_kd": ("potsdam", 0, 24),
    "potsdam/teacher": ("potsdam", 0, 24),
    "potsdam/mmseg_kd": ("mmseg", -1, 6),
    "potsdam/mmseg_teacher": ("mmseg", -1, 6),
    "teachers/openearthmap": ("tiles", 0, 3),
    "teachers/segformer_ade20k": ("tiles", 0, 3),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the files of all data sets, and what their masks hold."""
    folder = tmp_path_factory.mktemp("data_sets")
    return folder, {name: make(folder) for name, make in FILES.items()}


@pytest.fixture
def here(world, monkeypatch, tmp_path):
    """The files of all data sets in the working folder, where caches and runs are written too."""
    folder, held = world
    for entry in folder.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    if not (folder / "potsdam/train.txt").exists():
        subprocess.run(["sh", "-c", lists_of_the_header()], check=True)
    return held


def lists_of_the_header():
    """The commands in the header of `potsdam/teacher` that write its lists."""
    header = find_config("potsdam/teacher").read_text()
    return re.sub(r"^#", "", "\n".join(re.findall(r"^#   printf.*(?:\n#     .*)*", header, re.M)), flags=re.M)


@pytest.mark.parametrize("name", CASES)
def test_labels_are_those_of_the_published_codes(name, here):
    source, offset, count = CASES[name]
    config = load_config(name)
    tiles = list_tiles(config.data, "train")
    assert len(tiles) == count == len(here[source])
    assert {tile.mask for tile in tiles}.isdisjoint(tile.mask for tile in list_tiles(config.data, "val"))
    for tile in tiles:
        (codes,) = (held for end, held in here[source].items() if str(tile.mask).endswith(end))
        indices = codes.astype(int) + offset
        expected = np.where(indices < 0, 255, indices)
        found = read_mask(tile.mask, len(config.classes.names), config.classes.ignore_index, config.mask_codes)
        np.testing.assert_array_equal(found, expected)


def test_colours_of_potsdam_stand_for_the_classes_that_torchgeo_and_the_contest_name(here):
    config = load_config("potsdam/rgb_kd")
    named = {
        "ImperviousSurface": (255, 255, 255), "Building": (0, 0, 255), "LowVegetation": (0, 255, 255), "Tree": (0, 255, 0),
        "Car": (255, 255, 0), "Clutter": (255, 0, 0),
    }  # fmt: skip
    tile = list_tiles(config.data, "train")[0]
    colours = np.asarray(Image.open(tile.mask).convert("RGB"))
    found = read_mask(tile.mask, 6, 255, config.mask_codes)
    for index, name in enumerate(config.classes.names):
        np.testing.assert_array_equal(found == index, (colours == named[name]).all(axis=-1))


def test_potsdam_is_read_with_its_infrared(here):
    config = load_config("potsdam/rgb_kd")
    tile = list_tiles(config.data, "train")[0]
    with Image.open(tile.image) as image:
        assert image.mode == "RGBA"  # as which GDAL and Pillow take it
        expected = np.asarray(image)
    np.testing.assert_array_equal(read_image(tile.image, config.data.bands, None, config.data.alpha), expected)
    assert config.data.places(config.teacher.bands) == (0, 1, 2, 3)
    assert config.data.places(config.student.bands) == (0, 1, 2)


def write_teacher(config, path):
    """A tiny U-Net of random weights, with the channels and bands of the configured teacher."""
    torch.manual_seed(0)
    bands = len(config.data.places(config.teacher.bands))
    model = create_smp_model("unet", ENCODER, len(config.teacher.classes), key="teacher", in_channels=bands)
    torch.save(model.state_dict(), path)
    return path


def succeeds(*arguments):
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("teacher")])
def test_from_made_files_to_a_student(name, here, tmp_path):
    config = load_config(name)
    if config.teacher.kind == "smp":
        given = {"teacher.encoder": ENCODER, "teacher.checkpoint": write_teacher(config, tmp_path / "teacher.pth")}
    else:
        folder = save_transformers("segformer", tmp_path / "segformer", classes=150)
        named = json.loads((folder / "config.json").read_text())
        named["id2label"] = {str(i): label for i, label in enumerate(config.teacher.classes)}
        (folder / "config.json").write_text(json.dumps(named))
        given = {"teacher.pretrained": folder, "teacher.window": 64}
    options = [part for key, value in (TINY | given).items() for part in ("--set", f"{key}={value}")]
    limit = ["--limit", 3]
    succeeds("precompute-teacher", "-c", name, *options, *limit)
    assert "PASS" in succeeds("verify-cache", "-c", name, *options, *limit)
    succeeds("train-student", "-c", name, *options, *limit)
    succeeds("train-student", "-c", name, *options, *limit, "--kd", "none")
    runs = tmp_path / "model_weights" / config.group
    assert sorted(run.name for run in runs.iterdir() if (run / "last.ckpt").is_file()) == sorted(
        [f"{config.name}-limit-3", f"{config.name}-limit-3-none"]
    )


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("teacher")])
def test_a_teacher_is_trained_where_its_student_looks_for_it(name, here, tmp_path):
    options = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    succeeds("train-student", "-c", name, *options, "--kd", "none")
    student = {"loveda/teacher": "loveda/linknet_kd", "potsdam/teacher": "potsdam/rgb_kd"}.get(name, "potsdam/mmseg_kd")
    wanted = load_config(student).teacher
    assert (tmp_path / wanted.checkpoint).is_file()
    assert load_config(name).teacher == wanted
    own = load_config(name).student
    assert (own.architecture, own.encoder, own.normalize) == (wanted.architecture, wanted.encoder, wanted.normalize)
    options = [*options, "--set", f"teacher.encoder={ENCODER}"]
    succeeds("precompute-teacher", "-c", student, *options, "--limit", 2)


@pytest.mark.parametrize(
    ("name", "folders"),
    [("loveda/linknet_kd", ["LoveDA"]), ("potsdam/rgb_kd", ["potsdam"]), ("potsdam/mmseg_kd", ["data/potsdam"])],
)
def test_init_recognises_the_layout(name, folders, here, tmp_path):
    done = run_command("init", *folders, "--out", "mine.yaml")
    assert done.returncode in (0, 1), done.stderr
    text = (tmp_path / "mine.yaml").read_text()
    for key in ("images", "masks", "image_suffix", "mask_suffix"):
        wanted = getattr(load_config(name).data, key)
        if wanted and key.endswith("suffix"):
            assert f"{key}: {wanted}" in text
        elif wanted not in ("images", "masks", ""):
            assert wanted in text


def test_the_classes_of_ade20k_are_mapped_one_by_one():
    config = load_config("teachers/segformer_ade20k")
    assert len(config.teacher.classes) == 150 == len(config.class_map)
    # Places in the benchmark's own order (sceneparsing.csail.mit.edu), counted from 0.
    known = {
        0: "wall",
        4: "tree",
        6: "road",
        7: "bed ",
        9: "grass",
        21: "water",
        29: "field",
        46: "sand",
        128: "lake",
        149: "flag",
    }
    assert {place: config.teacher.classes[place] for place in known} == known
    assert config.class_map_matrix().sum(axis=1).tolist() == [1] * 150
    assert {name: next(iter(config.class_map[name])) for name in ("tree", "grass", "field", "building", "earth", "sea")} == {
        "tree": "Forest", "grass": "Grassland", "field": "Cropland", "building": "Settlement", "earth": "SemiNatural", "sea": "Background",
    }  # fmt: skip
