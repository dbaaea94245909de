"""The generated landscape is reproducible, has every class, labels with bounded errors, and overwrites no foreign file."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdpipe.configs.errors import ConfigError, DataError
from kdpipe.data.landscape.brushes import shifted
from kdpipe.data.landscape.labels import (
    IGNORE_INDEX,
    STUDENT_CLASSES,
    TEACHER_CLASSES,
    Landscape,
    generate_landscape,
    to_student_classes,
    write_sample_data,
)

SMALL = {"train": 2, "val": 1, "unlabelled": 1, "teacher": 2, "side": (70, 100)}
NUM_SMALL_FILES = 2 * 2 + 2 * 1 + 1 + 2 * 2

# The class map of the guide, written out a second time by hand: teacher class -> student classes that may carry its label.
CLASS_MAP = {
    "Tree": {"Forest"},
    "Rangeland": {"Grassland", "SemiNatural"},
    "Cropland": {"Cropland"},
    "Developed": {"Settlement"},
    "Road": {"Settlement"},
    "Bareland": {"SemiNatural"},
    "Water": {"Background"},
    "Background": {"Background"},
}


@pytest.fixture(scope="module")
def lands() -> list[Landscape]:
    return [generate_landscape(203, 251, np.random.default_rng([7, tile])) for tile in range(12)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The tiles


def test_same_generator_state_gives_the_same_tile():
    first, again, other = (generate_landscape(90, 121, np.random.default_rng(seed)) for seed in (3, 3, 4))
    for field in ("image", "teacher_mask", "student_mask", "truth", "shrubs"):
        np.testing.assert_array_equal(getattr(first, field), getattr(again, field))
    assert (first.truth != other.truth).any()
    assert (first.image != other.image).any()


def test_a_tile_has_the_requested_size_and_types(lands):
    for land in lands:
        assert land.image.shape == (203, 251, 3)
        assert land.image.dtype == np.uint8
        for mask in (land.teacher_mask, land.student_mask, land.truth):
            assert mask.shape == (203, 251)
            assert mask.dtype == np.uint8
        assert land.shrubs.dtype == np.bool_


def test_masks_hold_class_indices_and_only_student_masks_leave_pixels_unlabelled(lands):
    for land in lands:
        assert land.teacher_mask.max() < len(TEACHER_CLASSES)
        assert set(np.unique(land.student_mask)) <= {*range(len(STUDENT_CLASSES)), IGNORE_INDEX}
    unlabelled = np.mean([land.student_mask == IGNORE_INDEX for land in lands])
    assert 0.005 < unlabelled < 0.08


def test_every_class_is_common_enough_to_learn(lands):
    teacher = np.bincount(np.concatenate([land.teacher_mask.ravel() for land in lands]), minlength=8)
    student = np.concatenate([land.student_mask.ravel() for land in lands])
    student = np.bincount(student[student != IGNORE_INDEX], minlength=6)
    assert (teacher / teacher.sum() > 0.015).all(), dict(zip(TEACHER_CLASSES, teacher / teacher.sum(), strict=True))
    assert (student / student.sum() > 0.04).all(), dict(zip(STUDENT_CLASSES, student / student.sum(), strict=True))
    for label, name in enumerate(TEACHER_CLASSES[:6]):
        assert sum((land.teacher_mask == label).any() for land in lands) >= 10, name
    for label, name in enumerate(TEACHER_CLASSES[6:], start=6):
        assert sum((land.teacher_mask == label).any() for land in lands) >= 5, name


def test_student_labels_follow_the_class_map_of_the_guide(lands):
    for land in lands:
        labelled = land.student_mask != IGNORE_INDEX
        for label, name in enumerate(TEACHER_CLASSES):
            found = np.unique(land.student_mask[labelled & (land.teacher_mask == label)])
            assert {STUDENT_CLASSES[i] for i in found} <= CLASS_MAP[name], name
        np.testing.assert_array_equal(
            land.student_mask[labelled], to_student_classes(land.teacher_mask, land.shrubs)[labelled]
        )


def test_three_tenths_of_rangeland_are_semi_natural_and_in_patches(lands):
    for land in lands:
        rangeland = land.truth == TEACHER_CLASSES.index("Rangeland")
        assert land.shrubs[rangeland].mean() == pytest.approx(0.3, abs=0.01)  # a quantile; ties only
        # In salt and pepper, neighbours differ at 2 * 0.3 * 0.7 = 42 % of the pairs.
        pairs = rangeland[:, 1:] & rangeland[:, :-1]
        assert (land.shrubs[:, 1:] != land.shrubs[:, :-1])[pairs].mean() < 0.1


def test_labels_have_errors_but_not_too_many(lands):
    agreement = [(land.truth == land.teacher_mask).mean() for land in lands]
    assert min(agreement) > 0.82
    assert max(agreement) < 0.96
    # Not only at outlines: deep inside a region, five pixels from any other class, some labels are wrong too.
    wrong, deep = 0, 0
    for land in lands:
        inside = np.ones_like(land.shrubs)
        for dx, dy in ((5, 0), (-5, 0), (0, 5), (0, -5), (3, 3), (-3, 3), (3, -3), (-3, -3)):
            inside &= shifted(land.truth.astype(np.float32), dx, dy) == land.truth
        wrong, deep = wrong + (land.truth != land.teacher_mask)[inside].sum(), deep + inside.sum()
    assert 0.005 < wrong / deep < 0.06


def test_colour_alone_does_not_separate_the_classes(lands):
    """Nearest class mean in (R, G, B, local contrast), fitted on one half of the tiles and scored on the other."""

    def features(land: Landscape) -> np.ndarray:
        image = land.image.astype(np.float32)
        steps = np.abs(image - np.roll(image, 2, axis=1)).mean(axis=-1, keepdims=True)
        return np.concatenate([image, 2 * steps], axis=-1).reshape(-1, 4)

    half = len(lands) // 2
    x, y = (
        np.concatenate([features(land) for land in lands[:half]]),
        np.concatenate([land.truth.ravel() for land in lands[:half]]),
    )
    means = np.array([x[y == label].mean(axis=0) for label in range(8)])
    recall = []
    for land in lands[half:]:
        nearest = ((features(land)[:, None] - means) ** 2).sum(axis=-1).argmin(axis=-1)
        recall += [(nearest[land.truth.ravel() == label] == label).mean() for label in np.unique(land.truth)]
    assert 0.2 < np.mean(recall) < 0.7  # 1/8 would be chance


def test_tiny_tile_is_refused():
    with pytest.raises(ConfigError, match="sides of at least 64 px, found 63 x 200"):
        generate_landscape(63, 200, np.random.default_rng(0))


# The folders


@pytest.mark.long
def test_two_calls_write_the_same_bytes_and_another_seed_does_not(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_sample_data(tmp_path / name, seed, **SMALL)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    a, c = contents(tmp_path / "a"), contents(tmp_path / "c")
    assert a.keys() == c.keys()
    assert all(a[file] != c[file] for file in a)


def test_more_tiles_do_not_change_the_others(tmp_path):
    write_sample_data(tmp_path / "few", 1, **SMALL)
    write_sample_data(tmp_path / "more", 1, **SMALL | {"train": 3, "val": 2})
    few, more = contents(tmp_path / "few"), contents(tmp_path / "more")
    assert all(more[file] == few[file] for file in few if file.endswith(".png"))
    assert len(more) == len(few) + 4


def test_folders_hold_paired_png_of_sides_that_no_network_divides(tmp_path):
    summary = write_sample_data(tmp_path / "out", 2, **SMALL | {"train": 4, "side": (90, 130)})
    root = tmp_path / "out"
    assert summary.tiles == {"Train": 4, "Val": 1, "Unlabelled": 1, "Teacher": 2}
    assert not (root / "Unlabelled/masks").exists()
    pixels = dict.fromkeys(summary.tiles, 0)
    sizes = set()
    for image_file in root.glob("*/images/*.png"):
        split = image_file.parent.parent.name
        with Image.open(image_file) as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            assert all(90 <= side <= 130 and side % 32 for side in image.size)
            pixels[split] += image.width * image.height
            sizes.add(image.size)
            if split == "Unlabelled":
                continue
            with Image.open(root / split / "masks" / image_file.name) as mask:
                assert (mask.format, mask.mode, mask.size) == ("PNG", "L", image.size)
                allowed = range(8) if split == "Teacher" else [*range(6), IGNORE_INDEX]
                assert set(np.unique(mask)) <= set(allowed)
    assert pixels == summary.pixels
    assert len(sizes) > 4
    assert summary.size_bytes == sum(file.stat().st_size for file in root.rglob("*.png"))


def test_teacher_tiles_are_not_those_of_train_or_val(tmp_path):
    write_sample_data(tmp_path, 0, **SMALL)
    images = [file.read_bytes() for file in tmp_path.glob("*/images/*.png")]
    assert len(set(images)) == len(images) == 6


def test_own_folder_is_written_anew_without_leftovers(tmp_path):
    write_sample_data(tmp_path, 0, **SMALL | {"train": 3})
    write_sample_data(tmp_path, 0, **SMALL)
    record = json.loads((tmp_path / "sample-data.json").read_text())
    assert record["complete"] is True
    assert len(record["files"]) == NUM_SMALL_FILES
    assert contents(tmp_path).keys() == {"sample-data.json", *record["files"]}


def test_interrupted_run_can_be_repeated(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kdpipe.data.landscape.labels.generate_landscape", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_sample_data(tmp_path / "out", 0, **SMALL)
    assert json.loads((tmp_path / "out/sample-data.json").read_text())["complete"] is False
    write_sample_data(tmp_path / "out", 0, **SMALL)
    assert len(contents(tmp_path / "out")) == NUM_SMALL_FILES + 1


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"is not empty and has no sample-data\.json; name an empty folder"):
        write_sample_data(tmp_path, 0, **SMALL)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_own_folder_with_a_foreign_file_is_refused_and_left_alone(tmp_path):
    write_sample_data(tmp_path, 0, **SMALL)
    (tmp_path / "Train/images/mine.png").write_bytes(b"mine")
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"files that sample data did not write: Train/images/mine\.png"):
        write_sample_data(tmp_path, 1, **SMALL)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["not json", "[]", '{"format": 1}', '{"files": 3}'])
def test_foreign_marker_is_refused(tmp_path, text):
    (tmp_path / "sample-data.json").write_text(text)
    with pytest.raises(DataError, match=r"should list the files of sample data, but cannot be read"):
        write_sample_data(tmp_path, 0, **SMALL)
    assert (tmp_path / "sample-data.json").read_text() == text


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DataError, match="is a file; name another"):
        write_sample_data(tmp_path / "out", 0, **SMALL)


@pytest.mark.parametrize("below", [".", "data", "a/b/c"])
def test_package_folder_and_what_lies_below_is_refused(tmp_path, below):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    with pytest.raises(
        ConfigError,
        match=r"sample data: .* lies in the Python package .*package; choose",
    ):
        write_sample_data(package / below, 0, **SMALL)
    assert contents(package) == {"__init__.py": b""}


@pytest.mark.parametrize("change", [{"train": -1}, {"seed": -1}])
def test_negative_numbers_are_refused(tmp_path, change):
    with pytest.raises(ConfigError, match="must not be negative, found seed"):
        write_sample_data(tmp_path / "out", **{"seed": 0} | SMALL | change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", [(20, 100), (120, 90), (96, 96)])
def test_sides_without_a_choice_are_refused(tmp_path, side):
    with pytest.raises(ConfigError, match="side needs 64 <= smallest <= largest and not only a multiple of 32, found"):
        write_sample_data(tmp_path / "out", 0, **SMALL | {"side": side})
    assert not (tmp_path / "out").exists()
