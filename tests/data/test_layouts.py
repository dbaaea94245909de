"""Folders and masks as people have them: suffixes, nested folders, split lists, masks of colours and of other codes."""

import numpy as np
import pytest
from helpers.files import write_image
from PIL import Image

from kdpipe.configs import schema
from kdpipe.configs.errors import ConfigError, DataError
from kdpipe.configs.schema.labels import MaskCodes, codes_of
from kdpipe.data.rasters import read_mask
from kdpipe.data.tiles import limited, list_tiles

NAMES = ["Background", "Forest", "Water"]


def write(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_image(folder / path, 4, 5, seed=1)


def listed(folder, of="train", **data):
    data = {"train": [str(folder)]} | data
    return {
        tile.id: (tile.image.relative_to(folder).as_posix(), tile.mask and tile.mask.relative_to(folder).as_posix())
        for tile in list_tiles(schema.Data(**data), of)
    }


class TestFolders:
    def test_suffixes_pair_image_and_mask_of_one_folder(self, tmp_path):
        """DeepGlobe has this layout."""
        write(tmp_path, "1_sat.png", "1_mask.png", "2_sat.png", "2_mask.png", "notes.png")
        found = listed(tmp_path, images=".", masks=".", image_suffix="_sat", mask_suffix="_mask")
        name = tmp_path.name
        assert found == {f"{name}/1": ("1_sat.png", "1_mask.png"), f"{name}/2": ("2_sat.png", "2_mask.png")}

    def test_a_star_stands_for_the_name_of_either_folder(self, tmp_path):
        """mmsegmentation and nnU-Net have this layout."""
        write(tmp_path, "img_dir/train/a.png", "ann_dir/train/a.png", "img_dir/val/b.png", "ann_dir/val/b.png")
        roots = {"train": [str(tmp_path / "*/train")], "val": [str(tmp_path / "*/val")]}
        data = {"images": "img_dir", "masks": "ann_dir"} | roots
        assert listed(tmp_path, **data) == {"train/a": ("img_dir/train/a.png", "ann_dir/train/a.png")}
        assert listed(tmp_path, "val", **data) == {"val/b": ("img_dir/val/b.png", "ann_dir/val/b.png")}
        write(tmp_path, "imagesTr/x_0000.png", "labelsTr/x.png")
        nnunet = {"train": [str(tmp_path / "*Tr")], "images": "images", "masks": "labels", "image_suffix": "_0000"}
        assert listed(tmp_path, **nnunet) == {"Tr/x": ("imagesTr/x_0000.png", "labelsTr/x.png")}

    def test_nested_folders_pair_by_their_names(self, tmp_path):
        """Cityscapes has this layout; two cities may have tiles of one name."""
        write(
            tmp_path,
            *(f"{kind}/{city}/1_{end}.png" for city in "ab" for kind, end in (("images", "i"), ("masks", "m"))),
        )
        found = listed(tmp_path, nested=True, image_suffix="_i", mask_suffix="_m")
        name = tmp_path.name
        assert found[f"{name}/a/1"] == ("images/a/1_i.png", "masks/a/1_m.png")
        assert found[f"{name}/b/1"] == ("images/b/1_i.png", "masks/b/1_m.png")
        with pytest.raises(DataError, match=r"set data.nested: true"):
            listed(tmp_path)

    def test_a_link_to_a_folder_is_not_followed(self, tmp_path):
        write(tmp_path, "images/a.png")
        (tmp_path / "images/loop").symlink_to(tmp_path / "images")
        assert list(listed(tmp_path, nested=True, allow_missing_masks=True)) == [f"{tmp_path.name}/a"]

    def test_a_tile_and_a_folder_of_one_name_are_told_apart(self, tmp_path):
        write(tmp_path, "images/a.png", "images/a/b.png")
        with pytest.raises(DataError, match="also the name of a folder"):
            listed(tmp_path, nested=True, allow_missing_masks=True)

    def test_lists_split_one_root(self, tmp_path):
        """VOC has this layout. Names are without ending, of files, or ids; empty lines do not count."""
        write(tmp_path, *(f"{kind}/{stem}.png" for stem in "abcd" for kind in ("images", "masks")))
        (tmp_path / "train.txt").write_text(f"a\nb.png\n\n{tmp_path.name}/c\n")
        (tmp_path / "val.txt").write_text("d\r\n")
        root = str(tmp_path)
        split = {"train": f"{root}/train.txt", "val": f"{root}/val.txt"}
        data = {"train": [root], "val": [root], "split": split}
        assert [tile.rpartition("/")[2] for tile in listed(tmp_path, **data)] == ["a", "b", "c"]
        assert [tile.rpartition("/")[2] for tile in listed(tmp_path, "val", **data)] == ["d"]
        (tmp_path / "val.txt").write_text("d\nnowhere\n")
        with pytest.raises(DataError, match=r"data.split.val: 1 of the 2 names in .* \(nowhere\)"):
            listed(tmp_path, "val", **data)
        with pytest.raises(DataError, match="data.train and data.val"):
            listed(tmp_path, train=[root], val=[root], split={"train": f"{root}/train.txt"})

    def test_a_list_may_hold_paths_comments_and_a_byte_order_mark(self, tmp_path):
        """OpenEarthMap lists files of regions, others paths; a name that two roots have takes both, a path one."""
        write(
            tmp_path,
            *(f"{root}/{kind}/{stem}.tif" for root in ("r", "s") for stem in "ab" for kind in ("images", "masks")),
        )
        roots = [str(tmp_path / "r"), str(tmp_path / "s")]

        def taken(text):
            (tmp_path / "train.txt").write_text(text, encoding="utf-8")
            return sorted(listed(tmp_path, train=roots, split={"train": str(tmp_path / "train.txt")}))

        assert taken("\ufeffa.tif\n") == ["r/a", "s/a"]
        assert taken("# of region r\r\nr/a.tif\r\nr/a.tif\r\n") == ["r/a"]
        assert taken("./r/images/a.tif\ns\\images\\b.tif\n") == ["r/a", "s/b"]
        assert taken(f"{tmp_path}/s/images/b.tif\nr/images/b\n") == ["r/b", "s/b"]
        with pytest.raises(
            DataError,
            match=r"the one name in .* is no tile of data.train \(r/a.tif s/a.tif\): expected one name a line",
        ):
            taken("r/a.tif s/a.tif\n")
        with pytest.raises(DataError, match=r"data.split.train: .*train.txt names no tile"):
            taken("# nothing\n\n")

    def test_a_wrong_suffix_names_a_file(self, tmp_path):
        write(tmp_path, "images/a_img.png")
        with pytest.raises(DataError, match=r"ends in _sat, data.image_suffix; there are such as a_img.png"):
            listed(tmp_path, image_suffix="_sat")

    @pytest.mark.parametrize("allowed", [False, True])
    def test_a_wrong_suffix_of_masks_is_no_lack_of_masks(self, tmp_path, allowed):
        write(tmp_path, "1_sat.png", "1_mask.png", "2_sat.png", "2_mask.png")
        data = {"images": ".", "masks": ".", "image_suffix": "_sat", "allow_missing_masks": allowed}
        with pytest.raises(
            DataError,
            match=r"no masks in .*: none has a stem that ends in _msk, data.mask_suffix; there are such as 1_mask.png, 1_sat",
        ):
            listed(tmp_path, **data, mask_suffix="_msk")

    def test_prefixes_pair_image_and_mask(self, tmp_path):
        """Tiles are called as before where prefix and suffix are left out: `1` of `sat_1_x`."""
        write(
            tmp_path, "images/sat_1_x.png", "images/sat_2_x.png", "images/notes.png", "masks/gt_1.png", "masks/gt_2.png"
        )
        found = listed(tmp_path, image_prefix="sat_", image_suffix="_x", mask_prefix="gt_")
        name = tmp_path.name
        assert found == {f"{name}/{i}": (f"images/sat_{i}_x.png", f"masks/gt_{i}.png") for i in (1, 2)}

    def test_a_prefix_tells_masks_from_images_of_one_folder(self, tmp_path):
        write(tmp_path, "1.png", "mask_1.png")
        assert listed(tmp_path, images=".", masks=".", mask_prefix="mask_") == {
            f"{tmp_path.name}/1": ("1.png", "mask_1.png")
        }

    def test_a_prefix_and_a_suffix_do_not_share_letters(self, tmp_path):
        write(tmp_path, "images/aba.png", "images/ab1ba.png")
        found = listed(tmp_path, image_prefix="ab", image_suffix="ba", allow_missing_masks=True)
        assert list(found) == [f"{tmp_path.name}/1"]

    def test_two_files_of_one_name_without_prefix_are_refused(self, tmp_path):
        write(tmp_path, "images/img_1.png", "images/img_1.tif", "images/1.png")
        with pytest.raises(DataError, match=r"two files with one stem in .*: img_1.png and img_1.tif"):
            listed(tmp_path, image_prefix="img_", allow_missing_masks=True)

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"image_prefix": "sat_"}, r"no images in .*: none has a stem that begins with sat_, data.image_prefix; there .* img_1.png"),
            (
                {"image_prefix": "img_", "image_suffix": "_x"},
                r"begins with img_ and ends in _x, data.image_prefix and data.image_suffix; there are such as img_1.png",
            ),
            (
                {"image_prefix": "img_", "mask_prefix": "gt_"},
                r"no masks in .*: none has a stem that begins with gt_, data.mask_prefix; there are such as mask_1.png",
            ),
        ],
    )  # fmt: skip
    def test_a_wrong_prefix_names_a_file(self, keys, message, tmp_path):
        write(tmp_path, "images/img_1.png", "masks/mask_1.png")
        with pytest.raises(DataError, match=message):
            listed(tmp_path, **keys)

    def test_one_folder_of_images_and_masks_needs_a_suffix_of_one_of_them(self, tmp_path):
        write(tmp_path, "a.png", "a_mask.png", "b.png", "b_mask.png")
        name = tmp_path.name
        pairs = {f"{name}/a": ("a.png", "a_mask.png"), f"{name}/b": ("b.png", "b_mask.png")}
        assert listed(tmp_path, images=".", masks=".", mask_suffix="_mask") == pairs
        turned = {tile: (mask, image) for tile, (image, mask) in pairs.items()}
        assert listed(tmp_path, images=".", masks=".", image_suffix="_mask") == turned
        with pytest.raises(ValueError, match="images and masks are both '.', and nothing tells their files apart"):
            listed(tmp_path, images=".", masks=".")

    def test_a_tile_in_the_lists_of_training_and_of_validation_is_refused(self, tmp_path):
        write(tmp_path, *(f"{kind}/{stem}.png" for stem in "abc" for kind in ("images", "masks")))
        (tmp_path / "train.txt").write_text("a\nb\n")
        (tmp_path / "val.txt").write_text("b\nc\n")
        split = {"train": str(tmp_path / "train.txt"), "val": str(tmp_path / "val.txt")}
        with pytest.raises(
            DataError, match=rf"name the tile {tmp_path.name}/b for training and for validation: scores on training"
        ):
            listed(tmp_path, "val", train=[str(tmp_path)], val=[str(tmp_path)], split=split)

    def test_a_list_that_is_no_text_is_named(self, tmp_path):
        write(tmp_path, "images/a.png", "masks/a.png")
        split = {"train": str(tmp_path / "train.txt")}
        with pytest.raises(
            DataError, match=r"data.split.train: cannot read .*train.txt: No such file or directory; expected a text"
        ):
            listed(tmp_path, split=split)
        (tmp_path / "train.txt").write_text("a\n", encoding="utf-16")
        with pytest.raises(
            DataError,
            match=r"train.txt: it is no text in UTF-8; expected a text file with a name of a tile on each line",
        ):
            listed(tmp_path, split=split)


class TestSome:
    """`data.limit` takes some of the tiles."""

    def test_some_are_spread_evenly_and_a_smaller_number_is_among_a_larger(self):
        items = list(range(1000))
        before: set[int] = set()
        for limit in range(1, 200):
            some = limited(items, limit)
            assert len(some) == limit
            assert some == sorted(some)
            assert before <= set(some)
            before = set(some)
        assert np.diff(limited(items, 128)).max() <= 2 * 1000 / 128
        assert limited(items, None) == limited(items, 5000) == items
        assert [limited(items[:5], limit) for limit in (1, 2, 3)] == [[0], [0, 4], [0, 2, 4]]

    def test_training_and_validation_are_limited_each_and_labels_do_not_change_the_choice(self, tmp_path):
        write(tmp_path, *(f"T/{kind}/{i}.png" for i in range(4) for kind in ("images", "masks")))
        write(
            tmp_path,
            *(f"U/images/{i}.png" for i in range(4)),
            *(f"V/images/{i}.png" for i in range(4)),
            "V/masks/3.png",
        )
        roots = {"train": [str(tmp_path / "T")], "unlabelled": [str(tmp_path / "U")], "val": [str(tmp_path / "V")]}
        data = schema.Data(**roots, allow_missing_masks=True, limit=2)
        assert [tile.id for tile in list_tiles(data, "train")] == ["T/0", "U/0"]
        assert [tile.id for tile in list_tiles(data, "train", labelled_only=True)] == ["T/0"]
        assert [tile.id for tile in list_tiles(data, "val")] == ["V/3"]


COLOURS = {
    "Forest": [0, 100, 0],
    "Water": [[0, 0, 255], [10, 20, 250]],
    "ignore": [0, 0, 0],
    "Background": [9, 9, 9],
}
CODES = codes_of(schema.Data(train=["x"], colours=COLOURS).colours, {}, NAMES, 255)
WANTED = np.array([[1, 2, 2], [255, 0, 1]])
PIXELS = np.uint8([[[0, 100, 0], [0, 0, 255], [10, 20, 250]], [[0, 0, 0], [9, 9, 9], [0, 100, 0]]])


class TestColours:
    def test_bands_of_colours_become_indices(self, tmp_path):
        Image.fromarray(PIXELS).save(tmp_path / "m.png")
        assert np.array_equal(read_mask(tmp_path / "m.png", 3, 255, CODES), WANTED)
        with_alpha = np.dstack([PIXELS, np.full((2, 3), 255, np.uint8)])
        Image.fromarray(with_alpha).save(tmp_path / "a.png")
        assert np.array_equal(read_mask(tmp_path / "a.png", 3, 255, CODES), WANTED)

    def test_a_palette_is_read_by_its_colours(self, tmp_path):
        """Its indices are whatever the program that wrote it chose."""
        palette = Image.fromarray(PIXELS).quantize(16)
        palette.save(tmp_path / "p.png")
        assert not np.array_equal(np.asarray(palette), WANTED)
        assert np.array_equal(read_mask(tmp_path / "p.png", 3, 255, CODES), WANTED)

    def test_other_colours_are_named_with_their_number(self, tmp_path):
        other = PIXELS.copy()
        other[0, :2] = [1, 2, 3]
        Image.fromarray(other).save(tmp_path / "m.png")
        with pytest.raises(
            DataError, match=r"1 colour that data.colours does not list, on 2 of its pixels: \[1, 2, 3\]"
        ):
            read_mask(tmp_path / "m.png", 3, 255, CODES)

    def test_masks_of_indices_are_refused(self, tmp_path):
        Image.fromarray(np.uint8([[0, 1]])).save(tmp_path / "m.png")
        with pytest.raises(DataError, match="holds no colours: 1 band of uint8"):
            read_mask(tmp_path / "m.png", 3, 255, CODES)


class TestOtherCodes:
    def test_values_stand_for_classes(self, tmp_path):
        """Those of ESA WorldCover, for instance; ignore_index stays what it is."""
        Image.fromarray(np.uint8([[10, 80, 95], [30, 255, 10]])).save(tmp_path / "m.png")
        codes = codes_of({}, {10: "Forest", 95: 1, 80: "Water", 30: "ignore"}, NAMES, 255)
        assert read_mask(tmp_path / "m.png", 3, 255, codes).tolist() == [[1, 2, 1], [255, 255, 1]]

    def test_a_value_that_is_not_listed_is_never_taken_for_an_index(self, tmp_path):
        Image.fromarray(np.uint8([[10, 1, 1]])).save(tmp_path / "m.png")
        with pytest.raises(DataError, match=r"1 value that data.remap does not list, on 2 of its pixels: 1\."):
            read_mask(tmp_path / "m.png", 3, 255, codes_of({}, {10: "Forest"}, NAMES, 255))

    def test_without_codes_masks_hold_indices(self, tmp_path):
        Image.fromarray(np.uint8([[0, 2, 255]])).save(tmp_path / "m.png")
        assert read_mask(tmp_path / "m.png", 3, 255, MaskCodes()).tolist() == [[0, 2, 255]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"colours": {"Tree": [1, 2, 3]}}, r"data.colours names 'Tree', which is neither one of classes.names"),
        ({"colours": {"Forest": [1, 2, 3], "Cropland": [1, 2, 3]}}, r"data.colours gives \[1, 2, 3\] to two classes"),
        ({"remap": {7: 6}}, "data.remap names 6"),
        ({"remap": {7: 5}, "colours": {"Forest": [1, 2, 3]}}, "leave one of them out"),
        ({"colours": {"Forest": [1, 2, 300]}}, "data.colours.Forest"),
    ],
)
def test_wrong_codes_are_refused(make_config, data, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**{f"data__{key}": value for key, value in data.items()})
