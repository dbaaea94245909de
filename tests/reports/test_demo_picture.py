"""The demo's picture: validation tiles, both students, and the mIoU below each."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scored_tiles import numpy_iou
from PIL import Image

from kdpipe.data.rasters import read_image, read_mask
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline import demo
from kdpipe.pipeline.evaluation.evaluate import evaluate, student_model
from kdpipe.pipeline.pictures import LINE, MARGIN, contact_sheet, paint_classes

CPU = torch.device("cpu")


@pytest.mark.long
def test_the_demos_picture_shows_both_students_with_the_miou_of_each_tile(inside, tmp_path, monkeypatch):
    drawn = {}

    def sheet(rows, titles, names):
        drawn.update(rows=rows, titles=titles)
        return contact_sheet(rows, titles, names)

    monkeypatch.setattr(demo, "contact_sheet", sheet)
    files = [Path(f"model_weights/tests/{name}/last.ckpt") for name in ("tiny", "tiny-none")]
    demo.draw_demo(inside, *files, tmp_path / "demo.png")
    names = [title.split("\n")[0] for title in drawn["titles"]]
    assert names == ["image", "label", "teacher's soft target", "student", "student without a teacher"]
    tile, row = list_tiles(inside.data, "val")[0], drawn["rows"][0]
    image, labels = read_image(tile.image), read_mask(tile.mask, 6, 255)
    for file, title, panel in zip(files, drawn["titles"][3:], row[3:], strict=True):
        model = student_model(file, CPU, tta=None, window=None)
        predicted = model.predict(image).argmax(axis=0)
        np.testing.assert_array_equal(panel.pixels, paint_classes(predicted, 6))
        of_tile = numpy_iou([predicted], [labels])[np.unique(labels[labels != 255])].mean()
        assert panel.caption == f"mIoU {100 * of_tile:.1f}"
        assert title.endswith(f"mIoU of all tiles {100 * evaluate(model).together.scores.miou:.1f}")
    with Image.open(tmp_path / "demo.png") as picture:
        pixels = np.asarray(picture)
    top, (height, width) = MARGIN + 2 * LINE, labels.shape
    np.testing.assert_array_equal(pixels[top : top + height, MARGIN : MARGIN + width], image)
