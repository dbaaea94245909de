"""`init` recognises data sets as they are laid out, and writes a configuration that lists the same tiles."""

import json

import numpy as np
import pytest
from helpers.commands import run_command
from PIL import Image

from kdpipe.configs.schema import Data
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.starter.affixes import affixes_of


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
    "Potsdam": (["2_Ortho_RGB/a_RGB.tif", "2_Ortho_RGB/b_RGB.tif"], ["5_Labels_all/a_label.tif", "5_Labels_all/b_label.tif"], {}),
    "GID": (["image_RGB/a-MSS1.tif", "image_RGB/b-MSS1.tif"], ["label_5classes/a-MSS1_label.tif", "label_5classes/b-MSS1_label.tif"], {}),
    "Vaihingen": (["top/area1.tif", "top/area3.tif"], ["gts_for_participants/area1.tif", "gts_for_participants/area3.tif"], {}),
    "VOC": (
        ["JPEGImages/a.png", "JPEGImages/b.png"],
        ["SegmentationClass/a.png", "SegmentationClass/b.png"],
        {"ImageSets/Segmentation/train.txt": "a\n", "ImageSets/Segmentation/val.txt": "b\n"},
    ),
    "LoveDA": (
        ["Train/images_png/1.png", "Val/images_png/2.png"], ["Train/masks_png/1.png", "Val/masks_png/2.png"], {}
    ),
    "images and labels": (["train/images/a.png", "val/images/b.png"], ["train/labels/a.png", "val/labels/b.png"], {}),
    "LoveDA as it is unpacked": (
        ["Train/Urban/images_png/1.png", "Val/Urban/images_png/2.png"],
        ["Train/Urban/masks_png/1.png", "Val/Urban/masks_png/2.png"], {},
    ),
    "ADE20K": (
        ["images/training/a.jpg", "images/validation/b.jpg"], ["annotations/training/a.png", "annotations/validation/b.png"], {}
    ),
    "Cityscapes": (
        ["leftImg8bit/train/ulm/u_1_leftImg8bit.png", "leftImg8bit/val/bonn/b_1_leftImg8bit.png"],
        ["gtFine/train/ulm/u_1_gtFine_labelIds.png", "gtFine/val/bonn/b_1_gtFine_labelIds.png"], {},
    ),
    "CamVid": (["train/a.png", "val/b.png"], ["trainannot/a.png", "valannot/b.png"], {}),
    "CamVid with suffixes": (["train/a.png", "val/b.png"], ["train_labels/a_L.png", "val_labels/b_L.png"], {}),
    "FloodNet": (
        ["train/train-org-img/a.jpg", "val/val-org-img/b.jpg"],
        ["train/train-label-img/a_lab.png", "val/val-label-img/b_lab.png"], {},
    ),
    "UAVid": (
        ["uavid_train/seq1/Images/0.png", "uavid_val/seq2/Images/0.png"],
        ["uavid_train/seq1/Labels/0.png", "uavid_val/seq2/Labels/0.png"], {},
    ),
    "DeepGlobe": (["train/1_sat.jpg", "val/2_sat.jpg"], ["train/1_mask.png", "val/2_mask.png"], {}),
    "OpenEarthMap": (
        ["aachen/images/aachen_1.tif", "accra/images/accra_1.tif"], ["aachen/labels/aachen_1.tif", "accra/labels/accra_1.tif"],
        {"train.txt": "aachen_1.tif\n", "val.txt": "accra_1.tif\n"},
    ),
    "lists beside kdpipe's own folders": (
        ["images/a.png", "images/b.png"], ["masks/a.png", "masks/b.png"], {"train.txt": "a\n", "val.txt": "b\n"}
    ),
    "Inria": (["train/images/a.tif", "val/images/b.tif"], ["train/gt/a.tif", "val/gt/b.tif"], {}),
    "nested": (["train/images/x/a.png", "val/images/x/b.png"], ["train/labels/x/a.png", "val/labels/x/b.png"], {}),
    "prefixes": (["images/img_001.png", "images/img_002.png"], ["masks/mask_001.png", "masks/mask_002.png"], {}),
    "prefixes in one folder": (["train/sat_1.png", "val/sat_2.png"], ["train/gt_1.png", "val/gt_2.png"], {}),
    "prefixes in folders of other names": (
        ["train/pictures/image1.png", "val/pictures/image12.png"], ["train/labels/label1.png", "val/labels/label12.png"], {},
    ),
    "suffixes in kdpipe's own folders": (
        ["Train/images/a_sat.png", "Val/images/b_sat.png"], ["Train/masks/a_mask.png", "Val/masks/b_mask.png"], {}
    ),
}  # fmt: skip


WITHOUT_VAL = {"prefixes", "nnU-Net", "Potsdam", "GID", "Vaihingen"}


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
    folder = tmp_path / "mine"
    found = {
        split: [
            tuple(path.relative_to(folder).as_posix() for path in (tile.image, tile.mask))
            for tile in list_tiles(data, split)
        ]
        for split in ("train", "val")
    }
    pairs = list(zip(images, masks, strict=True))
    assert found == ({"train": pairs, "val": []} if name in WITHOUT_VAL else {"train": pairs[:1], "val": pairs[1:]})


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
        (
            ["a_img", "b_img"],
            ["a_color", "a_instanceIds", "a_labelIds", "b_color", "b_instanceIds", "b_labelIds"],
            ("_img", "_labelIds"),
        ),
        (["1_sat", "10_sat"], ["1_mask", "10_mask"], ("_sat", "_mask")),
        (["1_sat", "2_sat"], ["1_seg", "2_seg"], ("_sat", "_seg")),
    ],
)
def test_suffixes_are_those_that_pair_the_names(images, masks, found):
    assert affixes_of(images, masks) == (("", found[0]), ("", found[1]))


@pytest.mark.parametrize(
    ("images", "masks", "found"),
    [
        (["img_001", "img_002"], ["mask_001", "mask_002"], ("img_", "mask_")),
        (["sat_1", "sat_11"], ["gt_1", "gt_11"], ("sat_", "gt_")),
        (["image7", "image17"], ["label7", "label17"], ("image", "label")),
        (["paris_1", "rome_1"], ["mask_paris_1", "mask_rome_1"], ("", "mask_")),
        (["x/img_1", "y/img_2"], ["x/mask_1", "y/mask_2"], ("img_", "mask_")),
        (["img_1", "img_2"], ["colour_1", "colour_2", "label_1", "label_2"], ("img_", "label_")),
        (["paris_1", "paris_2"], ["rome_1", "rome_2"], ("", "")),
        (["img_1", "img_2"], ["mask_3", "mask_4"], ("", "")),
    ],
)
def test_prefixes_are_those_that_pair_the_names_and_say_what_is_a_mask(images, masks, found):
    assert affixes_of(images, masks) == ((found[0], ""), (found[1], ""))


def test_init_writes_the_prefixes_by_which_it_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine", ["images/img_1.png", "images/img_2.png"], ["masks/mask_1.png", "masks/mask_2.png"])
    assert run_command("init", "mine", "--classes", "Ground,Forest,Water").returncode == 0
    data = data_of(tmp_path / "mine.yaml")
    assert (data.image_prefix, data.mask_prefix, data.image_suffix, data.mask_suffix) == ("img_", "mask_", "", "")


def test_what_a_layout_leaves_out_is_said(tmp_path, monkeypatch):
    """Cityscapes has masks for viewers beside the labels, nnU-Net may have a file for each band."""
    monkeypatch.chdir(tmp_path)
    kinds = ("labelIds", "color")
    write(
        tmp_path / "city",
        ["leftImg8bit/train/ulm/1_leftImg8bit.png"],
        [f"gtFine/train/ulm/1_gtFine_{kind}.png" for kind in kinds],
    )
    done = run_command("init", "city")
    assert "those that end in _gtFine_labelIds are taken; 1 other is left out, such as 1_gtFine_color" in " ".join(
        done.stdout.split()
    )
    write(
        tmp_path / "bands",
        [f"imagesTr/case_{i}_{band:04d}.png" for i in (1, 2) for band in (0, 1, 2)],
        [f"labelsTr/case_{i}.png" for i in (1, 2)],
    )
    done = run_command("init", "bands", "--overwrite")
    assert done.returncode == 1
    assert "To fix: each image lies in 3 files, _0000, _0001, _0002, one for each of its bands" in " ".join(
        done.stdout.split()
    )


def test_images_without_masks_are_kept_apart_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path / "mine", ["img_dir/train/a.png", "img_dir/test/b.png", "img_dir/more/c.png"], ["ann_dir/train/a.png"]
    )
    done = run_command("init", "mine", "--json", "found.json")
    roles = {root["path"]: root["role"] for root in json.loads((tmp_path / "found.json").read_text())["roots"]}
    assert done.returncode == 0
    assert roles == {"mine/*/train": "train", "mine/*/test": "not used", "mine/*/more": "unlabelled"}
