"""docs/maps.md: its numbers and names are those of the program; test_docs.py runs its blocks, test_export.py compares its snippet."""

from pathlib import Path

from kdpipe.data.scenes import SCENE_EXTENSIONS
from kdpipe.pipeline.models.windows import MARGIN
from kdpipe.pipeline.prediction import export
from kdpipe.pipeline.prediction import maps as prediction

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "maps.md").read_text()


def test_names_and_numbers_of_the_page_are_the_programs():
    for suffix in SCENE_EXTENSIONS:
        assert f"`{suffix}`" in PAGE
    for suffix in prediction.SUFFIXES.values():
        assert f"`NAME{suffix}`" in PAGE
    assert f"`--window` px ({prediction.WINDOW_PX}) that share `--overlap` px ({prediction.OVERLAP_PX})" in PAGE
    assert MARGIN == 3 / 8
    assert f"more than {export.MAX_DIFFERENCE:g}" in PAGE
    assert f"opset {export.OPSET}" in PAGE
    assert export.SIZES["pt2"] in PAGE
    assert f"{prediction.GPU_BATCH} on a GPU" in PAGE
