"""`kdpipe init` from tiles to a config that trains: counts, refusals, and files that need mending."""

import json
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.commands import run_command
from helpers.files import write_image
from helpers.first_config import CLASS_MAP, CLASSES, TEACHER_CLASSES, filled, flow, init, small, write_mask
from PIL import Image

from kdpipe.configs import Config, load_config
from kdpipe.configs.errors import CheckpointError, ConfigError, DataError, UnfilledConfig
from kdpipe.configs.load import load_open_config
from kdpipe.data import survey
from kdpipe.data.declared import check
from kdpipe.pipeline.dry_run import estimate
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.starter.yaml import as_plain
from kdpipe.pipeline.training.run import train
from kdpipe.pipeline.verify.class_map import suggest_map

CPU = torch.device("cpu")


def counted(root):
    """Pixels by mask value, and the images' (H, W), from PIL and NumPy alone."""
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


@pytest.mark.long
def test_from_tiles_and_a_teacher_to_a_step_of_training(landscape, teacher_file, tmp_path):
    done = run_command("init", landscape, "--teacher", teacher_file)
    assert done.returncode == 0, done.stdout
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


def test_options_fill_in_the_config_as_meant(landscape, teacher_file):
    found = init(
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
        "distill": {"temperature": 1.0, "loss": {"kl": 1, "dice": 1}},
        "student": {"architecture": "linknet", "encoder": "tu-regnetx_002"},
        "train": {"crop": crop, "lr": 1e-3, "backbone_lr": 1e-3},
    }
    sizes = [size for root in ("Train", "Unlabelled") for size in image_sizes(landscape / root)]
    crops = round(np.median([h * w for h, w in sizes]) / crop**2)
    meant["train"] |= {"batch_size": min(16, 8 * crops)} | ({"crops_per_tile": crops} if crops > 1 else {})
    assert config == Config.model_validate(meant)


def test_counts_are_those_of_numpy(landscape):
    done = run_command("init", landscape, "--json", "found.json")
    assert done.returncode == 0, done.stdout
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


@pytest.mark.long
def test_the_dubai_tiles_and_their_teacher(dubai):
    teacher = next((dubai / "pretrain_weights").glob("u-efficientnet-b4*.pth"))
    found = init(dubai / "data/dubai/Train", dubai / "data/dubai/Val", teacher=teacher, classes=CLASSES,
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


@pytest.mark.long
def test_a_student_of_kdpipe_as_teacher_leaves_nothing_to_fill_in(make_config, landscape):
    config = make_config(train__max_steps=1, student__encoder="mobilenet_v2")
    precompute(config, CPU)
    train(config, CPU)
    found = init(landscape / "Train", teacher="model_weights/tests/tiny/last.ckpt", classes=CLASSES)
    assert found.unfilled == {}
    config = load_config("mine.yaml")
    assert (config.teacher.classes, config.teacher.normalize) == (CLASSES, "imagenet")
    np.testing.assert_array_equal(config.class_map_matrix(), np.eye(6))


def test_faults_that_stop_a_run_are_named_and_the_config_is_written(tmp_path):
    root = small(tmp_path / "tiles", tiles=4)
    (root / "images/0.png").write_bytes((root / "images/0.png").read_bytes()[:400])
    (root / "images/1.png").write_text("no image")
    write_mask(root / "masks/2.png", np.zeros((32, 32)))
    (root / "masks/3.png").unlink()
    done = run_command("init", root, "--json", "found.json")
    assert done.returncode == 1
    problems = json.loads(Path("found.json").read_text())["problems"]
    assert [re.sub(r".*/tiles/", "", problem)[:12] for problem in problems] == [
        "images/0.png",
        "images/1.png",
        "images/2.png",
    ]
    assert "the mask " in problems[2]
    assert "32 x 32 px, but its image" in problems[2]
    for problem in problems:
        assert problem in done.stdout.replace("\n", "")
    data = yaml.safe_load(Path("mine.yaml").read_text())["data"]
    assert data["allow_missing_masks"] is True


@pytest.mark.long
def test_a_sample_of_ten_thousand_tiles_is_opened_and_reported(tmp_path, monkeypatch):
    write_image(tmp_path / "one.png", 64, 64)
    write_mask(tmp_path / "mask.png", np.kron([[0, 1], [2, 3]], np.ones((32, 32))))
    for kind, target in (("images", "one.png"), ("masks", "mask.png")):
        (tmp_path / "tiles" / kind).mkdir(parents=True)
        for i in range(10_000):
            (tmp_path / "tiles" / kind / f"{i:05}.png").hardlink_to(tmp_path / target)
    opened = Counter()
    for module, name in ((check, "read_declared"), (survey, "read_bands"), (survey, "read_mask_values")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda path, *a, real=real, name=name: opened.update([name]) or real(path, *a)
        )
    done = run_command("init", "tiles")
    assert done.returncode == 0
    assert opened["read_bands"] == opened["read_mask_values"] == survey.MAX_READ
    assert opened["read_declared"] == 2 * survey.MAX_HEADERS
    assert "Only a sample was read, evenly spread: 1000 headers, 100 images and 100 masks of tiles." in done.stdout


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
def test_folders_without_tiles_are_refused(tmp_path, arrange, message):
    arrange(tmp_path / "tiles")
    with pytest.raises(DataError, match=message):
        init(tmp_path / "tiles")
    assert not Path("mine.yaml").exists()


def break_all(place):
    for path in (small(place) / "images").iterdir():
        path.write_text("no image")


def test_files_without_weights_are_refused_before_tiles_are_read(tmp_path, monkeypatch):
    small(tmp_path / "tiles")
    monkeypatch.setattr("kdpipe.pipeline.starter.write.survey_root", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but its files are still in use
        torch.jit.script(torch.nn.Conv2d(3, 8, 1)).save(str(tmp_path / "script.pt"))
    with pytest.raises(CheckpointError, match="is a TorchScript archive"):
        init(tmp_path / "tiles", teacher="script.pt")
    (tmp_path / "words.pth").write_text("not weights")
    with pytest.raises(CheckpointError, match="is not a readable checkpoint"):
        init(tmp_path / "tiles", teacher="words.pth")
    assert not Path("mine.yaml").exists()


def test_an_existing_config_is_kept_unless_told_otherwise(tmp_path):
    small(tmp_path / "tiles")
    Path("mine.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="mine.yaml exists already: --overwrite replaces it"):
        init(tmp_path / "tiles")
    assert Path("mine.yaml").read_text() == "mine"
    init(tmp_path / "tiles", overwrite=True)
    assert "name: mine" in Path("mine.yaml").read_text()
    with pytest.raises(ConfigError, match="--out tiles is a folder"):
        init(tmp_path / "tiles", out="tiles", overwrite=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "a"], "expected two names or more"),
        (["--classes", "a,,b"], "expected two names or more"),
        (["--teacher-classes", "a,b,a"], "names a more than once"),
        (["--bands", "1,b"], "expected band numbers"),
        (["--bands", "0,1,2"], "expected band numbers"),
        ([], "Missing argument 'FOLDER...'"),
    ],
)
def test_wrong_options_are_named(arguments, message):
    done = run_command("init", *(["x"] if arguments else []), *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_suggest_map_suggests_rows_that_are_not_filled_in(landscape, teacher_file):
    init(landscape, teacher=teacher_file, classes=CLASSES)
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
