"""Learning curves as text: their shapes are those of the figures, and their lines fit the terminal."""

import numpy as np
import pytest

from kdpipe.pipeline.reports.terminal.training import HEIGHT, curves_text


def marks(text):
    """Row and column of each mark of the first curve, from its lower left corner, and the rows."""
    rows = [line for line in text.splitlines() if line.startswith("|")][:HEIGHT]
    inner = [line[1 : line.index("|", 1)] for line in rows]
    return {(HEIGHT - 1 - y, x) for y, row in enumerate(inner) for x, mark in enumerate(row) if mark == "+"}, inner


def test_a_curve_rises_with_its_figures_and_shows_its_bounds():
    text = curves_text({"train_loss": {step: 2.0 + step / 1000 for step in range(1, 1001)}}, 60, only_ascii=True)
    found, inner = marks(text)
    width = len(inner[0])
    for y, x in found:
        assert abs(y + 0.5 - HEIGHT * (x + 0.5) / width) <= 1
    assert {x for _, x in found} == set(range(width))
    assert (0, 0) in found
    assert (HEIGHT - 1, width - 1) in found
    lines = text.splitlines()
    assert lines[1].strip() == "train loss"
    assert lines[3].endswith(" 2.99")
    assert lines[2 + HEIGHT].endswith(" 2.02")
    assert lines[-1].split() == ["1", "1000"]


def test_points_are_means_of_steps():
    """Losses that jump between 0 and 2 are drawn as their mean."""
    text = curves_text({"train_loss": {step: 2.0 * (step % 2) for step in range(1, 20_001)}}, 60, only_ascii=True)
    found, _ = marks(text)
    assert len({y for y, _ in found}) <= HEIGHT
    assert " 1.0" in text or "| 1\n" in text
    assert "| 2\n" not in text


def run(steps=500, parts=True):
    rng = np.random.default_rng(0)
    curves = {"train_loss": {step: float(rng.normal(1, 0.3)) * 1e-5 for step in range(1, steps + 1)}}
    curves["train_hard_loss"] = {step: value * 3 for step, value in curves["train_loss"].items()}
    curves["train_kd_loss"] = {step: -value * parts for step, value in curves["train_loss"].items()}
    curves["val_mIoU"] = {step: step / steps for step in range(100, steps + 1, 100)}
    return curves


@pytest.mark.parametrize("width", [32, 40, 49, 50, 80, 120, 300])
@pytest.mark.parametrize("only_ascii", [False, True])
def test_lines_fit_and_are_plain(width, only_ascii):
    text = curves_text(run(), width, only_ascii=only_ascii)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert text.isascii() == only_ascii
    for title in ("train loss", "its part from labels", "its part from soft targets", "validation mIoU"):
        assert text.count(title) == 1
    assert ("train loss" in text.splitlines()[1] and "labels" in text.splitlines()[1]) == (width >= 50)


def test_a_terminal_too_narrow_for_anything_ends_no_run():
    assert "train loss" in curves_text(run(), 5)


def test_no_curve_is_no_text():
    assert curves_text({}, 80) == ""


def test_one_point_nan_and_infinity_end_no_run():
    text = curves_text({"train_loss": {1: 0.5}, "val_mIoU": {1: 0.25}}, 80)
    assert "0.5" in text
    assert "0.25" in text
    gaps = {1: 1.0, 2: float("nan"), 3: float("inf"), 4: 2.0}
    assert curves_text({"train_loss": gaps}, 80) == curves_text({"train_loss": {1: 1.0, 4: 2.0}}, 80)
    assert "mIoU" not in curves_text({"train_loss": {1: 0.5}, "val_mIoU": {1: float("nan")}}, 80)
    assert curves_text({"val_mIoU": {1: float("nan")}}, 80) == ""


def test_without_distillation_the_loss_is_one_curve():
    text = curves_text(run(parts=False), 80)
    assert "its part" not in text
    assert "train loss" in text
    assert "validation mIoU" in text
