"""Listing and pairing tiles, their ids, and the stretch computed over them."""

import unicodedata

import numpy as np
import pytest
from helpers.files import write_tiff
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.configs import schema
from kdpipe.configs.errors import DataError
from kdpipe.data.stretch import resolve_stretch, sample_grid
from kdpipe.data.survey import find_roots
from kdpipe.data.tiles import Tile, list_tiles


def make_root(root, images=("a.png",), masks=("a.png",)):
    for folder, names in (("images", images), ("masks", masks)):
        if names is not None:
            (root / folder).mkdir(parents=True)
            for name in names:
                (root / folder / name).touch()
    return str(root)


def ids(tiles):
    return [tile.id for tile in tiles]


def test_pairs_by_stem_whatever_the_extension_in_sorted_order(tmp_path):
    root = make_root(
        tmp_path / "Train",
        ["b.JPG", "a.png", "c.x.tif", "d.JPEG", "e.tiff", ".hidden.png", "readme.txt", "a.aux.xml", "noext"],
        ["a.tif", "b.png", "c.x.png", "d.png", "e.png", "Thumbs.db", ".a.png"],
    )
    (tmp_path / "Train/images/folder.png").mkdir()
    folder = tmp_path / "Train"
    assert list_tiles(schema.Data(train=[root]), "train") == [
        Tile("Train/a", folder / "images/a.png", folder / "masks/a.tif"),
        Tile("Train/b", folder / "images/b.JPG", folder / "masks/b.png"),
        Tile("Train/c.x", folder / "images/c.x.tif", folder / "masks/c.x.png"),
        Tile("Train/d", folder / "images/d.JPEG", folder / "masks/d.png"),
        Tile("Train/e", folder / "images/e.tiff", folder / "masks/e.png"),
    ]


def test_splits_take_their_roots_in_the_order_of_the_config(tmp_path):
    for name in ("z", "a", "v"):
        make_root(tmp_path / name)
    make_root(tmp_path / "u", ["q.png", "p.png"], ["q.png"])  # its masks are ignored
    data = schema.Data(
        train=[str(tmp_path / "z"), str(tmp_path / "a")], val=[str(tmp_path / "v")], unlabelled=[str(tmp_path / "u")]
    )
    assert ids(list_tiles(data, "train")) == ["z/a", "a/a", "u/p", "u/q"]
    assert [tile.mask for tile in list_tiles(data, "train")[2:]] == [None, None]
    assert ids(list_tiles(data, "train", labelled_only=True)) == ["z/a", "a/a"]
    assert ids(list_tiles(data, "val")) == ["v/a"]
    assert list_tiles(schema.Data(train=data.train), "val") == []


def test_configured_folder_names(tmp_path):
    (tmp_path / "T/rgb/2024").mkdir(parents=True)
    (tmp_path / "T/labels").mkdir()
    (tmp_path / "T/rgb/2024/a.png").touch()
    (tmp_path / "T/labels/a.png").touch()
    data = schema.Data(train=[str(tmp_path / "T")], images="rgb/2024", masks="labels")
    assert ids(list_tiles(data, "train")) == ["T/a"]


def test_ids_take_as_much_of_the_path_as_distinguishes_roots(tmp_path):
    paths = {
        "train": ["europe/north/Train", "asia/north/Train", "europe/south/Train"],
        "val": ["europe/north/Val"],
        "unlabelled": ["more/south/Train"],
    }
    data = schema.Data(**{key: [make_root(tmp_path / p) for p in roots] for key, roots in paths.items()})
    assert ids(list_tiles(data, "train")) == [
        "europe/north/Train/a",
        "asia/north/Train/a",
        "europe/south/Train/a",
        "more/south/Train/a",
    ]
    assert ids(list_tiles(data, "val")) == ["Val/a"]


def test_relative_roots_are_named_by_their_absolute_path(tmp_path, monkeypatch):
    make_root(tmp_path / "Train")
    monkeypatch.chdir(tmp_path / "Train")
    (tile,) = list_tiles(schema.Data(train=["."]), "train")
    assert tile.id == "Train/a"
    assert tile.image.is_absolute()


def test_tile_whose_id_is_a_root_s_is_refused(tmp_path):
    data = schema.Data(
        train=[
            make_root(tmp_path / "A/Train", ["x.png"], ["x.png"]),
            make_root(tmp_path / "Train/x"),
            make_root(tmp_path / "q/x"),
        ]
    )
    with pytest.raises(DataError, match=r"would have the id Train/x, which is also the name of a root"):
        list_tiles(data, "train")


def test_missing_masks_are_named_unless_allowed(tmp_path):
    root = make_root(tmp_path / "T", ["a.png", "b.png"], ["a.png"])
    with pytest.raises(DataError, match=r"the image b\.png in /.*T/images without a mask .*allow_missing_masks: true"):
        list_tiles(schema.Data(train=[root]), "train")
    data = schema.Data(train=[root], allow_missing_masks=True)
    assert [tile.mask is None for tile in list_tiles(data, "train")] == [False, True]
    assert ids(list_tiles(data, "train", labelled_only=True)) == ["T/a"]


def test_many_missing_masks_are_counted(tmp_path):
    root = make_root(tmp_path / "T", [f"{i}.png" for i in range(9)], [])
    with pytest.raises(DataError, match=r"9 images \(0\.png, 1\.png, 2\.png, …\) in"):
        list_tiles(schema.Data(train=[root]), "train")


def test_mask_without_image_is_refused_always(tmp_path):
    root = make_root(tmp_path / "T", ["a.png"], ["a.png", "x.png", "y.png"])
    for allowed in (False, True):
        with pytest.raises(DataError, match=r"2 masks \(x\.png, y\.png\) in /.*T/masks without an image"):
            list_tiles(schema.Data(train=[root], allow_missing_masks=allowed), "train")


def test_missing_folders_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"there is no folder {tmp_path}/gone, which"):
        list_tiles(schema.Data(train=["gone"]), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"there is no folder /.*/empty/images: a root holds its images"):
        list_tiles(schema.Data(train=["empty"]), "train")
    make_root(tmp_path / "bare", ["a.png"], None)
    with pytest.raises(DataError, match=r"there is no folder /.*/bare/masks.*data\.unlabelled"):
        list_tiles(schema.Data(train=["bare"]), "train")
    assert ids(list_tiles(schema.Data(train=["bare"], allow_missing_masks=True), "train")) == ["bare/a"]
    make_root(tmp_path / "none", ["a.txt"], [])
    with pytest.raises(DataError, match=r"no images in /.*/none/images: expected files that end in \.png"):
        list_tiles(schema.Data(train=["none"]), "train")


def test_names_are_paired_whatever_their_unicode_form(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Süd-é") for form in ("NFC", "NFD"))
    assert composed != decomposed
    for i, (image, mask) in enumerate([(composed, decomposed), (decomposed, composed), (decomposed, decomposed)]):
        root = make_root(tmp_path / str(i), [f"{image}.png"], [f"{mask}.png"])
        (tile,) = list_tiles(schema.Data(train=[root]), "train")
        assert (tile.id, tile.image.name, tile.mask.name) == (f"{i}/{composed}", f"{image}.png", f"{mask}.png")
        assert tile.image.exists()
        assert tile.mask.exists()
    root = make_root(tmp_path / "both", [f"{composed}.png", f"{decomposed}.png"], [f"{composed}.png"])
    with pytest.raises(DataError, match="whose names differ by their Unicode form alone; a stem must name one tile"):
        list_tiles(schema.Data(train=[root]), "train")


def test_a_folder_without_images_is_named_for_what_it_is(tmp_path):
    make_root(tmp_path / "T", [], [])
    with pytest.raises(
        DataError, match=r"no images in /.*/T/images: the folder is empty; expected files that end in \.png"
    ):
        list_tiles(schema.Data(train=[str(tmp_path / "T")]), "train")
    (tmp_path / "T/images/2021").mkdir()
    (tmp_path / "T/images/2021/a.tif").touch()
    (tmp_path / "T/images/notes").mkdir()
    message = r"the images are one folder deeper, in 2021; .* make each a root with images/ of its own"
    with pytest.raises(DataError, match=message):
        list_tiles(schema.Data(train=[str(tmp_path / "T")]), "train")
    (tmp_path / "more").mkdir()
    make_root(tmp_path / "more/Train")
    (tmp_path / "T").rename(tmp_path / "more/Val")
    with pytest.raises(DataError, match=message + r".* To leave a folder out, name the others"):
        find_roots(str(tmp_path / "more"))
    (tmp_path / "more/Val/images/2021/a.tif").unlink()
    assert find_roots(str(tmp_path / "more")) == [str(tmp_path / "more/Train")]


def test_two_files_with_one_stem_are_refused(tmp_path):
    for i, (images, masks, named) in enumerate(
        [(["a.png", "a.jpg"], ["a.png"], r"a\.jpg and a\.png"), (["a.png"], ["a.tif", "a.png"], r"a\.png and a\.tif")]
    ):
        root = make_root(tmp_path / str(i), images, masks)
        with pytest.raises(DataError, match=rf"two files with one stem in /.*: {named}; a stem must name one tile"):
            list_tiles(schema.Data(train=[root]), "train")


def test_one_folder_in_train_and_val_is_a_leak(tmp_path):
    root = make_root(tmp_path / "T")
    (tmp_path / "link").symlink_to(tmp_path / "T")
    for key in ("val", "unlabelled"):
        for other in (root, f"{tmp_path}/x/../T", str(tmp_path / "link")):
            data = schema.Data(train=[root], **{key: [other]})
            for split in ("train", "val"):
                with pytest.raises(DataError, match=rf"T is in data\.train and data\.{key}.*list it once"):
                    list_tiles(data, split)
    with pytest.raises(DataError, match="scores on training tiles mean nothing"):
        list_tiles(schema.Data(train=[root], val=[root]), "train")
    with pytest.raises(DataError, match=r"is in data\.train, twice: list it once"):
        list_tiles(schema.Data(train=[root, root + "/"]), "train")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a\nb.png", "control"),
        ("a\\b.png", "backslash"),
        ("a\x7f.png", "control"),
        ("__a.png", "reserves"),
        ("zarr.json.png", "metadata"),
    ],
)
def test_names_that_the_cache_cannot_store_are_refused(tmp_path, name, why):
    with pytest.raises(DataError, match=rf"(?s)the name .* of .*{why}.*rename it"):
        list_tiles(schema.Data(train=[make_root(tmp_path / "T", [name], [name])]), "train")


def test_root_names_that_the_cache_cannot_store_are_refused(tmp_path):
    with pytest.raises(DataError, match="__T"):
        list_tiles(schema.Data(train=[make_root(tmp_path / "__T")]), "train")


def test_a_dead_link_is_a_tile_that_fails_when_read(tmp_path):
    root = make_root(tmp_path / "T")
    (tmp_path / "T/images/b.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "T/masks/b.png").touch()
    assert ids(list_tiles(schema.Data(train=[root]), "train")) == ["T/a", "T/b"]


def deep_tiles(tmp_path, arrays, **profile):
    paths = [write_tiff(tmp_path / f"{i}.tif", array, **profile) for i, array in enumerate(arrays)]
    return [Tile(f"T/{path.stem}", path, None) for path in paths]


def test_no_stretch_and_fixed_ranges_read_nothing():
    assert resolve_stretch(schema.Data(train=["x"]), []) is None
    one = schema.Data(train=["x"], stretch={"range": [0, 10]})
    assert resolve_stretch(one, []) == [(0, 10)] * 3
    three = schema.Data(train=["x"], stretch={"range": [[0, 10], [1, 2], [3, 4]]})
    assert resolve_stretch(three, []) == [(0, 10), (1, 2), (3, 4)]


def test_percentiles_are_those_of_all_pixels_together(tmp_path):
    rng = np.random.default_rng(1)
    arrays = [rng.integers(0, 5000, (4, 20, 31), dtype=np.uint16), rng.integers(3000, 9000, (4, 7, 5), dtype=np.uint16)]
    data = schema.Data(train=["x"], bands=(4, 2, 1), stretch={"percentiles": [2, 98]})
    expected = [
        tuple(np.percentile(np.concatenate([array[band - 1].ravel() for array in arrays]), [2, 98]))
        for band in (4, 2, 1)
    ]
    np.testing.assert_allclose(resolve_stretch(data, deep_tiles(tmp_path, arrays)), expected, rtol=1e-12)


def test_percentiles_leave_out_nodata_and_non_finite_values(tmp_path):
    values = np.random.default_rng(1).random((3, 30, 30), dtype=np.float32)
    spoilt = values.copy()
    spoilt[:, :5] = -9999
    spoilt[:, 5:7] = np.nan
    spoilt[:, 7] = np.inf
    data = schema.Data(train=["x"], stretch={"percentiles": [0, 100]})
    expected = [(float(band.min()), float(band.max())) for band in values[:, 8:]]
    assert resolve_stretch(data, deep_tiles(tmp_path, [spoilt], nodata=-9999)) == expected


def test_percentiles_of_a_large_set_are_close_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("kdpipe.data.stretch.SAMPLE_VALUES", 5000)
    ramp = np.add.outer(np.arange(200), 5 * np.arange(256)).astype(np.uint16)
    data = schema.Data(train=["x"], stretch={"percentiles": [2, 98]})
    tiles = deep_tiles(tmp_path, [np.stack([ramp] * 3)] * 2)
    found = resolve_stretch(data, tiles)
    assert found == resolve_stretch(data, tiles)
    np.testing.assert_allclose(found, [np.percentile(ramp, [2, 98])] * 3, atol=0.01 * ramp.max())


def test_constant_or_empty_band_cannot_be_stretched(tmp_path):
    data = schema.Data(train=["x"], stretch={"percentiles": [2, 98]})
    values = np.random.default_rng(1).random((3, 30, 30), dtype=np.float32)
    values[1] = 4
    with pytest.raises(DataError, match=r"band 2 is 4 from percentile 2 to 98 of the 1 image, such as .*0\.tif"):
        resolve_stretch(data, deep_tiles(tmp_path, [values]))
    values[1] = -9999
    with pytest.raises(DataError, match=r"band 2 holds only nodata in all 1 image"):
        resolve_stretch(data, deep_tiles(tmp_path, [values], nodata=-9999))


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 10000))
def test_sample_grid_is_bounded_and_lies_in_the_tile(height, width, at_most):
    rows, columns = sample_grid(height, width, at_most)
    assert 1 <= len(rows) * len(columns) <= max(at_most, 1)
    for indices, length in ((rows, height), (columns, width)):
        assert indices[0] >= 0
        assert indices[-1] < length
        assert len(np.unique(indices)) == len(indices)
    if height * width <= at_most:
        assert len(rows) * len(columns) == height * width
