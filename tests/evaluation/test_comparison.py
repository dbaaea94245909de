"""Comparisons: arms paired by seed at the last step, with the interval that the number of seeds allows."""

import io
import json
import math
import re

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from scipy import stats

from kdpipe.configs.errors import DataError
from kdpipe.pipeline.commands.main import cli
from kdpipe.pipeline.evaluation.compare import compare
from kdpipe.pipeline.evaluation.differences import MEAN, paired_difference
from kdpipe.pipeline.reports.html.comparison import write_comparison
from kdpipe.pipeline.reports.plots import draw_comparison
from kdpipe.pipeline.reports.terminal.comparison import comparison_tables
from kdpipe.pipeline.runs.record import CacheUsed, Run, Validation, read_run, write_run


def run(name, seed, mious, mode="cached", fingerprint="f" * 64, seconds=1.0, **config):
    """A run of 100 steps a validation, with two classes whose mean is the mIoU."""
    history = [
        Validation(steps=100 * (i + 1), seconds=seconds * 100 * (i + 1), miou=m, overall_accuracy=m,
                   iou={"Forest": m + 0.1, "Water": m - 0.1, "Ice": None})
        for i, m in enumerate(mious)
    ]  # fmt: skip
    settings = {"name": name, "seed": seed, "distill": {"mode": mode, "alpha": 0.7}, "data": {"val": ["v"]}}
    settings |= {"classes": {"not_scored": []}, "cache": {"path": "c.zarr"}, **config}
    cache = CacheUsed(path="c.zarr", fingerprint=fingerprint, tiles=36) if mode == "cached" else None
    return Run(name=name, seed=seed, mode=mode, device="cpu", total_steps=100 * len(mious), config=settings,
               cache=cache, libraries={"torch": "2.9"}, history=history)  # fmt: skip


def study():
    """Three seeds of an arm with and one without teacher; seed 1 is a bad one for both."""
    alone = {1: 0.30, 2: 0.40, 3: 0.41}
    taught = {1: 0.33, 2: 0.41, 3: 0.46}
    return [run(f"kd-s{seed}", seed, [0.2, m], seconds=1.2) for seed, m in taught.items()] + [
        run(f"plain-s{seed}", seed, [0.1, m], mode="none") for seed, m in alone.items()
    ]


def test_the_difference_is_paired_by_seed_with_students_interval():
    comparison = compare(study())
    baseline, kd = comparison.arms
    assert (baseline.label, kd.label) == ("plain", "kd")
    found = kd.differences[MEAN]
    values = np.array([0.03, 0.01, 0.05])
    # The t table's 97.5 % quantile for 2 degrees of freedom.
    half = 4.302652729911275 * values.std(ddof=1) / math.sqrt(3)
    np.testing.assert_allclose([found.mean, found.low, found.high], [0.03, 0.03 - half, 0.03 + half])
    assert kd.differences["Forest"].by_seed == pytest.approx({1: 0.03, 2: 0.01, 3: 0.05})
    assert "Ice" not in kd.differences
    low, high = stats.ttest_1samp(values, 0).confidence_interval()
    np.testing.assert_allclose([found.low, found.high], [low, high])


def test_one_seed_has_no_interval_and_unpaired_seeds_do_not_count():
    found = paired_difference({1: 0.5, 2: 0.9, 3: None}, {1: 0.4, 4: 0.1, 3: 0.2})
    assert (round(found.mean, 6), found.low, found.high, list(found.by_seed)) == (0.1, None, None, [1])
    assert paired_difference({1: 0.5}, {2: 0.4}) is None


def test_runs_that_differ_in_seed_and_name_alone_are_one_arm():
    other = [run(f"kd-d4-{seed}", seed, [0.2, 0.5], fingerprint="d" * 64) for seed in (1, 2)]
    arms = compare([*study(), *other]).arms
    assert {arm.label: list(arm.runs) for arm in arms} == {"plain": [1, 2, 3], "kd": [1, 2, 3], "kd-d4": [1, 2]}


@pytest.mark.parametrize("pattern", ["kd-s{}", "kd_seed{}", "s{}-kd", "kd.{}", "kd-{}"])
def test_an_arm_is_called_as_its_runs_without_their_seed(pattern):
    runs = [run(pattern.format(seed), seed, [0.1]) for seed in (1, 12)]
    assert compare([*runs, run("plain", 1, [0.1], mode="none")]).arms[1].label == "kd"


def test_what_an_arm_is_configured_otherwise_is_named():
    runs = [*study(), *(run(f"alpha-{s}", s, [0.2, 0.4], distill={"mode": "cached", "alpha": 0.9}) for s in (1, 2))]
    settings = {arm.label: arm.settings for arm in compare(runs, baseline="kd").arms}
    assert settings == {"kd": {}, "plain": {"distill.mode": "none"}, "alpha": {"distill.alpha": 0.9}}


def test_faster_convergence_is_said_in_steps_and_seconds():
    taught = [run(f"kd-{s}", s, [0.3, 0.42, 0.5], seconds=1.5) for s in (1, 2)]
    alone = [run(f"plain-{s}", s, [0.2, 0.3, 0.4], mode="none") for s in (1, 2)]
    arm = compare([*alone, *taught]).arms[1]
    assert (arm.reaches.steps, arm.reaches.seconds) == (200, 300.0)
    assert compare([*taught, *alone], baseline="kd-1").arms[1].reaches is None
    assert arm.seconds_per_step() == 1.5


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([run("a-1", 1, [0.1])], "needs at least two runs, found 1"),
        ([run("a-1", 1, [0.1]), run("a-2", 2, [0.1])], "belong to one arm, a: they differ in nothing but name, group, seed"),
        ([run("a-1", 1, [0.1]), run("b-1", 1, [0.1, 0.2], mode="none")], r"same steps .*a-1 has 100; b-1 has 200.*\n\n"
         r"    kdpipe train-student -c model_weights/default/a-1/config.yaml --resume \\\n"
         r"        --set train.epochs=2 --set train.max_steps=200$"),
        ([run("a", 1, [0.1]), run("b", 1, [0.1], mode="none", data={"val": ["w"]})], r"same data\.val can be compared"),
        ([run("a-1", 1, [0.1]), run("b-2", 2, [0.1], mode="none")], "have no seed in common"),
        ([run("a", 1, [0.1]), run("b", 1, [0.2])], r"a and b are two runs of one configuration and one seed \(1\)"),
        ([run("a", 1, [0.1]).model_copy(update={"total_steps": 300}), run("b", 1, [0.1])], r"unfinished runs .*a \(100 of 300\)"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_compared_are_refused_by_name(runs, message):
    with pytest.raises(DataError, match=message):
        compare(runs)


def test_an_unknown_baseline_names_the_arms():
    with pytest.raises(DataError, match="no run is called 'kdd'; arms: kd, plain"):
        compare(study(), baseline="kdd")


def test_the_page_loads_nothing_and_draws_arms_and_single_runs(tmp_path):
    solo = run("solo-s1", 1, [0.2, 0.3], fingerprint="e" * 64)
    text = write_comparison(compare([*study(), solo]), tmp_path / "out").read_text()
    assert not re.search(r'https?:|(?:src|href)="', text)
    labels = re.findall(r'<svg viewBox="0 0 520 [^>]*aria-label="([^"]*)"', text)
    assert [label.split(",")[0] for label in labels] == [
        "Validation mIoU by steps", "Validation mIoU by seconds", "Difference from plain with 95 % intervals"
    ]  # fmt: skip
    assert "kd (3 seeds): 20 at 100, 40 at 200" in labels[0]
    assert "solo (1 seed): 20 at 100, 30 at 200" in labels[0]
    assert "mean, kd: +3.0 (-2.0 to +8.0)" in labels[2]
    assert text.count('class="faint"') == 2 * 6  # six runs in each of two charts
    for shown in ("plain", "kd", "+3.0 [", "distill.mode: cached", "36 tiles"):
        assert shown in text
    assert "One seed" not in text


def test_one_seed_has_no_interval_on_the_page_and_is_said_to_prove_nothing(tmp_path):
    runs = [run("kd-s1", 1, [0.2, 0.5]), run("plain-s1", 1, [0.1, 0.4], mode="none")]
    text = write_comparison(compare(runs), tmp_path).read_text()
    assert "One seed proves nothing" in text
    assert ">+10.0<" in text
    assert "95 %" not in text
    assert 'class="faint"' not in text
    printed = [part for part in comparison_tables(compare(runs)) if isinstance(part, str)]
    assert any("One seed proves nothing" in line for line in printed)


def test_plots_on_request_are_pictures(tmp_path):
    draw_comparison(compare(study()), tmp_path)
    for plot in ("miou-by-steps.png", "miou-by-seconds.png", "classes.png"):
        with Image.open(tmp_path / plot) as picture:
            assert len(np.unique(np.asarray(picture))) > 20


def test_names_from_runs_cannot_put_markup_into_the_page(tmp_path):
    runs = [run("<script>-1", 1, [0.1]), run("plain-1", 1, [0.1], mode="none")]
    assert "<script>" not in write_comparison(compare(runs), tmp_path).read_text()


def test_tables_are_readable_at_80_columns():
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    for table in comparison_tables(compare(study())):
        console.print(table)
    text = console.export_text()
    for shown in ("plain", "baseline", "+3.0 [-2.0, +8.0]", "200 steps"):
        assert shown in text


def test_the_command_reads_folders_and_writes_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for each in study():
        (tmp_path / each.name).mkdir()
        write_run(tmp_path / each.name, each)
    names = [each.name for each in study()]
    result = CliRunner().invoke(cli, ["compare", *names, "--json", "c.json", "--png"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["baseline"] == "plain"
    assert content["arms"][1]["differences"][MEAN]["mean"] == pytest.approx(0.03)
    assert content["arms"][1]["cache"]["fingerprint"] == "f" * 64
    written = {file.name for file in (tmp_path / "comparison").iterdir()}
    assert written == {"comparison.html", "miou-by-steps.png", "miou-by-seconds.png", "classes.png"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no run in /.*: expected a folder that `kdpipe train-student` wrote"),
        ("{", "is not what `kdpipe train-student` writes"),
        (json.dumps({"name": "x"}), "is not what `kdpipe train-student` writes"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_run(tmp_path)


def test_a_run_without_validation_cannot_be_shown(tmp_path):
    (tmp_path / "config.yaml").touch()  # a run without data.val, or before its first validation
    with pytest.raises(DataError, match="has no validation yet: let it train on, or give it data.val"):
        read_run(tmp_path)
    write_run(tmp_path, run("a", 1, [0.1]).model_copy(update={"history": []}))
    with pytest.raises(DataError, match="has no validation yet"):
        read_run(tmp_path)
