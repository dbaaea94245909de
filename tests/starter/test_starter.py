"""`kdpipe init` counts what is there, says where each value comes from, and leaves to the user what no file tells."""

import json
import re
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from click.testing import CliRunner
from helpers.files import write_image
from PIL import Image

from kdpipe.configs import Config, load_config
from kdpipe.configs.errors import CheckpointError, ConfigError, DataError, UnfilledConfig
from kdpipe.configs.load import load_open_config
from kdpipe.data import survey
from kdpipe.pipeline.commands.main import cli
from kdpipe.pipeline.dry_run import estimate
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.starter.given import Given
from kdpipe.pipeline.starter.write import run_name, write_first_config
from kdpipe.pipeline.starter.yaml import as_plain
from kdpipe.pipeline.training.run import train
from kdpipe.pipeline.verify.class_map import suggest_map

CPU = torch.device("cpu")
CLASSES = ["Background", "Forest", "Grassland", "Cropland", "Settlement", "SemiNatural"]
TEACHER_CLASSES = ["Tree", "Rangeland", "Cropland", "Developed", "Road", "Bareland", "Water", "background"]
CLASS_MAP = {
    "Tree": {"Forest": 1},
    "Rangeland": {"Grassland": 0.7, "SemiNatural": 0.3},
    "Developed": {"Settlement": 1},
    "Road": {"Settlement": 1},
    "Bareland": {"SemiNatural": 1},
    "Water": {"Background": 1},
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def look(*folders, teacher=None, out="mine.yaml", overwrite=False, **said):
    return write_first_config(
        list(map(str, folders)), teacher and str(teacher), out, Given(name=run_name(out), **said), overwrite=overwrite
    )


def filled(text, answers):
    """The config's text with each FILL_IN replaced as its user would, from the first to the last: the tests' own editor."""
    lines, rest = [], list(answers)
    for line in text.splitlines():
        code, hash_, comment = line.partition("#")
        if "FILL_IN" in code:
            code = code.replace("FILL_IN", rest.pop(0))
        lines.append(code + hash_ + comment)
    assert not rest
    return "\n".join(lines) + "\n"


def flow(value):
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("...").strip()


def write_mask(path, values_HW):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values_HW, dtype=np.uint8)).save(path)


def write_tif(path, bands_BHW, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = bands_BHW.shape
    with rasterio.open(path, "w", driver="GTiff", count=count, height=height, width=width, dtype=bands_BHW.dtype,
                       transform=rasterio.Affine(2, 0, 0, 0, -2, 0), **options) as file:  # fmt: skip
        file.write(bands_BHW)


def small(root, values=((0, 1), (2, 255)), tiles=2, side=64):
    """A root of equal tiles whose masks hold these values in equal parts."""
    mask = np.kron(np.array(values), np.ones((side // 2, side // 2), dtype=int))
    for i in range(tiles):
        write_image(root / "images" / f"{i}.png", side, side, seed=i)
        write_mask(root / "masks" / f"{i}.png", mask)
    return root


def counted(root):
    """Pixels by mask value, and the images' (H, W): PIL and NumPy alone."""
    values = np.zeros(256, dtype=int)
    for path in (root / "masks").iterdir():
        with Image.open(path) as mask:
            values += np.bincount(np.asarray(mask).ravel(), minlength=256)
    return {value: int(n) for value, n in enumerate(values) if n}, image_sizes(root)


def image_sizes(root):
    sizes = []
    for path in sorted((root / "images").iterdir()):
        with Image.open(path) as image:
            sizes.append(image.size[::-1])
    return sizes


def test_from_tiles_and_a_teacher_to_a_step_of_training(landscape, teacher_file, tmp_path):
    done = CliRunner().invoke(cli, ["init", str(landscape), "--teacher", str(teacher_file)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    with pytest.raises(UnfilledConfig, match=r"classes\.names \(lines \d+ to \d+\), teacher\.classes") as refused:
        load_config("mine.yaml")
    assert refused.value.exit_code == 2
    answers = [
        *CLASSES,
        *TEACHER_CLASSES,
        "unit",
        flow({**CLASS_MAP, "Cropland": {"Cropland": 1}, "background": {"Background": 1}}),
    ]
    Path("mine.yaml").write_text(filled(Path("mine.yaml").read_text(), answers))
    config = load_config("mine.yaml", ["train.max_steps=1", "train.workers=0"])
    assert (config.data.train, config.data.val, config.data.unlabelled) == (
        [f"{landscape}/Train"], [f"{landscape}/Val"], [f"{landscape}/Unlabelled"]
    )  # fmt: skip
    forecast = estimate(config, CPU)
    assert (forecast.tiles, forecast.fits, forecast.unreadable) == (8, True, {})
    assert precompute(config, CPU).failed == {}
    assert train(config, CPU).steps == 1


def test_what_is_said_is_not_asked_and_the_config_is_the_one_that_was_meant(landscape, teacher_file):
    found = look(
        landscape, teacher=teacher_file, classes=CLASSES, teacher_classes=TEACHER_CLASSES, teacher_normalize="imagenet"
    )
    text = Path("mine.yaml").read_text()
    assert set(found.unfilled) == {f"class_map.{name}" for name in CLASS_MAP}
    assert yaml.safe_load(text) == as_plain(found.draft.keys)
    Path("mine.yaml").write_text(filled(text, [flow(row) for row in CLASS_MAP.values()]))
    config = load_config("mine.yaml")
    shorter = sorted(min(size) for root in ("Train", "Unlabelled") for size in image_sizes(landscape / root))
    crop = shorter[int(0.1 * (len(shorter) - 1))] // 32 * 32
    meant = {
        "name": "mine",
        "classes": {"names": CLASSES, "ignore_index": 255},
        "data": {
            "train": [f"{landscape}/Train"],
            "val": [f"{landscape}/Val"],
            "unlabelled": [f"{landscape}/Unlabelled"],
        },
        "teacher": {
            "architecture": "unet",
            "encoder": "mobilenet_v2",
            "checkpoint": str(teacher_file),
            "classes": TEACHER_CLASSES,
            "normalize": "imagenet",
        },
        "class_map": {**CLASS_MAP, "Cropland": {"Cropland": 1}, "background": {"Background": 1}},
        "cache": {"path": "caches/mine.zarr"},
        "distill": {"temperature": 1.0},
        "student": {"architecture": "linknet", "encoder": "tu-regnetx_002"},
        "train": {"crop": crop, "lr": 1e-3, "backbone_lr": 1e-3},
    }
    sizes = [size for root in ("Train", "Unlabelled") for size in image_sizes(landscape / root)]
    crops = round(np.median([h * w for h, w in sizes]) / crop**2)
    meant["train"] |= {"batch_size": min(16, 8 * crops)} | ({"crops_per_tile": crops} if crops > 1 else {})
    assert config == Config.model_validate(meant)


def test_counts_are_those_of_numpy(landscape, teacher_file):
    done = CliRunner().invoke(cli, ["init", str(landscape), "--teacher", str(teacher_file), "--json", "found.json"])
    assert done.exit_code == 0, done.output
    found = json.loads(Path("found.json").read_text())
    for root in found["roots"]:
        if root["role"] != "unlabelled":
            values, sizes = counted(Path(root["path"]))
            assert root["mask_values"] == {str(value): n for value, n in values.items()}
            assert root["sizes"] == [[*size, n] for size, n in sorted(Counter(sizes).items())]
            assert (root["bands"], root["dtypes"]) == ({"3": len(sizes)}, {"uint8": len(sizes)})
    values, _ = counted(landscape / "Train")
    labelled = sum(n for value, n in values.items() if value != 255)
    shares = re.findall(r"- FILL_IN  # (\d): ([\d.]+) %", Path("mine.yaml").read_text())
    assert len(shares) == 6
    for value, share in shares:
        assert float(share) == pytest.approx(100 * values[int(value)] / labelled, abs=0.05)
    text = Path("mine.yaml").read_text().replace("\n  # ", " ")
    assert f"without a label, {100 * values[255] / sum(values.values()):.1f} % of the training pixels" in text


def test_the_dubai_tiles_and_their_teacher(dubai):
    teacher = next((dubai / "pretrain_weights").glob("u-efficientnet-b4*.pth"))
    found = look(dubai / "data/dubai/Train", dubai / "data/dubai/Val", teacher=teacher, classes=CLASSES,
                 teacher_classes=TEACHER_CLASSES, teacher_normalize="unit")  # fmt: skip
    for root in found.roots:
        values, sizes = counted(Path(root.path))
        assert (dict(root.values), sorted(root.sizes_HW)) == (values, sorted(sizes))
    assert str(found.teacher.network) == "unet with efficientnet-b4, 8 channels"
    assert found.draft.notes == ["no mask that was read holds 2, 3: a class without labels is never scored"]
    Path("mine.yaml").write_text(filled(Path("mine.yaml").read_text(), [flow(row) for row in CLASS_MAP.values()]))
    config, shipped = load_config("mine.yaml"), load_config("dubai/linknet_kd")
    assert config.classes == shipped.classes
    np.testing.assert_array_equal(config.class_map_matrix(), shipped.class_map_matrix())
    teacher_keys = {"checkpoint": "", "classes": []}
    assert config.teacher.model_copy(update=teacher_keys) == shipped.teacher.model_copy(update=teacher_keys)
    assert (config.train.crop, config.train.batch_size) == (512, 4)


def leaves(keys, prefix=""):
    for key in keys:
        if isinstance(key.value, list) and key.value and hasattr(key.value[0], "name"):
            yield from leaves(key.value, f"{prefix}{key.name}.")
        else:
            yield f"{prefix}{key.name}", key


@pytest.fixture
def odd_draft(tmp_path, teacher_file):
    """Tiles that need every key that may be written: several bands of 16 bits, tiles without masks, a scene, odd names."""
    for i in range(3):
        values = np.random.default_rng(i).integers(0, 4000, (4, 64, 64), dtype=np.uint16)
        write_tif(tmp_path / "t/Train/img" / f"{i}.tif", values)
    write_tif(tmp_path / "t/Train/img/scene.tif", np.ones((4, 2050, 2050), dtype=np.uint16))
    write_mask(tmp_path / "t/Train/gt/0.png", np.kron([[0, 1], [2, 9]], np.ones((32, 32))))
    write_tif(tmp_path / "t/More/img/0.tif", values)
    return look(tmp_path / "t", teacher=teacher_file, images="img", masks="gt", ignore_index=9, bands=(3, 2, 1),
                classes=["a", "b", "c"], teacher_classes=list("ABCdefgh"), teacher_normalize="unit")  # fmt: skip


def test_every_key_has_its_reason_and_none_repeats_a_default_without_one(odd_draft):
    measured_alike = {
        "classes.ignore_index",
        "data.val",
        "train.crop",
        "train.batch_size",
        "teacher.normalize",
    }  # said because they were looked at, or by the user
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


def test_bands_and_bits_become_keys_with_the_ranges_that_were_measured(odd_draft):
    data = as_plain(odd_draft.draft.keys)["data"]
    assert (data["bands"], data["stretch"]) == ([3, 2, 1], {"percentiles": [2.0, 98.0]})
    root = odd_draft.roots[1]
    assert (root.path.endswith("Train"), root.bands, root.dtypes) == (True, {4: 4}, {"uint16": 4})
    more = np.random.default_rng(2).integers(0, 4000, (4, 64, 64), dtype=np.uint16)
    expected = [np.percentile(band, [2, 98]) for band in more]
    np.testing.assert_allclose(odd_draft.roots[0].ranges, expected)
    assert "1: %g to %g, 2:" % tuple(expected[0]) in Path("mine.yaml").read_text().replace("\n  # ", " ")


def test_scenes_too_large_to_decode_here_are_not(tmp_path, monkeypatch):
    write_tif(tmp_path / "tiles/images/0.tif", np.ones((3, 64, 64), dtype=np.uint16))
    monkeypatch.setattr(survey, "MAX_VALUES", 3 * 64 * 64 - 1)
    found = look(tmp_path / "tiles")
    assert (found.roots[0].headers, found.roots[0].images_read, found.roots[0].ranges) == (1, 0, [])
    assert as_plain(found.draft.keys)["data"]["stretch"] == {"percentiles": [2.0, 98.0]}


def test_bands_that_no_file_names_are_asked_and_those_it_names_are_taken(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (4, 64, 64), dtype=np.uint8)
    write_tif(tmp_path / "plain/images/0.tif", values, photometric="minisblack")
    assert "data.bands" in look(tmp_path / "plain", out="plain.yaml").unfilled
    write_tif(tmp_path / "rgba/images/0.tif", values, photometric="rgb", alpha="yes")
    assert "bands" not in as_plain(look(tmp_path / "rgba", out="rgba.yaml").draft.keys)["data"]
    write_tif(tmp_path / "grey/images/0.tif", values[:1])
    assert as_plain(look(tmp_path / "grey", out="grey.yaml").draft.keys)["data"]["bands"] == [1, 1, 1]
    write_tif(tmp_path / "grey/images/1.tif", values[:3])
    problems = look(tmp_path / "grey", out="mixed.yaml").draft.problems
    assert problems[0].startswith("images have 1 (1 image), 3 (1 image) bands: a run reads the same three")
    with pytest.raises(ConfigError, match=r"--bands is \[1, 2, 5\], but images have 4 bands"):
        look(tmp_path / "plain", out="other.yaml", bands=(1, 2, 5))


def test_without_a_teacher_its_section_is_asked(tmp_path):
    small(tmp_path / "tiles")
    found = look(tmp_path / "tiles")
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


def test_a_network_that_is_not_recognised_is_asked_and_a_student_alone_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("segmentation_models_pytorch.encoders.get_encoder_names", lambda: ["resnet18"])
    torch.save({"encoder.conv.weight": torch.zeros(4, 3, 3, 3), "head.bias": torch.zeros(4)}, tmp_path / "odd.pth")
    found = look(small(tmp_path / "tiles"), teacher="odd.pth")
    assert {"teacher.architecture", "teacher.encoder", "teacher.classes"} <= found.unfilled.keys()
    assert "Asked: it was not recognised in the file; one of" in Path("mine.yaml").read_text()
    network = found.teacher.network
    monkeypatch.setattr("kdpipe.pipeline.starter.write.inspect_checkpoint", lambda path: replace(
        found.teacher, network=replace(network, architecture="ftunetformer")))  # fmt: skip
    with pytest.raises(CheckpointError, match="which kdpipe trains as a student; a teacher is"):
        look(tmp_path / "tiles", teacher="odd.pth", overwrite=True)


def test_a_student_of_kdpipe_as_teacher_says_its_channels_itself(make_config, landscape):
    config = make_config(train__max_steps=1, student__encoder="mobilenet_v2")
    precompute(config, CPU)
    train(config, CPU)
    found = look(landscape / "Train", teacher="model_weights/tests/tiny/last.ckpt", classes=CLASSES)
    assert found.unfilled == {}
    config = load_config("mine.yaml")
    assert (config.teacher.classes, config.teacher.normalize) == (CLASSES, "imagenet")
    np.testing.assert_array_equal(config.class_map_matrix(), np.eye(6))


@pytest.mark.parametrize(
    ("values", "classes", "ignore", "message"),
    [
        (((0, 1), (2, 3)), 4, None, None),
        (((0, 1), (2, 255)), 3, 255, None),
        (((0, 1), (254, 255)), None, None, "masks hold 0, 1, 254, 255, which are not class indices"),
        (((0, 255), (0, 255)), None, None, "with two classes, recode 255 to 1"),
        (((0, 50), (100, 150)), None, None, "masks hold 0, 50, 100, 150, which are not class indices"),
        (((1, 1), (1, 1)), None, None, "all masks hold only 1: a student"),
        (((0, 1), (3, 3)), 4, None, None),
    ],
)
def test_classes_are_told_from_the_values_of_masks(tmp_path, values, classes, ignore, message):
    found = look(small(tmp_path / "tiles", values))
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


def test_values_beyond_the_classes_that_were_said_are_refused(tmp_path):
    small(tmp_path / "tiles", ((0, 1), (2, 7)))
    with pytest.raises(ConfigError, match="--classes names 2 classes, 0 to 1, but masks in .*tiles hold 2, 7"):
        look(tmp_path / "tiles", classes=["a", "b"])
    assert not Path("mine.yaml").exists()
    section = as_plain(look(tmp_path / "tiles", classes=["a", "b", "c"], ignore_index=7).draft.keys)["classes"]
    assert section == {"names": ["a", "b", "c"], "ignore_index": 7}


def test_a_wrong_number_of_teacher_classes_is_refused(tmp_path, teacher_file):
    small(tmp_path / "tiles")
    with pytest.raises(ConfigError, match="--teacher-classes names 7 classes, but .*teacher.pth has 8 channels"):
        look(tmp_path / "tiles", teacher=teacher_file, teacher_classes=TEACHER_CLASSES[:7])


def test_masks_of_other_classes_are_noticed(tmp_path):
    small(tmp_path / "all/Train")
    small(tmp_path / "all/Old", ((0, 1), (5, 255)))
    notes = " ".join(look(tmp_path / "all").draft.notes)
    assert re.search(r"only masks in \S+all/Old hold 5: are their classes the same as in the other folders\?", notes)


def test_folders_have_the_roles_of_their_names_and_of_their_masks(tmp_path):
    for name in ("Train", "validation", "test"):
        small(tmp_path / "all" / name, tiles=1)
    write_image(tmp_path / "all/extra/images/0.png", 64, 64)
    small(tmp_path / "apart", tiles=1)
    found = look(tmp_path / "all", val=[str(tmp_path / "apart")])
    roles = {Path(path).name: role for path, role in found.draft.roles.items()}
    assert roles == {"Train": "train", "validation": "val", "test": "not used", "extra": "unlabelled", "apart": "val"}
    assert not any("no folder to validate on" in note for note in found.draft.notes)
    found = look(tmp_path / "all/Train", tmp_path / "all/Train/", overwrite=True)
    assert [root.path for root in found.roots] == [str(tmp_path / "all/Train")]
    assert any("no folder to validate on. Move whole scenes" in note for note in found.draft.notes)
    with pytest.raises(ConfigError, match="all folders are for validation or tests"):
        look(tmp_path / "all/validation", overwrite=True)


def test_what_a_run_would_stop_at_is_named_and_the_config_is_written(tmp_path):
    root = small(tmp_path / "tiles", tiles=4)
    (root / "images/0.png").write_bytes((root / "images/0.png").read_bytes()[:400])
    (root / "images/1.png").write_text("no image")
    write_mask(root / "masks/2.png", np.zeros((32, 32)))
    (root / "masks/3.png").unlink()
    done = CliRunner().invoke(cli, ["init", str(root), "--json", "found.json"], catch_exceptions=False)
    assert done.exit_code == 1
    problems = json.loads(Path("found.json").read_text())["problems"]
    assert [re.sub(r".*/tiles/", "", problem)[:12] for problem in problems] == [
        "images/0.png",
        "images/1.png",
        "images/2.png",
    ]
    assert "the mask " in problems[2]
    assert "32 x 32 px, but its image" in problems[2]
    for problem in problems:
        assert problem in done.output.replace("\n", "")
    data = yaml.safe_load(Path("mine.yaml").read_text())["data"]
    assert data["allow_missing_masks"] is True


def test_masks_that_cannot_be_labels_are_named(tmp_path):
    root = small(tmp_path / "tiles", tiles=1)
    write_image(root / "masks/0.png", 64, 64)
    assert "should have 1 band of class indices, found 3 bands" in look(root).draft.problems[0]


def test_of_ten_thousand_tiles_some_are_opened_evenly_and_it_says_how_many(tmp_path, monkeypatch):
    write_image(tmp_path / "one.png", 64, 64)
    write_mask(tmp_path / "mask.png", np.kron([[0, 1], [2, 3]], np.ones((32, 32))))
    for kind, target in (("images", "one.png"), ("masks", "mask.png")):
        (tmp_path / "tiles" / kind).mkdir(parents=True)
        for i in range(10_000):
            (tmp_path / "tiles" / kind / f"{i:05}.png").hardlink_to(tmp_path / target)
    opened = Counter()
    for name in ("read_header", "read_bands", "read_mask_values"):
        real = getattr(survey, name)
        monkeypatch.setattr(
            survey, name, lambda path, *a, real=real, name=name: opened.update([name]) or real(path, *a)
        )
    done = CliRunner().invoke(cli, ["init", "tiles"], catch_exceptions=False)
    assert done.exit_code == 0
    assert opened["read_bands"] == opened["read_mask_values"] == survey.MAX_READ
    assert opened["read_header"] == 2 * survey.MAX_HEADERS + survey.MAX_READ
    assert "Not all: of tiles 1000 headers, 100 images and 100 masks were read, evenly spread." in done.output


def test_items_are_chosen_evenly():
    assert survey.evenly(list("abcdefghij"), 2) == ["c", "h"]
    assert survey.evenly(list("abc"), 5) == ["a", "b", "c"]
    assert survey.evenly([], 5) == []


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda place: None, "there is no folder"),
        (lambda place: place.write_text("x"), "is a file: name the folder"),
        (lambda place: place.mkdir(), "found no folder and 0 image files"),
        (lambda place: write_image(place / "a.png", 8, 8), "found no folder and 1 image files"),
        (lambda place: (place / "img").mkdir(parents=True), "found the folders img and 0 image files"),
        (lambda place: (place / "images").mkdir(parents=True), "no images in .*images"),
        (lambda place: break_all(place), "none of the images that were opened can be read"),
    ],
)  # fmt: skip
def test_folders_that_hold_no_tiles_are_refused(tmp_path, arrange, message):
    arrange(tmp_path / "tiles")
    with pytest.raises(DataError, match=message):
        look(tmp_path / "tiles")
    assert not Path("mine.yaml").exists()


def break_all(place):
    for path in (small(place) / "images").iterdir():
        path.write_text("no image")


def test_files_that_are_no_weights_are_refused_before_tiles_are_read(tmp_path, monkeypatch):
    small(tmp_path / "tiles")
    monkeypatch.setattr("kdpipe.pipeline.starter.write.survey_root", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: it is deprecated, and files of it are still about
        torch.jit.script(torch.nn.Conv2d(3, 8, 1)).save(str(tmp_path / "script.pt"))
    with pytest.raises(CheckpointError, match="is a TorchScript archive"):
        look(tmp_path / "tiles", teacher="script.pt")
    (tmp_path / "words.pth").write_text("not weights")
    with pytest.raises(CheckpointError, match="is not a readable checkpoint"):
        look(tmp_path / "tiles", teacher="words.pth")
    assert not Path("mine.yaml").exists()


def test_a_config_is_never_replaced_unasked(tmp_path):
    small(tmp_path / "tiles")
    Path("mine.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="mine.yaml exists already: --overwrite replaces it"):
        look(tmp_path / "tiles")
    assert Path("mine.yaml").read_text() == "mine"
    look(tmp_path / "tiles", overwrite=True)
    assert "name: mine" in Path("mine.yaml").read_text()
    with pytest.raises(ConfigError, match="--out tiles is a folder"):
        look(tmp_path / "tiles", out="tiles", overwrite=True)


@pytest.mark.parametrize(
    "name", ["two\nlines # and", "colon: {x", "- dash", "'quote\"", "ümläut", "*anchor &x !tag", "bell\a"]
)
def test_folders_of_any_name_are_read_back_as_they_are(tmp_path, name):
    small(tmp_path / name / "Train")
    text = look(f"{name}", teacher=None).draft.text
    assert yaml.safe_load(text)["data"]["train"] == [f"{name}/Train"]
    names = ["a", "b", "c", "unet", "resnet18", "t.pth", "[x, y]", "unit", "{x: {a: 1}, y: {b: 1}}"]
    Path("mine.yaml").write_text(filled(text, names))
    assert load_config("mine.yaml").data.train == [f"{name}/Train"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "a"], "expected two names or more"),
        (["--classes", "a,,b"], "expected two names or more"),
        (["--teacher-classes", "a,b,a"], "names a more than once"),
        (["--bands", "1,2"], "expected three band numbers"),
        (["--bands", "0,1,2"], "expected three band numbers"),
        ([], "Missing argument 'FOLDER...'"),
    ],
)
def test_mistakes_on_the_command_line_are_named(arguments, message):
    done = CliRunner().invoke(cli, ["init", *(["x"] if arguments else []), *arguments])
    assert done.exit_code == 2
    assert message in done.output


def test_suggest_map_answers_for_rows_that_are_still_asked(landscape, teacher_file):
    look(landscape, teacher=teacher_file, classes=CLASSES)
    text = filled(Path("mine.yaml").read_text(), [*TEACHER_CLASSES, "unit", "FILL_IN"])
    Path("mine.yaml").write_text(text)
    config, unfilled = load_open_config("mine.yaml")
    assert unfilled == TEACHER_CLASSES
    suggestion = suggest_map(config, CPU, unfilled=unfilled)
    kept = {row.teacher_class for row in suggestion.rows if row.kept}
    suggested = yaml.safe_load(suggestion.as_yaml())["class_map"]
    assert {name for name, row in suggested.items() if row == "FILL_IN"} == kept
    for row in suggestion.rows:
        assert row.configured == {}
        assert not row.disagrees
        assert row.kept or sum(row.suggested.values()) == pytest.approx(1)
    Path("mine.yaml").write_text(re.sub(r"^class_map: .*$", suggestion.as_yaml(), text, flags=re.MULTILINE))
    if kept:
        with pytest.raises(UnfilledConfig, match=r"class_map \(line"):
            load_config("mine.yaml")
    Path("mine.yaml").write_text(Path("mine.yaml").read_text().replace(": FILL_IN", ": {Forest: 1}"))
    assert load_config("mine.yaml").class_map.keys() == set(TEACHER_CLASSES)


def test_a_run_is_named_after_its_config():
    assert run_name("configs/my run (2).yaml") == "my-run-2"
    assert run_name("....yaml") == "student"
