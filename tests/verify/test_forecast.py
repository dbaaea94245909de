"""Forecasts: the teacher's lead over students without one, from pixel counts by hand, and the advice that follows."""

import json

import numpy as np
import pytest
import torch
import yaml
from helpers.commands import run_command
from helpers.configs import tiny_config
from helpers.stored_predictions import write_all
from PIL import Image

from kdpipe.configs import dump_config, parse_config
from kdpipe.configs.errors import ConfigError
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.evaluation.evaluate import student_model, teacher_model
from kdpipe.pipeline.reports.terminal.forecast import advice_text
from kdpipe.pipeline.training.run import train, with_mode
from kdpipe.pipeline.verify.forecast import MIN_TILES, Forecast, forecast, scene

NAMES = ["Background", "Forest", "Grassland", "Cropland", "Settlement", "SemiNatural"]


@pytest.fixture(scope="module")
def world(landscape, teacher_file, tmp_path_factory):
    """The config of a tiny teacher and the checkpoints of two students that were trained for a step, one without it."""
    folder = tmp_path_factory.mktemp("forecast")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = tiny_config(landscape, teacher_file, folder, train__epochs=1, train__max_steps=1)
        train(with_mode(config, "none"), torch.device("cpu"))
        train(with_mode(config, "online").model_copy(update={"name": "taught"}), torch.device("cpu"))
    runs = folder / "model_weights" / "tests"
    return config, runs / "tiny-none" / "last.ckpt", runs / "taught" / "last.ckpt"


def iou_by_hand(labels, predicted):
    """IoU of each class that has labels, from pixels."""
    return {
        c: ((labels == c) & (predicted == c)).sum() / ((labels == c) | ((predicted == c) & (labels != 255))).sum()
        for c in range(len(NAMES))
        if (labels == c).any()
    }


def test_leads_are_differences_of_iou_over_the_pixels_of_each_scene(world):
    config, without, _ = world
    found = forecast(config, [without])
    device = torch.device("cpu")
    models = teacher_model(config, device, tta=None, window=None), student_model(without, device, tta=None, window=None)
    tiles = list_tiles(config.data, "val")
    labels = np.concatenate([np.asarray(Image.open(tile.mask)).ravel() for tile in tiles])
    images = [np.array(Image.open(tile.image)) for tile in tiles]
    teacher, student = (
        iou_by_hand(labels, np.concatenate([model.predict(image).argmax(axis=0).ravel() for image in images]))
        for model in models
    )
    (only,) = found.scenes
    assert only.root == config.data.val[0] and only.tiles == len(tiles)
    for c, name in enumerate(NAMES):
        lead = only.classes[name]
        assert (lead.teacher, lead.baseline) == (
            (None, None) if c not in teacher else pytest.approx((teacher[c], student[c]))
        )
    means = np.mean(list(teacher.values())), np.mean(list(student.values()))
    assert (only.miou.teacher, only.miou.baseline, only.miou.lead) == pytest.approx((*means, means[0] - means[1]))


def test_predictions_made_elsewhere_are_a_teacher_too(world, tmp_path):
    config, without, _ = world
    tiles = list_tiles(config.data, "val")
    saved = write_all(tmp_path / "saved", [tile.image for tile in tiles], "classes")
    teacher = {"predictions": str(saved), "are": "classes", "classes": config.teacher.classes}
    raw = yaml.safe_load(dump_config(config)) | {"teacher": teacher}
    found = forecast(parse_config(raw, origin="mine"), [without]).together
    matrix = np.array([[config.class_map[row].get(name, 0) for name in NAMES] for row in config.teacher.classes])
    labels = np.concatenate([np.asarray(Image.open(tile.mask)).ravel() for tile in tiles])
    stored = np.concatenate([np.load(saved / f"{tile.image.stem}.npy").ravel() for tile in tiles])
    for c, iou in iou_by_hand(labels, matrix.argmax(axis=1)[stored]).items():
        assert found.classes[NAMES[c]].teacher == pytest.approx(iou)


def confusion(right, wrong, pixels=100):
    """Counts of a tile of two classes with as many right pixels of each as given; the rest are taken for the other."""
    counts = np.zeros((6, 6), np.int64)
    counts[:2, :2] = [[right, pixels - right], [pixels - wrong, wrong]]
    return counts


def scene_of(config, teacher, baselines):
    """A scene from counts by tile; `baselines` has a list of tiles for each seed."""
    stacked = np.stack([np.stack(tiles) for tiles in baselines], axis=1)
    return scene("here", np.stack(teacher), stacked, config, np.random.default_rng(0))


@pytest.fixture(scope="module")
def config(landscape, teacher_file, tmp_path_factory):
    return tiny_config(landscape, teacher_file, tmp_path_factory.mktemp("config"))


def some(*rights, tiles=12):
    """Tiles of which each has slightly other counts around the given ones."""
    rng = np.random.default_rng(1)
    return [confusion(*(right + int(rng.integers(-5, 6)) for right in rights)) for _ in range(tiles)]


@pytest.mark.parametrize(
    ("teacher", "baselines", "advice", "behind"),
    [
        (some(90, 90), [some(70, 70), some(72, 69)], "distil", []),
        (some(70, 70), [some(90, 90)], "not worth it", ["Background", "Forest"]),
        (some(80, 80), [some(80, 80)], "not worth it", []),
        (some(90, 90), [some(95, 95), some(50, 50)], "cannot tell", []),
        (some(90, 90, tiles=MIN_TILES - 1), [some(60, 60, tiles=MIN_TILES - 1)], "cannot tell", []),
    ],
    ids=["better", "worse", "as good", "seeds disagree", "few tiles"],
)
def test_advice_follows_from_the_lead_and_its_spread_over_tiles_and_seeds(config, teacher, baselines, advice, behind):
    found = scene_of(config, teacher, baselines)
    assert (found.advice, found.behind) == (advice, behind)


def test_a_class_in_which_the_teacher_is_behind_asks_for_care(config):
    """Two classes that are confused with each other share their errors, so a third one is what the teacher is bad at."""

    def with_third(right, tiles):
        for counts in tiles:
            counts[2, 2], counts[2, 3] = right, 100 - right
        return tiles

    found = scene_of(config, with_third(40, some(95, 95)), [with_third(60, some(60, 60))])
    assert (found.advice, found.behind) == ("distil with care", ["Grassland"])
    said = advice_text(Forecast(["x"], [found], found, []))
    assert "behind in Grassland" in said
    assert "distill.class_trust: {Grassland: 0.3}" in said


def test_the_interval_is_the_spread_of_means_over_resampled_tiles(config):
    """A lead that differs from tile to tile: the standard error of the mean of k tiles is that of the tiles over √k."""
    gains = np.linspace(-10, 30, 100).round().astype(int)
    teacher = [confusion(60 + gain, 60 + gain) for gain in gains]
    found = scene_of(config, teacher, [[confusion(60, 60) for _ in gains]])
    expected = 1.96 * gains.std() / np.sqrt(len(gains))  # in correct pixels of each class, of 100
    slope = 2 / (1 + 0.4) ** 2  # of IoU = r / (2 - r) at r = 0.6, where both classes have as many errors
    half = (found.miou.high - found.miou.low) / 2
    assert half == pytest.approx(expected / 100 * slope, rel=0.15)


@pytest.mark.long
def test_another_order_of_channels_is_found_before_anything_else(config, world, landscape, teacher_file, tmp_path):
    """A teacher that is right, but whose classes are listed in another order."""
    right, without, _ = world
    # The student's own predictions as a teacher would be right by chance alone: here the labels are what the teacher says.
    tiles = list_tiles(right.data, "val")
    root = tmp_path / "mine"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    teacher = teacher_model(right, torch.device("cpu"), tta=None, window=None)
    for tile in tiles:
        pixels = np.array(Image.open(tile.image))
        for folder, data in (("images", pixels), ("masks", teacher.predict(pixels).argmax(axis=0).astype(np.uint8))):
            Image.fromarray(data).save(root / folder / f"{tile.id.rpartition('/')[2]}.png")
    assert forecast(right, [without], [str(root)]).advice != "correct the class map"
    wrong = right.model_copy(
        update={"teacher": right.teacher.model_copy(update={"classes": right.teacher.classes[::-1]})}
    )
    found = forecast(wrong, [without], [str(root)])
    assert found.advice == "correct the class map"
    assert "the labels contradict" in advice_text(found)


@pytest.mark.long
def test_the_command_prints_the_advice_and_writes_it(world, tmp_path, monkeypatch):
    config, without, _ = world
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    done = run_command("forecast", "-c", "mine.yaml", without, "--json", "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"Advice: {found['advice']}" in " ".join(done.stdout.split())
    assert found["together"]["miou"]["lead"] == pytest.approx(forecast(config, [without]).together.miou.lead)
    assert "may have seen these scenes" in " ".join(done.stdout.split())


def test_students_that_cannot_be_a_baseline_are_refused(world):
    config, without, taught = world
    with pytest.raises(ConfigError, match=r"was trained with a teacher \(distill.mode online\)"):
        forecast(config, [taught])
    with pytest.raises(ConfigError, match="was trained on .*Train, where it seems better"):
        forecast(config, [without], config.data.train)
    classes = config.classes.model_copy(update={"names": [*NAMES[:5], "Shrubs"]})
    with pytest.raises(ConfigError, match="predicts Background.*train the baseline with this config"):
        forecast(config.model_copy(update={"classes": classes}), [without])
