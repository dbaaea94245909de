"""`init` works out `data.bands` from the bands that the teacher sees and the images have."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.files import noise, write_tiff
from helpers.first_config import init, write_mask

from kdpipe.configs.errors import ConfigError
from kdpipe.pipeline.starter.yaml import as_plain

PLAIN = {"photometric": "minisblack", "alpha": "no"}


def tiles(root, *bands, dtype=np.uint8, colours=None):
    """A root with an image of each number of bands."""
    for number, count in enumerate(bands):
        values = (noise(64, 64, bands=count, seed=number) | 1).astype(dtype) * (1 if dtype == np.uint8 else 30)
        write_tiff(root / f"Train/images/{number}.tif", values, colours, **({} if colours else PLAIN))
        write_mask(root / f"Train/masks/{number}.png", np.kron([[0, 1], [1, 2]], np.ones((32, 32))))
    return root


@pytest.fixture
def first(teacher_file, monkeypatch):
    """`init` with a teacher that sees this number of bands."""
    from kdpipe.pipeline.starter import write

    inspect = write.inspect_checkpoint

    def run(folder, sees, out="mine.yaml", run=None, **options):
        def seen(path):
            found = inspect(path)
            return replace(found, network=replace(found.network, in_channels=sees), student=run or found.student)

        monkeypatch.setattr(write, "inspect_checkpoint", seen)
        found = init(folder, teacher=teacher_file, out=out, **options)
        return found, as_plain(found.draft.keys)["data"]

    return run


def test_as_many_bands_as_the_teacher_sees_are_taken_in_the_files_order_and_that_is_called_a_guess(first, tmp_path):
    found, data = first(tiles(tmp_path / "t", 4, 4), 4)
    assert (data["bands"], "band_names" in data, found.draft.problems) == ([1, 2, 3, 4], False, [])
    assert "Guess: the teacher sees 4 bands and the images have as many." in Path("mine.yaml").read_text()


def test_infrared_that_files_call_alpha_is_one_of_four_bands_with_names_for_the_others(first, tmp_path):
    found, data = first(tiles(tmp_path / "t", 4, 4, colours=["red", "green", "blue", "alpha"]), 4)
    assert data["bands"] == [1, 2, 3, 4]
    assert data["band_names"] == {"red": 1, "green": 2, "blue": 3}
    assert data["alpha"] == "band"
    assert found.draft.problems == []


def test_more_bands_than_the_teacher_sees_are_asked_and_given(first, tmp_path):
    folder = tiles(tmp_path / "t", 12, 12, dtype=np.uint16)
    found, data = first(folder, 5)
    assert "data.bands" in found.unfilled
    assert "Asked: the 5 bands that the teacher sees, in its order" in found.draft.text
    found, data = first(folder, 5, out="given.yaml", bands=(4, 3, 2, 8, 12))
    assert data["bands"] == [4, 3, 2, 8, 12]
    assert "stretch" in data
    with pytest.raises(ConfigError, match=r"--bands is \[4, 3, 2\], but the teacher sees 5 bands: name as many"):
        first(folder, 5, out="few.yaml", bands=(4, 3, 2))


def test_mixed_folders_are_problems_that_name_an_image(first, tmp_path):
    found, _ = first(tiles(tmp_path / "bands", 4, 3), 4)
    (problem,) = [each for each in found.draft.problems if "bands" in each]
    assert problem.startswith("images have 3 (1 image), 4 (1 image) bands: a run reads the same 4 from all of them")
    assert "bands/Train/images/1.tif" in problem
    folder = tiles(tmp_path / "types", 4)
    write_tiff(folder / "Train/images/9.tif", noise(64, 64, bands=4).astype(np.uint16), **PLAIN)
    found, _ = first(folder, 4, out="types.yaml")
    assert any("uint8 in 1 (such as " in each and "uint16 in 1 (such as " in each for each in found.draft.problems)


def test_too_few_bands_for_the_teacher_are_a_problem(first, tmp_path):
    found, _ = first(tiles(tmp_path / "t", 3, 3), 4)
    assert "the teacher sees 4 bands, and images have 3: give it images with the bands" in found.draft.problems[0]


def test_a_student_as_the_teacher_says_its_bands_itself(first, tmp_path):
    from kdpipe.pipeline.inspection.checkpoint import StudentRun

    run = StudentRun("a/b", "cached", 1, None, None, list("abcdefgh"), "unit", {}, (4, 2, 1))
    _, data = first(tiles(tmp_path / "t", 4, 4), 3, run=run)
    assert data["bands"] == [4, 2, 1]
