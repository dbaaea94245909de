"""Pictures in TensorBoard: soft target, entropy, the student and its errors; writing them changes nothing in a run."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import assert_same_weights, weights
from PIL import Image
from scipy.stats import entropy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdpipe.data.dataset import TrainTiles, ValTiles
from kdpipe.data.recorded_views import RecordedViews
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.training import logs
from kdpipe.pipeline.training.loaders import OnlineTargets
from kdpipe.pipeline.training.logs import BoardPictures
from kdpipe.pipeline.training.run import train
from kdpipe.pipeline.training.targets import open_fresh_cache

CPU = torch.device("cpu")
# Okabe and Ito's, as of https://jfly.uni-koeln.de/color/, from black to vermillion and reddish purple.
COLOURS = np.array([(0, 0, 0), (0, 158, 115), (240, 228, 66), (230, 159, 0), (213, 94, 0), (204, 121, 167)])
GIVEN = {"1 image", "2 label", "3 soft target", "4 entropy of the soft target"}
PREDICTED = {"5 student", "6 student, soft", "7 errors"}


class Writer:
    """A `SummaryWriter` that keeps pictures as `(H, W, 3)`, by tag and step."""

    def __init__(self):
        self.pictures = {}

    def add_image(self, tag, picture, step, dataformats="CHW"):
        assert picture.dtype == np.uint8
        shown = picture if dataformats == "HWC" else picture.transpose(1, 2, 0)
        assert self.pictures.setdefault(tag, {}).setdefault(step, shown) is shown, "written twice"

    def titles(self, name):
        return {tag.split("/")[1] for tag in self.pictures if tag.startswith(f"{name}/")}


class SoftTargets:
    """Soft targets that differ from pixel to pixel."""

    def read(self, tile_id, window):
        _, _, height, width = window
        return np.random.default_rng(5).dirichlet(np.ones(6) / 2, (height, width)).astype(np.float32).transpose(2, 0, 1)

    def entropy_error(self, tile_id, window):
        return 0.0

    def read_view(self, view_id, image_3HW, inside_HW):
        return self.read(view_id, (0, 0, *inside_HW.shape)), 0.0


class Student(torch.nn.Module):
    """Predicts from the colour of each pixel alone; its output is random in training mode."""

    def forward(self, x):
        scores = torch.cat([x, x.flip(1) * 1.5], dim=1)
        return scores + 9 * torch.rand_like(scores) if self.training else scores


def shown(config, source=None, views=None, steps=(1,)):
    tiles = list_tiles(config.data, "train", labelled_only=source is None and views is None)
    dataset = TrainTiles(tiles, config, None, source) if views is None else RecordedViews(tiles, config, None, views)
    val = list_tiles(config.data, "val") if config.data.val else []
    pictures = BoardPictures(config, dataset, ValTiles(val, config), max(steps))
    writer, student = Writer(), Student()
    for step in steps:
        pictures.show(writer, student, CPU, step)
    return writer, dataset, val


def test_pictures_are_those_of_the_samples(make_config, landscape):
    config = make_config(
        data__unlabelled=[str(landscape / "Unlabelled")],
        distill__temperature=3.0,
        train__mosaic=0.0,
        train__scales=[0.5],  # crops are larger than tiles then
    )
    writer, dataset, val = shown(config, SoftTargets())
    names = [tile.id.replace("/", " ") for tile in (dataset.tiles[0], dataset.tiles[-1], val[0], val[-1])]
    assert [writer.titles(name) for name in names] == [
        GIVEN | PREDICTED,
        (GIVEN - {"2 label"}) | (PREDICTED - {"7 errors"}),  # without a mask
        {"1 image", "2 label"} | PREDICTED,
        {"1 image", "2 label"} | PREDICTED,
    ]
    assert len({tag.split("/")[0] for tag in writer.pictures}) == 5 + 1, "three, two, and the legend"
    sample, name = dataset[0], names[0]
    assert not sample["inside"].all()
    found = {title: writer.pictures[f"{name}/{title}"][1] for title in GIVEN | PREDICTED}
    np.testing.assert_array_equal(found["1 image"], sample["image"].transpose(1, 2, 0))
    target, inside, mask = sample["target"], sample["inside"], sample["mask"]
    logits = Student().eval()(normalised(sample["image"]))[0].numpy()
    softened = np.exp(logits / 3.0) / np.exp(logits / 3.0).sum(axis=0)
    predicted = logits.argmax(axis=0)
    for y, x in np.random.default_rng(0).integers(0, 64, (200, 2)):
        if not inside[y, x]:
            for title in found.keys() - {"1 image"}:
                assert found[title][y, x].tolist() == [255, 255, 255], title
            continue
        blend = sum(target[c, y, x] * COLOURS[c] for c in range(6))
        np.testing.assert_allclose(found["3 soft target"][y, x], blend, atol=0.51)
        grey = 255 * entropy(target[:, y, x].astype(np.float64)) / np.log(6)
        np.testing.assert_allclose(found["4 entropy of the soft target"][y, x], [grey] * 3, atol=0.51)
        assert found["2 label"][y, x].tolist() == (COLOURS[mask[y, x]].tolist() if mask[y, x] < 6 else [255] * 3)
        assert found["5 student"][y, x].tolist() == COLOURS[predicted[y, x]].tolist()
        blend = sum(softened[c, y, x] * COLOURS[c] for c in range(6))
        np.testing.assert_allclose(found["6 student, soft"][y, x], blend, atol=0.6)
        judged = [38, 50, 56] if predicted[y, x] == mask[y, x] else [255, 99, 110]
        assert found["7 errors"][y, x].tolist() == (judged if mask[y, x] < 6 else [150] * 3)


def normalised(image):
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    scaled = (image / 255 - mean[:, None, None]) / std[:, None, None]
    return torch.from_numpy(scaled.astype(np.float32))[None]


def test_without_distillation_there_is_no_soft_target_and_nothing_fails(make_config):
    writer, dataset, _ = shown(make_config(distill__mode="none"))
    assert writer.titles(dataset.tiles[0].id.replace("/", " ")) == {"1 image", "2 label"} | PREDICTED


def test_the_soft_target_of_a_recorded_view_is_shown(make_config):
    config = make_config(distill__teacher_view="crop", cache__views=2, data__val=[])
    writer, dataset, _ = shown(config, views=SoftTargets())
    tag = f"{dataset.tiles[0].id.replace('/', ' ')}/3 soft target"
    expected = np.einsum("chw,cr->hwr", SoftTargets().read_view("", None, np.ones((64, 64)))[0], COLOURS)
    inside = dataset[0]["inside"]
    np.testing.assert_allclose(writer.pictures[tag][1][inside], expected[inside], atol=0.51)


def test_pictures_are_the_middle_of_large_crops(make_config, monkeypatch):
    monkeypatch.setattr(logs, "SIDE_PX", 20)
    writer, dataset, val = shown(make_config(), SoftTargets())
    for number, tiles in ((0, dataset.tiles), (0, val)):
        assert writer.pictures[f"{tiles[number].id.replace('/', ' ')}/1 image"][1].shape == (20, 20, 3)
    crop = dataset[0]["image"].transpose(1, 2, 0)
    name = dataset.tiles[0].id.replace("/", " ")
    np.testing.assert_array_equal(writer.pictures[f"{name}/1 image"][1], crop[22:42, 22:42])


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(1, 101), [1, *range(10, 101, 10)]),
        (range(7, 8), [7]),
        ((3, 6, 6), [3, 6]),
        (range(500, 1001, 125), [500, 625, 750, 875, 1000]),
        (range(18, 793, 18), [18, 90, 162, 252, 324, 396, 486, 558, 648, 720, 792]),  # 396 is exactly five tenths
    ],
)
def test_a_run_is_shown_at_its_first_validation_each_tenth_and_its_end(make_config, steps, expected):
    writer, dataset, _ = shown(make_config(), SoftTargets(), steps=steps)
    name = dataset.tiles[0].id.replace("/", " ")
    assert list(writer.pictures[f"{name}/5 student"]) == expected
    assert list(writer.pictures[f"{name}/3 soft target"]) == expected[:1], "what does not change is written once"


def generators():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


def test_showing_draws_no_random_number(make_config):
    before = generators()
    shown(make_config(train__photometric=1.0, train__mosaic=1.0), SoftTargets())
    assert generators() == before


def test_a_run_logs_them_and_its_numbers_are_those_of_a_run_without(cached, small_student, monkeypatch):
    config = cached
    with_pictures = train(config, CPU)
    events = EventAccumulator("lightning_logs/tests/tiny/version_0", size_guidance={"images": 0})
    events.Reload()
    tiles = list_tiles(config.data, "train")
    cache = open_fresh_cache(config, tiles, None)
    sample = TrainTiles(tiles, config, None, cache)[0]
    name = tiles[0].id.replace("/", " ")
    (given,) = events.Images(f"{name}/3 soft target")
    assert given.step == 3
    painted = np.asarray(Image.open(io.BytesIO(given.encoded_image_string)))
    y, x = np.argwhere(sample["inside"])[77]
    blend = sum(sample["target"][c, y, x] * COLOURS[c] for c in range(6))
    np.testing.assert_allclose(painted[y, x], blend, atol=0.51)
    assert [image.step for image in events.Images(f"{name}/5 student")] == [3, 6]
    assert "classes" in events.Tags()["images"]
    assert len(list(Path("lightning_logs/tests/tiny/version_0").glob("events*"))) == 1

    monkeypatch.setattr(BoardPictures, "show", lambda *args: None)
    plain = train(config.model_copy(update={"name": "plain"}), CPU)
    assert with_pictures.losses == plain.losses
    assert with_pictures.final == plain.final
    assert_same_weights(weights(), weights("plain"))


def test_a_live_teachers_time_for_pictures_is_no_part_of_a_step(make_config, small_student, monkeypatch):
    asked = []
    ask = OnlineTargets._ask

    def noted(self, image, noun):
        before = self.teacher_seconds
        answer = ask(self, image, noun)
        asked.append((id(self), self.teacher_seconds - before))
        return answer

    monkeypatch.setattr(OnlineTargets, "_ask", noted)
    config = make_config(distill__mode="online", data__val=[], train__max_steps=1, train__mosaic=0.0)
    summary = train(config, CPU)
    of_steps = [seconds for source, seconds in asked if source == asked[0][0]]
    assert (len(of_steps), len(asked)) == (2, 2 + 3)  # a batch of two, and three pictures
    assert summary.teacher_seconds_per_step == pytest.approx(sum(of_steps))
