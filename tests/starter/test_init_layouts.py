"""`init` recognises data sets as they are laid out, and writes a configuration that lists the same tiles."""

import numpy as np
import pytest
from helpers.commands import run_command
from PIL import Image

from kdpipe.configs.schema import Data
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.starter.layouts import suffixes_of


def write(folder, images, masks, colours=False):
    rng = np.random.default_rng(0)
    for path in images:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 9, 3), dtype=np.uint8)).save(folder / path)
    for path in masks:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        indices = rng.integers(0, 3, (8, 9), dtype=np.uint8)
        table = np.uint8([[0, 0, 0], [0, 255, 0], [0, 0, 255]])
        Image.fromarray(table[indices] if colours else indices).save(folder / path)


LAYOUTS = {
    "mmsegmentation": (
        ["img_dir/train/a.png", "img_dir/val/b.png"], ["ann_dir/train/a.png", "ann_dir/val/b.png"], {}
    ),
    "mmsegmentation with suffixes": (
        ["img_dir/train/a_leftImg8bit.png", "img_dir/val/b_leftImg8bit.png"],
        ["ann_dir/train/a_gtFine_labelTrainIds.png", "ann_dir/val/b_gtFine_labelTrainIds.png"],
        {},
    ),
    "nnU-Net": (["imagesTr/a_0000.png", "imagesTr/b_0000.png"], ["labelsTr/a.png", "labelsTr/b.png"], {}),
    "VOC": (
        ["JPEGImages/a.png", "JPEGImages/b.png"],
        ["SegmentationClass/a.png", "SegmentationClass/b.png"],
        {"ImageSets/Segmentation/train.txt": "a\n", "ImageSets/Segmentation/val.txt": "b\n"},
    ),
    "LoveDA": (
        ["Train/images_png/1.png", "Val/images_png/2.png"], ["Train/masks_png/1.png", "Val/masks_png/2.png"], {}
    ),
    "images and labels": (["train/images/a.png", "val/images/b.png"], ["train/labels/a.png", "val/labels/b.png"], {}),
    "nested": (["train/images/x/a.png", "val/images/x/b.png"], ["train/labels/x/a.png", "val/labels/x/b.png"], {}),
    "suffixes in kdpipe's own folders": (
        ["Train/images/a_sat.png", "Val/images/b_sat.png"], ["Train/masks/a_mask.png", "Val/masks/b_mask.png"], {}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_is_recognised(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, masks, lists = LAYOUTS[name]
    write(tmp_path / "mine", images, masks)
    for path, text in lists.items():
        (tmp_path / "mine" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / path).write_text(text)
    done = run_command("init", "mine", "--classes", "Ground,Forest,Water")
    assert done.returncode == 0, done.stderr + done.stdout
    data = data_of(tmp_path / "mine.yaml")
    found = {
        split: [(tile.image.name, tile.mask.name) for tile in list_tiles(data, split)]
        for split in (("train", "val") if name != "nnU-Net" else ("train",))
    }
    pairs = [(image.rpartition("/")[2], mask.rpartition("/")[2]) for image, mask in zip(images, masks, strict=True)]
    assert found == ({"train": pairs} if name == "nnU-Net" else {"train": pairs[:1], "val": pairs[1:]})


def data_of(path):
    import yaml

    return Data.model_validate(yaml.safe_load(path.read_text())["data"])


TABLES = {
    "class_dict.csv": "name,r,g,b\nGround,0,0,0\nForest,0,255,0\nWater,0,0,255\n",
    "blanks.txt": "# palette\nGround 0 0 0\nForest 0 255 0\nWater 0 0 255\n",
    "palette.yaml": "{Ground: [0, 0, 0], Forest: [0, 255, 0], Water: [0, 0, 255]}",
}


@pytest.mark.parametrize("table", TABLES)
def test_colours_of_masks_come_from_a_table(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine/Train", ["images/a.png"], ["masks/a.png"], colours=True)
    (tmp_path / table).write_text(TABLES[table])
    done = run_command("init", "mine", "--colours", table)
    assert done.returncode == 0, done.stderr + done.stdout
    import yaml

    written = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert written["classes"]["names"] == ["Ground", "Forest", "Water"]
    assert written["data"]["colours"] == {"Ground": [0, 0, 0], "Forest": [0, 255, 0], "Water": [0, 0, 255]}


def test_a_row_without_a_label_is_no_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine/Train", ["images/a.png"], ["masks/a.png"], colours=True)
    (tmp_path / "t.csv").write_text("Unknown,0,0,0\nForest,0,255,0\nWater,0,0,255\n")
    assert run_command("init", "mine", "--colours", "t.csv").returncode == 0
    import yaml

    written = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert written["classes"]["names"] == ["Forest", "Water"]
    assert written["classes"]["ignore_index"] == 255
    assert written["data"]["colours"]["ignore"] == [0, 0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Forest,0,300,0\nWater,0,0,255\n", "row 1: expected a name and red, green and blue of 0..255"),
        ("Forest,0,255,0\nForest,0,0,255\n", "row 2: Forest has a colour already"),
        ("Forest,0,255,0\n", "names fewer than two classes"),
    ],
)
def test_a_wrong_table_is_named(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine/Train", ["images/a.png"], ["masks/a.png"], colours=True)
    (tmp_path / "t.csv").write_text(text)
    done = run_command("init", "mine", "--colours", "t.csv")
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())


def test_masks_of_colours_without_a_table_name_the_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine/Train", ["images/a.png"], ["masks/a.png"], colours=True)
    done = run_command("init", "mine")
    assert done.returncode == 1
    assert "kdpipe init --colours FILE" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("images", "masks", "found"),
    [
        (["a_sat", "b_sat"], ["a_mask", "b_mask"], ("_sat", "_mask")),
        (["a_0000", "b_0000"], ["a", "b"], ("_0000", "")),
        (["a", "b"], ["a", "b"], ("", "")),
        (["one", "two"], ["three", "four"], ("", "")),
        ([], ["a"], ("", "")),
    ],
)
def test_suffixes_are_those_that_pair_the_names(images, masks, found):
    assert suffixes_of(images, masks) == found
