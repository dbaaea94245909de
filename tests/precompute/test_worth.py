"""What caching costs and saves is reported from measured seconds, also where it is not worth it."""

import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.doubles import StopAfter

from kdpipe.cache.documents import read_recipe
from kdpipe.cache.storage.base import open_storage
from kdpipe.configs.errors import Interrupted, OutOfMemory
from kdpipe.pipeline import dry_run
from kdpipe.pipeline.dry_run import estimate
from kdpipe.pipeline.precompute.costs import costs_file, read_costs
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.precompute.worth import Worth
from kdpipe.pipeline.reports.terminal.stage_one import estimate_text, precompute_text, worth_lines
from kdpipe.pipeline.reports.terminal.training import training_tables
from kdpipe.pipeline.runs.record import paces_of_other_modes
from kdpipe.pipeline.teacher.frozen import FrozenTeacher
from kdpipe.pipeline.training.loaders import steps_in
from kdpipe.pipeline.training.run import train, with_mode

CPU = torch.device("cpu")


def found(**changes):
    """400 steps, 4 epochs, of 8 samples that show two tiles each: 1 s a step; the teacher 0.5 s a tile, 0.25 s a crop."""
    figures = {
        "precompute_seconds": 100.0, "step_seconds": 1.0, "tile_seconds": 0.5, "crop_seconds": 0.25, "samples_per_step": 8,
        "views_per_sample": 2.0, "steps": 400, "epochs": 4.0,
    }  # fmt: skip
    return Worth(**{**figures, **changes})


def test_the_figures_are_those_worked_out_by_hand():
    it = found()
    assert (it.cached_seconds, it.online_step_seconds, it.crops_step_seconds) == (500, 1 + 8 * 2 * 0.5, 1 + 8 * 0.25)
    # Crops are the cheaper way: 2 s of a step, 200 s of an epoch of 100 steps.
    assert it.paid_after_epochs == 0.5
    assert it.saved_share == 1 - 500 / 1200
    assert it.verdict == it.as_dict()["verdict"] == "yes"
    assert found(tile_seconds=0.01).cheapest_step_seconds == 1 + 8 * 2 * 0.01


@pytest.mark.parametrize(
    ("changes", "verdict", "said"),
    [
        ({}, "yes", "for itself after 0.5 epochs, saves 58.3 % of the time, and takes 3.0 MB"),
        # FTUNetFormer's step is 768 GFLOP a tile, and the teacher's pass 37.
        ({"step_seconds": 2.0, "crop_seconds": 0.25 * 37 / 768, "precompute_seconds": 5.0}, "hardly", "saves 4.0 %"),
        ({"precompute_seconds": 900.0}, "no", "for itself after 4.5 epochs, costs another 8.3 % of the time"),
    ],
)
def test_the_verdict_is_hardly_for_a_heavy_student_and_no_for_a_short_run(changes, verdict, said):
    lines = worth_lines(found(**changes), 3_000_000)
    assert f"worth it? {verdict}: a live teacher takes " in "\n".join(lines)
    assert said in lines[-1]
    assert max(map(len, lines)) <= 80


def slowed(patch, teacher_seconds, student_seconds):
    """Have the teacher take at least so long for a tile, and the student for a step."""
    logits, steps = FrozenTeacher.logits, dry_run.take_steps

    def slow_logits(self, images):
        time.sleep(teacher_seconds)
        return logits(self, images)

    patch.setattr(FrozenTeacher, "logits", slow_logits)
    patch.setattr(dry_run, "take_steps", lambda *arguments: [s + student_seconds for s in steps(*arguments)])


@pytest.mark.long
def test_a_dry_run_measures_a_heavy_student_with_a_light_teacher(make_config, monkeypatch):
    slowed(monkeypatch, 0.0, 30.0)
    forecast = estimate(make_config(), CPU)
    it = forecast.worth
    assert (it.steps, it.epochs, it.samples_per_step, it.views_per_sample) == (6, 2, 2, 1.75)
    assert it.step_seconds > 30
    assert it.verdict in ("hardly", "no")
    assert "worth it? " in estimate_text(forecast)
    assert forecast.as_dict()["worth"]["verdict"] == it.verdict


@pytest.mark.long
def test_a_dry_run_measures_a_light_student_with_a_heavy_teacher(make_config, monkeypatch):
    slowed(monkeypatch, 1.0, 0.0)
    it = estimate(make_config(train__epochs=50), CPU).worth
    assert 0.75 < it.tile_seconds < 1.5  # scaled from the sampled tiles to the mean one
    assert it.crop_seconds > 1
    assert it.verdict == "yes"
    # Six tiles once, or six samples of an epoch.
    assert it.paid_after_epochs == pytest.approx(1, rel=0.3)


def test_max_steps_and_accumulation_count(make_config):
    config = make_config(train__accumulate=3, train__epochs=5)
    assert steps_in(config, per_epoch=6) == 10
    assert steps_in(make_config(train__max_steps=4), per_epoch=3) == 4


def test_a_student_that_does_not_fit_leaves_the_forecast_of_stage_one(make_config, monkeypatch):
    def exhausted(*arguments):
        raise OutOfMemory("out of memory while timing the student")

    monkeypatch.setattr(dry_run, "take_steps", exhausted)
    forecast = estimate(make_config(), CPU)
    assert forecast.bytes > 0
    assert (
        forecast.as_dict()["worth"]
        == "a step of the student cannot be timed here: out of memory while timing the student"
    )
    assert "worth it? a step of the student cannot be timed here" in estimate_text(forecast)
    few = estimate(make_config(train__batch_size=9), CPU)
    assert "an epoch has 6 samples, fewer than train.batch_size 9" in few.worth


def test_nothing_is_timed_where_nothing_is_to_do(make_config, monkeypatch):
    config = make_config()
    summary = precompute(config, CPU)
    # 6 tiles and 6 samples an epoch, that show 1.75 views each; a crop is 64 px.
    assert summary.online_seconds == pytest.approx(summary.teacher_seconds * 1.75)
    assert summary.crops_seconds == pytest.approx(summary.teacher_seconds / summary.pixels * 6 * 64**2)
    assert summary.paid_after_epochs == pytest.approx(summary.seconds / summary.crops_seconds)
    assert summary.as_dict()["paid_after_epochs"] == summary.paid_after_epochs
    said = precompute_text(replace(summary, online_seconds=90.0, crops_seconds=20.0, seconds=50.0))
    live = "1 min 30 s (--kd online: whole tiles) or 20 s (crops alone)"
    assert f"a live teacher would take {live} of each epoch;\nthe cache pays for itself after 2.5 epochs\n" in said
    monkeypatch.setattr(dry_run, "measure_worth", lambda *arguments: pytest.fail("something was timed"))
    assert estimate(config, CPU).worth is None
    assert precompute(config, CPU).paid_after_epochs is None


@pytest.mark.long
def test_a_run_says_what_the_live_teacher_took_and_what_its_other_modes_take(cached, make_config, monkeypatch):
    config = make_config(train__max_steps=4, train__mosaic=0.0, train__val_every_epochs=9)  # 3 of warm-up
    slowed(monkeypatch, 0.2, 0.0)
    online = train(with_mode(config, "online"), CPU)
    assert 2 * 0.2 < online.teacher_seconds_per_step < 3
    assert online.other_modes == {}
    cached = train(config, CPU)
    assert cached.teacher_seconds_per_step is None
    assert list(cached.other_modes) == ["tiny-online"]
    assert cached.other_modes["tiny-online"] > 2 * 0.2
    said = [str(line) for line in training_tables(cached)]
    assert any(line.startswith("step of the same student: ") and line.endswith(" s in tiny-online") for line in said)
    assert any("the live teacher takes" in str(line) for line in training_tables(online))
    assert np.isfinite(cached.losses).all()


def test_a_damaged_run_beside_it_is_no_reason_to_fail_at_the_end(tmp_path):
    for name in ("tiny-online", "tiny-none"):
        (tmp_path / name).mkdir()
    (tmp_path / "tiny-none" / "run.json").write_text("{")
    assert paces_of_other_modes(tmp_path / "tiny", "cached") == {}


@pytest.mark.long
def test_what_interrupted_runs_cost_is_added_up_beside_the_cache(make_config, tmp_path):
    config, stop = make_config(), threading.Event()
    with pytest.raises(Interrupted):
        precompute(config, CPU, StopAfter(2, stop), stop)
    recipe = read_recipe(open_storage(config.cache.path)).digest()
    first = read_costs(config.cache.path, recipe)
    assert 2 <= first.tiles < 6
    last = precompute(config, CPU)
    both = read_costs(config.cache.path, recipe)
    assert (both.tiles, both.seconds) == (6, pytest.approx(first.seconds + last.seconds))
    assert both.teacher_seconds == pytest.approx(first.teacher_seconds + last.teacher_seconds)
    assert both.bytes == first.bytes + last.bytes_written
    precompute(config, CPU)  # nothing to do costs nothing
    assert read_costs(config.cache.path, recipe) == both
    shutil.rmtree(config.cache.path)
    precompute(config, CPU)
    assert read_costs(config.cache.path, recipe).tiles == 6, "what was deleted is not counted again"


@pytest.mark.long
def test_a_run_does_without_the_costs_of_stage_one(make_config):
    config = make_config(train__max_steps=2, train__val_every_epochs=9)
    precompute(config, CPU)
    file = costs_file(config.cache.path)
    intact = file.read_text()
    for damaged in (intact[:40], intact.replace('"recipe_sha256":"', '"recipe_sha256":"0'), None, "a folder"):
        file.unlink()
        if damaged == "a folder":
            file.mkdir()
        elif damaged is not None:
            file.write_text(damaged)
        assert train(config, CPU, overwrite=True).worth is None
        if damaged is None:
            file.touch()
    assert costs_file("s3://bucket/c.zarr") is None


def test_costs_that_cannot_be_written_end_no_run(make_config):
    config = make_config()
    costs_file(config.cache.path).mkdir()
    assert precompute(config, CPU).fingerprint


@pytest.mark.long
def test_a_run_says_what_its_cache_cost_and_saved(make_config):
    config = make_config(train__max_steps=6, train__val_every_epochs=9)
    stage_one = precompute(config, CPU)
    summary = train(config, CPU)
    it = summary.worth
    assert it.precompute_seconds == pytest.approx(stage_one.seconds)
    assert it.step_seconds == summary.seconds_per_step
    assert it.tile_seconds == pytest.approx(stage_one.teacher_seconds / 6)
    assert it.crop_seconds == pytest.approx(stage_one.teacher_seconds / stage_one.pixels * 64**2)
    assert (it.steps, it.epochs, it.samples_per_step) == (6, 2, 2)
    assert summary.cache_bytes == stage_one.bytes_written
    assert summary.as_dict()["worth"]["verdict"] == it.verdict
    said = "\n".join(str(line) for line in training_tables(summary))
    assert f"worth it? {it.verdict}: a live teacher takes " in said
    online = train(with_mode(config, "online"), CPU)
    assert online.worth is None


@pytest.mark.long
def test_a_crop_is_timed_once_its_kernels_are_there(make_config, monkeypatch):
    shapes, soft_targets = [], FrozenTeacher.soft_targets

    def slow_at_first(self, images):
        shapes.append(images.shape)
        if images.shape == (1, 64, 64, 3) and shapes.count(images.shape) == 1:
            time.sleep(3)
        return soft_targets(self, images)

    monkeypatch.setattr(FrozenTeacher, "soft_targets", slow_at_first)
    assert estimate(make_config(), CPU).worth.crop_seconds < 3
    assert (1, 64, 64, 3) in shapes
