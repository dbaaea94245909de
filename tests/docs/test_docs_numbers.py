"""Names and numbers in the prose of the docs are the program's; test_docs.py runs the pages' blocks."""

import pytest
from helpers.docs_pages import blocks, page_text, with_snippet

from kdpipe.configs import load_config
from kdpipe.data.scenes import SCENE_EXTENSIONS
from kdpipe.pipeline.models.windows import MARGIN
from kdpipe.pipeline.prediction import cutting, export, maps
from kdpipe.pipeline.reports.html import run as report
from kdpipe.pipeline.reports.html import tiles
from kdpipe.pipeline.reports.terminal import training as curves
from kdpipe.pipeline.runs import resumable
from kdpipe.pipeline.training import logs

TEACHER_SNIPPETS = [block.text for block in blocks("docs/teachers.md") if block.language == "yaml"]


def prose(page):
    return " ".join(page_text(page).split())


def test_names_and_numbers_of_maps():
    page = prose("docs/maps.md")
    for suffix in SCENE_EXTENSIONS:
        assert f"`{suffix}`" in page
    for suffix in maps.SUFFIXES.values():
        assert f"`NAME{suffix}`" in page
    assert f"`--window` px ({cutting.WINDOW_PX}) that share `--overlap` px ({cutting.OVERLAP_PX})" in page
    assert MARGIN == 3 / 8
    assert f"more than {export.MAX_DIFFERENCE:g}" in page
    assert f"opset {export.OPSET}" in page
    assert export.SIZES["pt2"] in page
    assert f"{maps.GPU_BATCH} on a GPU" in page


def test_layers_keys_and_numbers_of_reports():
    page = prose("docs/report.md")
    for layer in tiles.LAYERS:
        assert f"`{layer}`" in page
    assert f"`--tiles N` ({report.SHOWN_TILES})" in page
    assert f"at most {tiles.SHOWN_PX} px a side" in page
    for key in ("←", "→", "N", "P", "Esc", "Shift"):
        assert f"`{key}`" in page
        assert f"<kbd>{key}</kbd>" in tiles.VIEWER


def test_numbers_curves_and_keys_of_training():
    page = prose("docs/training.md")
    assert f"at most {logs.SIDE_PX} px a side" in page
    assert f"up to {2 * curves.LARGEST_WIDTH + curves.GAP} characters (set `COLUMNS`" in page
    assert logs.PICTURES_A_RUN == 10
    assert logs.TRAIN_SHOWN + logs.VAL_SHOWN == 5
    assert ", ".join(f"`{key}`" for key in resumable.RESUMABLE_KEYS) in page
    for title in curves.TITLES.values():
        assert title.replace("train loss", "training loss") in page, title


@pytest.mark.parametrize("snippet", TEACHER_SNIPPETS, ids=[f"snippet {i}" for i in range(len(TEACHER_SNIPPETS))])
def test_snippets_of_teachers_change_something_or_are_the_guides(snippet):
    guide = load_config("biodiversity/ftunetformer_kd")
    same = "checkpoint: pretrain_weights/u-" in snippet and "teachers:" not in snippet
    assert (with_snippet(snippet) == guide) == same


def test_teachers_has_a_snippet_for_each_topic():
    assert len(TEACHER_SNIPPETS) == 12


def test_nine_channels_of_teachers_are_shipped_as_they_are():
    shipped = load_config("biodiversity/ftunetformer_kd_openearthmap")
    config = with_snippet(next(text for text in TEACHER_SNIPPETS if "drop_channels: [0]" in text))
    assert (config.members, config.class_map) == (shipped.members, shipped.class_map)
