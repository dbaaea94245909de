"""Keys of the first config: each has a reason, is measured where files tell it, and is asked where they do not."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.files import write_image, write_tiff
from helpers.first_config import TEACHER_CLASSES, filled, init, small, write_mask

from kdpipe.configs import Config, load_config
from kdpipe.configs.errors import CheckpointError, ConfigError
from kdpipe.data import survey
from kdpipe.pipeline.inspection.checkpoint import StudentRun
from kdpipe.pipeline.starter.write import run_name
from kdpipe.pipeline.starter.yaml import as_plain


def leaves(keys, prefix=""):
    for key in keys:
        if isinstance(key.value, list) and key.value and hasattr(key.value[0], "name"):
            yield from leaves(key.value, f"{prefix}{key.name}.")
        else:
            yield f"{prefix}{key.name}", key


@pytest.fixture(scope="module")
def odd_draft(tmp_path_factory, teacher_file):
    """Tiles that need every key: four bands of 16 bits, tiles without masks, a large scene, folders of other names."""
    folder = tmp_path_factory.mktemp("odd")
    for i in range(3):
        values = np.random.default_rng(i).integers(0, 4000, (4, 64, 64), dtype=np.uint16)
        write_tiff(folder / "t/Train/img" / f"{i}.tif", values)
    write_tiff(folder / "t/Train/img/scene.tif", np.ones((4, 2050, 2050), dtype=np.uint16))
    write_mask(folder / "t/Train/gt/0.png", np.kron([[0, 1], [2, 9]], np.ones((32, 32))))
    write_tiff(folder / "t/More/img/0.tif", values)
    return init(
        folder / "t", out=str(folder / "mine.yaml"), teacher=teacher_file, images="img", masks="gt", ignore_index=9, bands=(3, 2, 1),
        classes=["a", "b", "c"], teacher_classes=list("ABCdefgh"), teacher_normalize="unit",
    )  # fmt: skip


def test_every_key_has_a_reason_and_differs_from_its_default(odd_draft):
    # Measured or given, and may happen to equal the default.
    measured_alike = {"classes.ignore_index", "data.val", "train.crop", "train.batch_size", "teacher.normalize"}
    keys = dict(leaves(odd_draft.draft.keys))
    assert {"data.images", "data.masks", "data.allow_missing_masks", "data.bands", "data.stretch", "data.unlabelled", "data.val",
            "teacher.window", "classes.ignore_index"} <= keys.keys()  # fmt: skip
    assert {"train.crop", "train.batch_size"} <= keys.keys()
    for name, key in keys.items():
        assert name.startswith("class_map.") or len(key.why) > 10, name
        model = Config
        for part in name.split(".")[:-1]:
            kinds = [model.model_fields[part].annotation, *getattr(model.model_fields[part].annotation, "__args__", ())]
            model = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
            if model is None:
                break
        if model is not None and name not in measured_alike:
            default = model.model_fields[name.split(".")[-1]].get_default(call_default_factory=True)
            assert as_plain(key.value) != (list(default) if isinstance(default, tuple) else default), name


def test_bands_and_stretch_come_with_measured_ranges(odd_draft):
    data = as_plain(odd_draft.draft.keys)["data"]
    assert (data["bands"], data["stretch"]) == ([3, 2, 1], {"percentiles": [2.0, 98.0]})
    root = odd_draft.roots[1]
    assert (root.path.endswith("Train"), root.bands, root.dtypes) == (True, {4: 4}, {"uint16": 4})
    more = np.random.default_rng(2).integers(0, 4000, (4, 64, 64), dtype=np.uint16)
    expected = [np.percentile(band, [2, 98]) for band in more]
    np.testing.assert_allclose(odd_draft.roots[0].ranges, expected)
    assert "1: %g to %g, 2:" % tuple(expected[0]) in odd_draft.draft.text.replace("\n  # ", " ")


def test_large_scenes_are_not_decoded(tmp_path, monkeypatch):
    write_tiff(tmp_path / "tiles/images/0.tif", np.ones((3, 64, 64), dtype=np.uint16))
    monkeypatch.setattr(survey, "MAX_VALUES", 3 * 64 * 64 - 1)
    found = init(tmp_path / "tiles")
    assert (found.roots[0].headers, found.roots[0].images_read, found.roots[0].ranges) == (1, 0, [])
    assert as_plain(found.draft.keys)["data"]["stretch"] == {"percentiles": [2.0, 98.0]}


def test_bands_are_asked_unless_the_files_name_them(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (4, 64, 64), dtype=np.uint8)
    write_tiff(tmp_path / "plain/images/0.tif", values, photometric="minisblack")
    assert "data.bands" in init(tmp_path / "plain", out="plain.yaml").unfilled
    write_tiff(tmp_path / "rgba/images/0.tif", values, photometric="rgb", alpha="yes")
    assert "bands" not in as_plain(init(tmp_path / "rgba", out="rgba.yaml").draft.keys)["data"]
    write_tiff(tmp_path / "grey/images/0.tif", values[:1])
    assert as_plain(init(tmp_path / "grey", out="grey.yaml").draft.keys)["data"]["bands"] == [1, 1, 1]
    write_tiff(tmp_path / "grey/images/1.tif", values[:3])
    problems = init(tmp_path / "grey", out="mixed.yaml").draft.problems
    assert problems[0].startswith("images have 1 (1 image), 3 (1 image) bands: a run reads the same three")
    with pytest.raises(ConfigError, match=r"--bands is \[1, 2, 5\], but images have 4 bands"):
        init(tmp_path / "plain", out="other.yaml", bands=(1, 2, 5))


def test_without_a_teacher_its_section_is_left_to_fill_in(tmp_path):
    small(tmp_path / "tiles")
    found = init(tmp_path / "tiles")
    assert {
        "teacher.architecture",
        "teacher.encoder",
        "teacher.checkpoint",
        "teacher.classes",
        "teacher.normalize",
        "class_map",
    } <= set(found.unfilled)
    answers = ["a", "b", "c", "unet", "resnet18", "t.pth", "[x, y]", "unit", "{x: {a: 1}, y: {b: 0.5, c: 0.5}}"]
    Path("mine.yaml").write_text(filled(Path("mine.yaml").read_text(), answers))
    assert load_config("mine.yaml").teacher.checkpoint == "t.pth"


def test_an_unknown_network_is_asked_and_a_mere_student_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("segmentation_models_pytorch.encoders.get_encoder_names", lambda: ["resnet18"])
    torch.save({"encoder.conv.weight": torch.zeros(4, 3, 3, 3), "head.bias": torch.zeros(4)}, tmp_path / "odd.pth")
    found = init(small(tmp_path / "tiles"), teacher="odd.pth")
    assert {"teacher.architecture", "teacher.encoder", "teacher.classes"} <= found.unfilled.keys()
    assert "Asked: it was not recognised in the file; one of" in Path("mine.yaml").read_text()
    network = found.teacher.network
    monkeypatch.setattr("kdpipe.pipeline.starter.write.inspect_checkpoint", lambda path: replace(
        found.teacher, network=replace(network, architecture="ftunetformer")))  # fmt: skip
    with pytest.raises(CheckpointError, match="which kdpipe trains as a student; a teacher is"):
        init(tmp_path / "tiles", teacher="odd.pth", overwrite=True)


def test_options_that_weights_do_not_show_are_asked_of_a_file_and_known_of_a_student(
    tmp_path, monkeypatch, teacher_file
):
    found = init(small(tmp_path / "tiles"), teacher=teacher_file)
    text = " ".join(Path("mine.yaml").read_text().replace("#", "").split())
    assert (
        "They do not show decoder_use_norm, decoder_interpolation: give `options` unless smp's defaults were used."
        in text
    )
    options = {"decoder_interpolation": "bilinear"}
    run = StudentRun("a/b", "cached", 1, None, None, list("abcdefgh"), "unit", options)
    monkeypatch.setattr(
        "kdpipe.pipeline.starter.write.inspect_checkpoint", lambda path: replace(found.teacher, student=run)
    )
    found = init(tmp_path / "tiles", teacher=teacher_file, overwrite=True)
    assert as_plain(found.draft.keys)["teacher"]["options"] == options


@pytest.mark.parametrize(
    ("values", "classes", "ignore", "message"),
    [
        (((0, 1), (2, 3)), 4, None, None),
        (((0, 1), (2, 255)), 3, 255, None),
        (((0, 1), (254, 255)), None, None, "masks hold 0, 1, 254, 255, which are not class indices"),
        (((0, 3), (9, 255)), 3, 255, None),
        (((1, 1), (1, 1)), None, None, "all masks hold only 1: a student"),
        (((0, 1), (3, 3)), 4, None, None),
    ],
)
def test_classes_follow_from_the_values_of_masks(tmp_path, values, classes, ignore, message):
    found = init(small(tmp_path / "tiles", values))
    section = as_plain(found.draft.keys)["classes"]
    assert section.get("ignore_index") == ignore
    if classes is None:
        assert section["names"] == "FILL_IN"
        assert message in " ".join(found.draft.problems)
    else:
        assert section["names"] == ["FILL_IN"] * classes
        assert not found.draft.problems
    assert (found.draft.notes[0] == "no mask that was read holds 2: a class without labels is never scored") == (
        3 in values[1] and 2 not in values[1]
    )


@pytest.mark.parametrize(
    ("values", "names", "remap", "ignore"),
    [
        (((0, 255), (0, 255)), 2, {0: 0, 255: 1}, None),
        (((11, 41), (42, 11)), 3, {11: 0, 41: 1, 42: 2}, None),
        (((10, 20), (50, 255)), 3, {10: 0, 20: 1, 50: 2}, 255),
        (((1, 2), (1, 2)), 2, {1: 0, 2: 1}, None),
    ],
)
def test_codes_in_masks_become_classes(tmp_path, values, names, remap, ignore):
    found = init(small(tmp_path / "tiles", values))
    keys = as_plain(found.draft.keys)
    assert (keys["classes"]["names"], keys["data"]["remap"]) == (["FILL_IN"] * names, remap)
    assert keys["classes"].get("ignore_index") == ignore
    assert not found.draft.problems
    assert "codes rather than indices: the config has data.remap" in found.draft.notes[0]
    named = as_plain(init(tmp_path / "tiles", classes=list("abc")[:names], overwrite=True).draft.keys)
    assert (named["classes"]["names"], named["data"]["remap"]) == (list("abc")[:names], remap)


def test_many_classes_are_no_codes_and_greys_no_classes(tmp_path):
    ramp = np.arange(151)
    root = small(tmp_path / "many")
    for path in (root / "masks").iterdir():
        write_mask(path, np.resize(ramp, (64, 64)))
    found = init(root)
    assert "remap" not in as_plain(found.draft.keys)["data"]
    assert not found.draft.problems
    for path in (root / "masks").iterdir():
        write_mask(path, np.resize(np.arange(256), (64, 64)))
    assert "which are not class indices" in " ".join(init(root, overwrite=True).draft.problems)


def test_values_beyond_the_given_classes_are_refused(tmp_path):
    small(tmp_path / "tiles", ((0, 1), (2, 7)))
    with pytest.raises(ConfigError, match="--classes names 2 classes, 0 to 1, but masks in .*tiles hold 2, 7"):
        init(tmp_path / "tiles", classes=["a", "b"])
    assert not Path("mine.yaml").exists()
    section = as_plain(init(tmp_path / "tiles", classes=["a", "b", "c"], ignore_index=7).draft.keys)["classes"]
    assert section == {"names": ["a", "b", "c"], "ignore_index": 7}


def test_a_wrong_number_of_teacher_classes_is_refused(tmp_path, teacher_file):
    small(tmp_path / "tiles")
    with pytest.raises(ConfigError, match=r"--teacher-classes names 7 classes, but .*mobilenet_v2\.pth has 8 channels"):
        init(tmp_path / "tiles", teacher=teacher_file, teacher_classes=TEACHER_CLASSES[:7])


def test_a_folder_with_other_classes_is_noticed(tmp_path):
    small(tmp_path / "all/Train")
    small(tmp_path / "all/Old", ((0, 1), (5, 255)))
    notes = " ".join(init(tmp_path / "all").draft.notes)
    assert re.search(r"only masks in \S+all/Old hold 5: are their classes the same as in the other folders\?", notes)


def test_roles_follow_from_names_and_masks(tmp_path):
    for name in ("Train", "validation", "test"):
        small(tmp_path / "all" / name, tiles=1)
    write_image(tmp_path / "all/extra/images/0.png", 64, 64)
    small(tmp_path / "apart", tiles=1)
    found = init(tmp_path / "all", val=[str(tmp_path / "apart")])
    roles = {Path(path).name: role for path, role in found.draft.roles.items()}
    assert roles == {"Train": "train", "validation": "val", "test": "not used", "extra": "unlabelled", "apart": "val"}
    assert not any("no folder to validate on" in note for note in found.draft.notes)
    found = init(tmp_path / "all/Train", tmp_path / "all/Train/", overwrite=True)
    assert [root.path for root in found.roots] == [str(tmp_path / "all/Train")]
    assert any("no folder to validate on. Move whole scenes" in note for note in found.draft.notes)
    with pytest.raises(ConfigError, match="all folders are for validation or tests"):
        init(tmp_path / "all/validation", overwrite=True)


@pytest.mark.parametrize(
    "name", ["two\nlines # and", "colon: {x", "- dash", "'quote\"", "ümläut", "*anchor &x !tag", "bell\a"]
)
def test_folder_names_survive_yaml(tmp_path, name):
    small(tmp_path / name / "Train")
    text = init(name).draft.text
    assert yaml.safe_load(text)["data"]["train"] == [f"{name}/Train"]
    names = ["a", "b", "c", "unet", "resnet18", "t.pth", "[x, y]", "unit", "{x: {a: 1}, y: {b: 1}}"]
    Path("mine.yaml").write_text(filled(text, names))
    assert load_config("mine.yaml").data.train == [f"{name}/Train"]


def test_a_run_is_named_after_its_config():
    assert run_name("configs/my run (2).yaml") == "my-run-2"
    assert run_name("....yaml") == "student"


def test_samples_are_spread_evenly():
    assert survey.evenly(list("abcdefghij"), 2) == ["c", "h"]
    assert survey.evenly(list("abc"), 5) == ["a", "b", "c"]
    assert survey.evenly([], 5) == []


def test_masks_with_several_bands_are_named(tmp_path):
    root = small(tmp_path / "tiles", tiles=1)
    write_image(root / "masks/0.png", 64, 64)
    assert "should have 1 band of class indices, found 3 bands" in init(root).draft.problems[0]
