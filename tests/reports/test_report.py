"""The report of a run: scores as in evaluate, pictures of the tiles, and notes on what is missing."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.reference_teacher import teacher_logits
from PIL import Image

from kdpipe.cache import SoftTargetCache
from kdpipe.configs.errors import CheckpointError, DataError
from kdpipe.data.rasters import read_image, read_mask
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.commands.main import cli
from kdpipe.pipeline.evaluation.evaluate import evaluate, student_model
from kdpipe.pipeline.pictures import RIGHT, UNJUDGED, WRONG, colours, paint_classes
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.reports.html.charts import (
    MAX_POINTS,
    Interval,
    class_map_figure,
    confusion_table,
    interval_chart,
    line_chart,
    pixels_text,
)
from kdpipe.pipeline.reports.html.run import report_run
from kdpipe.pipeline.reports.html.tiles import SHOWN_PX, draw_tile, heat_colours, spread
from kdpipe.pipeline.runs.record import read_run, write_run
from kdpipe.pipeline.training.run import train

CPU = torch.device("cpu")
RUN = "model_weights/tests/tiny"


def pixels(url):
    """The picture in a data URL, uint8 `(H, W, 3)`."""
    kind, content = url.split(",", 1)
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


@pytest.mark.long
def test_scores_are_those_of_evaluate(inside):
    report = report_run(RUN, CPU, tiles=2)
    expected = evaluate(student_model(f"{RUN}/best.ckpt", CPU, tta=None, window=None))
    np.testing.assert_array_equal(report.evaluation.together.confusion_LP, expected.together.confusion_LP)
    assert report.evaluation.as_dict() == expected.as_dict()


def test_layers_of_a_training_tile_are_its_image_label_target_and_predictions(inside):
    report = report_run(RUN, CPU, tiles=4)
    assert [tile.group for tile in report.tiles] == ["validation tile"] * 2 + ["training tile"] * 2
    shown = report.tiles[-1]
    tile = next(tile for tile in list_tiles(inside.data, "train") if tile.id == shown.tile)
    image, labels = read_image(tile.image), read_mask(tile.mask, 6, 255)
    target = SoftTargetCache.open(inside.cache.path).read(tile.id)
    predicted = student_model(f"{RUN}/best.ckpt", CPU, tta=None, window=None).predict(image).argmax(axis=0)
    assert list(shown.layers) == ["image", "label", "soft target", "entropy", "student", "errors"]
    assert (shown.height, shown.width) == labels.shape

    np.testing.assert_array_equal(pixels(shown.layers["label"]), paint_classes(labels, 6))
    np.testing.assert_array_equal(pixels(shown.layers["student"]), paint_classes(predicted, 6))
    errors = np.where((labels == predicted)[..., None], RIGHT, WRONG)
    errors[labels == 255] = UNJUDGED
    np.testing.assert_array_equal(pixels(shown.layers["errors"]), errors)
    # Compressed with loss, and still the same picture.
    assert np.abs(pixels(shown.layers["image"]).astype(int) - image).mean() < 8
    blended = np.einsum("chw,cr->hwr", target, colours(6))
    assert np.abs(pixels(shown.layers["soft target"]) - blended).mean() < 8
    entropy = -(target * np.log(np.maximum(target, 1e-30))).sum(axis=0)
    scale = np.array(heat_colours(256))
    expected = scale[np.clip(entropy / math.log(6) * 256, 0, 255).astype(int)]
    assert np.abs(pixels(shown.layers["entropy"]).astype(int) - expected).mean() < 8

    labelled = labels != 255
    assert shown.figures == pytest.approx(
        {
            "% right": 100 * (labels == predicted)[labelled].mean(),
            "% as the teacher": 100 * (target.argmax(axis=0) == predicted).mean(),
            "nats of entropy": entropy.mean(),
        },
        rel=1e-4,
    )


@pytest.mark.long
def test_validation_tiles_have_a_target_where_the_teacher_predicts_them(inside):
    without, live = report_run(RUN, CPU, tiles=2), report_run(RUN, CPU, tiles=2, teacher=True)
    assert "soft target" not in without.tiles[0].layers
    assert "Validation tiles have no soft target here" in without.notes[0]
    assert live.notes == []
    logits = teacher_logits(inside.teacher.checkpoint, read_image(list_tiles(inside.data, "val")[0].image))
    assert inside.distill.temperature == 2
    target = np.sqrt(torch.softmax(logits, dim=0).permute(1, 2, 0).numpy() @ inside.class_map_matrix())
    target /= target.sum(axis=2, keepdims=True)
    entropy = -(target * np.log(target)).sum(axis=2).mean()
    assert live.tiles[0].figures["nats of entropy"] == pytest.approx(entropy, abs=1e-5)
    blended = target @ colours(6)
    assert np.abs(pixels(live.tiles[0].layers["soft target"]) - blended).mean() < 8


@pytest.mark.long
def test_a_run_whose_cache_is_gone_or_another_shows_validation_tiles_and_says_so(inside, tmp_path):
    run = read_run(RUN)
    for used, why in (
        ({"path": str(tmp_path / "gone.zarr")}, "No soft targets: .*gone.zarr"),
        (
            {"fingerprint": "f" * 64},
            r"No soft targets: .* now has the fingerprint \w+, and the run was trained from f{64}",
        ),
    ):
        folder = tmp_path / why[-3:]
        folder.mkdir(parents=True)
        (folder / "best.ckpt").symlink_to(f"{trained_folder(inside)}/{RUN}/best.ckpt")
        write_run(folder, run.model_copy(update={"cache": run.cache.model_copy(update=used)}))
        report = report_run(folder, CPU, tiles=24)
        assert [tile.group for tile in report.tiles] == ["validation tile"] * 2
        assert re.match(why, report.notes[0])
        assert "No losses by step" in report.notes[-1]


def trained_folder(config):
    return config.cache.path.rsplit("/", 1)[0]


def test_a_run_without_a_teacher_shows_no_soft_target(inside, tmp_path):
    run = read_run(RUN).model_copy(update={"mode": "none", "cache": None})
    (tmp_path / "best.ckpt").symlink_to(f"{trained_folder(inside)}/{RUN}/best.ckpt")
    write_run(tmp_path, run)
    report = report_run(tmp_path, CPU, tiles=1)
    assert report.notes[0] == "No soft targets: the run was trained without a teacher."
    assert set(report.tiles[0].layers) == {"image", "label", "student", "errors"}


@pytest.mark.long
def test_recorded_views_are_shown_in_the_place_of_tiles(make_config):
    config = make_config(distill__teacher_view="crop", cache__views=2, train__epochs=1, train__max_steps=1)
    precompute(config, CPU)
    train(config, CPU)
    tile = report_run(RUN, CPU, tiles=4).tiles[-1]
    assert (tile.group, tile.height, tile.width) == ("recorded view", 64, 64)
    assert "soft target" in tile.layers


def test_a_tile_without_labels_has_no_errors_and_a_large_one_is_scaled():
    image = np.zeros((300, 1500, 3), np.uint8)
    target = np.full((3, 300, 1500), 1 / 3, np.float32)
    shown = draw_tile("t", "tile", image, 3, target_CHW=target, predictions={"": np.zeros((300, 1500), int)})
    assert list(shown.layers) == ["image", "soft target", "entropy", "student"]
    assert {pixels(url).shape for url in shown.layers.values()} == {(102, SHOWN_PX, 3)}
    assert shown.figures["nats of entropy"] == pytest.approx(math.log(3), rel=1e-5)


def test_tiles_are_spread_over_the_list():
    assert spread(list("abcdefghijk"), 3) == ["a", "f", "k"]
    assert spread([1, 2], 24) == [1, 2]
    assert spread([1, 2, 3], 0) == []
    assert spread([1, 2, 3], 1) == [1]


def test_long_lines_are_averaged_and_described_for_screen_readers():
    points = [(step, 1.0 if step % 2 else 3.0) for step in range(10 * MAX_POINTS)]
    text = line_chart("Loss", {"total": points}, "steps", "loss")
    drawn = re.search(r'points="([^"]+)"', text)[1].split()
    assert len(drawn) == MAX_POINTS
    assert len({place.split(",")[1] for place in drawn}) == 1  # the mean of ones and threes everywhere
    assert 'aria-label="Loss, loss against steps. total: 2 at 4.5, 2 at 2994.5"' in text


def test_a_flat_line_and_a_single_point_can_be_drawn():
    for points in ([(5, 0.5)], [(5, 0.0), (6, 0.0)], [(5, -1.0), (9, -1.0)]):
        text = line_chart("x", {"a": points}, "steps", "y")
        assert "nan" not in text
        assert "inf" not in text


def test_intervals_are_drawn_to_scale_and_a_single_seed_has_none():
    rows = {"mean": {"kd": Interval(2.0, 1.0, 3.0)}, "Forest": {"kd": Interval(-1.0)}}
    text = interval_chart("Difference", rows, "points")
    ticks = {float(tick): float(x) for x, tick in re.findall(r'<text x="([\d.]+)" [^>]*>([-\d.]+)</text>', text)}
    (first, at_first), *_, (last, at_last) = ticks.items()
    low, high = re.search(r'class="line" style[^>]* x1="([\d.]+)" x2="([\d.]+)"', text).groups()
    mean, single = re.findall(r'<circle[^>]* cx="([\d.]+)"', text)
    values = np.interp([float(x) for x in (low, high, mean, single)], [at_first, at_last], [first, last])
    assert values == pytest.approx([1, 3, 2, -1], abs=0.02)
    assert 'aria-label="Difference, points. mean, kd: +2.0 (+1.0 to +3.0); Forest, kd: -1.0"' in text


def test_confusion_cells_are_shares_of_their_row():
    text = confusion_table("c", np.array([[3, 1], [0, 0]]), ["A", "B"])
    assert (
        '<td style="--share:0.7500">75.0<small>3</small></td><td style="--share:0.2500">25.0<small>1</small></td>'
        in text
    )
    assert '<th scope="row">B</th><td>–</td><td>–</td>' in text
    assert [pixels_text(n) for n in (0, 999, 4100, 1_320_000)] == ["0", "999", "4.1 k", "1.32 M"]


def test_ribbons_of_the_class_map_have_the_classes_colours_and_are_as_high_as_their_shares():
    shares = np.array([[1, 0, 0], [0, 0.75, 0.25]], np.float32)
    text = class_map_figure(shares, ["Tree", "Range"], ["A", "B", "C"])
    ribbons = re.findall(r'fill="(rgb[^"]+)" d="M\d+ ([\d.]+)C[^V]*? \d+ ([\d.]+)V([\d.]+)C', text)
    heights = [(colour, round(float(bottom) - float(top), 1)) for colour, _, top, bottom in ribbons]
    expected = [f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in colours(3)]
    assert heights == list(zip(expected, [26.0, 19.5, 6.5], strict=True))
    assert "Tree: A 1; Range: B 0.75, C 0.25" in text


class Checked(HTMLParser):
    """Tags in order with their attributes, each closed where it has to be."""

    VOID = frozenset({"meta", "img", "input", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.long
def test_the_command_writes_a_page_of_several_runs_and_json(inside, tmp_path):
    page, result = tmp_path / "two.html", tmp_path / "two.json"
    done = CliRunner().invoke(
        cli,
        ["report", RUN, f"{RUN}-none", "--tiles", "2", "--out", str(page), "--json", str(result)],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    content = json.loads(result.read_text())
    miou = content["runs"][0]["evaluation"]["together"]["scores"]["miou"]
    assert f"tiny: mIoU {100 * miou:.1f} %" in done.output
    text = page.read_text()
    assert f">{100 * miou:.1f}<" in text
    checked = Checked(text)
    headings = [tag for tag, _ in checked.tags if tag in ("h1", "h2")]
    assert headings[:3] == ["h1", "h2", "h2"]
    assert "One seed proves nothing" in text
    section = text[text.index('id="run-1"') :]
    places = [section.index(part) for part in ('class="figures"', ">Tiles</h3>", ">Curves</h3>", ">Classes</h3>")]
    assert places == sorted(places)  # tiles come second, after the scores
    ids = [attrs["id"] for _, attrs in checked.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs["href"] for tag, attrs in checked.tags if tag == "a"}
    assert links == {"#run-1", "#run-2"} <= {f"#{name}" for name in ids}
    assert all(attrs["src"].startswith("data:") for _, attrs in checked.tags if "src" in attrs)
    assert not re.search(r"https?:|url\(|@import", text)
    assert len(text) < 400_000


@pytest.mark.parametrize(
    ("missing", "error", "message"),
    [("run.json", DataError, "no run in"), ("best.ckpt", CheckpointError, r"no best\.ckpt in /.*, only run\.json")],
)
def test_what_is_no_run_is_refused(inside, tmp_path, missing, error, message):
    for name in {"run.json", "best.ckpt"} - {missing}:
        (tmp_path / name).symlink_to(f"{trained_folder(inside)}/{RUN}/{name}")
    with pytest.raises(error, match=message):
        report_run(tmp_path, CPU)
