"""Tiles, pixels and classes that do not count, named in the result; and what cannot be scored, refused by name."""

import re
from dataclasses import replace

import numpy as np
import pytest
from helpers.files import write_image, write_tiff
from helpers.scored_tiles import random_tile, stub, write_tile
from PIL import Image
from rich.console import Console

from kdpipe.configs.errors import ConfigError, DataError, KdpipeError
from kdpipe.pipeline.evaluation.evaluate import evaluate
from kdpipe.pipeline.reports.terminal.scores import evaluation_tables


def text_of(result):
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        for table in evaluation_tables(result):
            console.print(table, highlight=False, soft_wrap=True)
    return capture.get()


def test_a_class_that_is_predicted_but_not_labelled_costs_others_and_is_left_out_by_name(make_config, tmp_path):
    labels = np.zeros((40, 40), int)
    labels[20:] = 1
    predicted = labels.copy()
    predicted[:10] = 3
    write_tile(tmp_path / "A", "t", predicted, labels)
    result = evaluate(stub(make_config(classes__not_scored=["Background"])), [str(tmp_path / "A")])
    scores = result.together.scores
    assert scores.iou["Background"] == 0.5
    assert scores.iou["Cropland"] is None
    assert scores.precision["Cropland"] is scores.recall["Cropland"] is None
    assert scores.miou == 1.0
    assert scores.left_out["Background"] == "not scored"
    assert scores.left_out["Cropland"] == "absent from the labels"
    text = text_of(result)
    assert "left out of the means: Background (not scored), Grassland, Cropland, Settlement" in text
    assert re.search(r"Cropland .* 0\.0 │ +25\.0 │", text)  # labelled, predicted
    assert max(len(line) for line in text.splitlines() if line[0] in "┏┃┡│├└") <= 80


def test_a_tile_without_a_labelled_pixel_changes_no_score_and_is_named(make_config, tmp_path):
    predicted, labels = random_tile(5)
    write_tile(tmp_path / "A", "t1", predicted, labels)
    alone = evaluate(stub(make_config()), [str(tmp_path / "A")])
    write_tile(tmp_path / "A", "t2", predicted, np.full_like(labels, 255))
    both = evaluate(stub(make_config()), [str(tmp_path / "A")])
    assert both.together.scores == alone.together.scores
    assert both.together.boundary == alone.together.boundary
    assert both.together.calibration == alone.together.calibration
    assert (both.together.tiles, both.together.without_label) == (2, ["A/t2"])
    assert "without a labelled pixel: 1 tile (A/t2)" in text_of(both)


def test_tiles_without_a_mask_are_left_out_and_named(make_config, tmp_path):
    for i in range(8):
        write_tile(tmp_path / "A", f"t{i}", *random_tile(i)[:1], random_tile(i)[1] if i == 0 else None)
    result = evaluate(stub(make_config()), [str(tmp_path / "A")])
    assert result.together.tiles == 1
    assert result.roots[0].without_mask == [f"A/t{i}" for i in range(1, 8)]
    assert "left out, as they have no mask: 7 tiles (A/t1, A/t2, A/t3, A/t4, A/t5 and 2 more)" in text_of(result)


def test_tiles_that_the_student_was_trained_on_are_said_to_be_so(make_config):
    config = make_config()
    blind = stub(config, lambda image: np.zeros(image.shape[:2], int))
    result = evaluate(blind, [*config.data.train, *config.data.val])
    assert [root.trained_on for root in result.roots] == [True, False]
    assert text_of(result).count("the student was trained on some of these tiles") == 2  # that root, and all together


def same(labels):
    return labels


@pytest.mark.parametrize(
    ("labels_of", "roots", "probability", "error", "message"),
    [
        (lambda labels: np.full_like(labels, 255), ["A"], 0.9, DataError,
         "A has nothing to score in its 1 tile with a mask: Background absent from the labels, Forest"),
        (lambda labels: None, ["A"], 0.9, DataError,
         "none of the 1 image of .*A has a mask: scores need .*A/masks, with masks named like the images"),
        (lambda labels: labels[:-1], ["A"], 0.9, DataError,
         r"the mask .*t\.png is 39 x 53 px, but its image .*t\.png is 40 x 53"),
        (same, ["C"], 0.9, DataError, "there is no folder .*C, which data names as a root of tiles"),
        (same, ["A", "B/../A"], 0.9, ConfigError, "A is given twice: its tiles would count twice"),
        (same, [], 0.9, ConfigError, "nothing to evaluate on: name a ROOT, .*, as data.val names none"),
        (same, ["A"], np.nan, KdpipeError, "a stub predicts A/t with numbers that are not finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused_by_name(make_config, tmp_path, labels_of, roots, probability, error, message):
    predicted, labels = random_tile(1)
    write_tile(tmp_path / "A", "t", predicted, labels_of(labels))
    model = stub(make_config(data__val=[]), probability=probability)
    with pytest.raises(error, match=message):
        evaluate(model, [f"{tmp_path}/{root}" for root in roots])


def test_files_that_cannot_be_right_are_refused_before_anything_is_predicted(make_config, tmp_path):
    for i in range(3):
        write_tile(tmp_path / "A", f"t{i}", *random_tile(i))
    predicted = []
    model = stub(make_config())
    model = replace(model, predict=lambda image: predicted.append(1) or stub(make_config()).predict(image))
    assert evaluate(model, [str(tmp_path / "A")]).together.tiles == len(predicted) == 3
    predicted.clear()
    labels = random_tile(2)[1]
    (tmp_path / "A/masks/t2.png").unlink()
    write_tiff(tmp_path / "A/masks/t2.tif", labels[None].astype(np.uint8), compress="jpeg")
    with pytest.raises(
        DataError, match=r"the mask .*t2\.tif is compressed as JPEG with loss, which alters class indices"
    ):
        evaluate(model, [str(tmp_path / "A")])
    assert predicted == []


def test_an_image_that_is_cut_off_is_an_error_that_names_it(make_config, tmp_path):
    write_tile(tmp_path / "A", "t", *random_tile(1))
    write_image(tmp_path / "A" / "images" / "u.png", 40, 53)
    Image.fromarray(np.zeros((40, 53), np.uint8)).save(tmp_path / "A" / "masks" / "u.png")
    file = tmp_path / "A" / "images" / "u.png"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"cannot read .*u\.png, which is damaged"):
        evaluate(stub(make_config()), [str(tmp_path / "A")])
