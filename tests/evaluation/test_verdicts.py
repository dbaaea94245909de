"""Verdicts of a comparison: gained, lost or cannot tell, the seeds that would settle it, and arms after equal seconds of training."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from kdpipe.pipeline.evaluation.compare import compare
from kdpipe.pipeline.evaluation.differences import MEAN, MOST_SEEDS, paired_difference
from kdpipe.pipeline.evaluation.equal_seconds import MIN_SHARE
from kdpipe.pipeline.reports.html.comparison import write_comparison
from kdpipe.pipeline.reports.terminal.comparison import comparison_tables
from kdpipe.pipeline.runs.record import Run, Validation


def difference(*values):
    return paired_difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))


def t_interval(values, count):
    """The 95 % interval that scipy finds for `count` values of the mean and standard deviation of `values`."""
    shape = stats.norm.ppf((np.arange(count) + 0.5) / count)
    drawn = np.mean(values) + np.std(values, ddof=1) * (shape - shape.mean()) / shape.std(ddof=1)
    return stats.ttest_1samp(drawn, 0).confidence_interval(0.95)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.03, 0.02, 0.04), "gained"),
        ((-0.03, -0.02, -0.04, -0.03), "lost"),
        ((0.03, 0.01, 0.05), "cannot tell"),
        ((-0.09, 0.01, -0.05), "cannot tell"),
        ((0.03, -0.02), "cannot tell"),
        ((0.05, -0.02, 0.01, 0.03), "cannot tell"),
        ((0.05, -0.05, 0.001), "cannot tell"),
        ((0.0, 0.0, 0.0), "cannot tell"),
        ((0.1,), "cannot tell"),
    ],
)
def test_the_verdict_and_the_seeds_to_settle_it_are_those_of_the_t_interval(values, verdict):
    found = difference(*values)
    assert found.verdict == verdict
    enough = None
    if verdict == "cannot tell" and np.std(values) > 0:
        intervals = ((n, t_interval(values, n)) for n in range(2, MOST_SEEDS + 1))
        enough = next((n for n, (low, high) in intervals if low > 0 or high < 0), None)
    assert found.seeds_to_settle == enough
    assert enough is None or enough > len(values)


def runs_of(arm, mious, step_seconds, validations=10, **changes):
    """A run for each seed whose mIoU grows evenly to that of `mious` over 1000 steps; `Water` has twice the distance from 0.3."""
    made = []
    for seed, last in mious.items():
        history = []
        for part in np.arange(1, validations + 1) / validations:
            miou = float(last * part)
            iou = {"Forest": 0.3, "Water": 2 * miou - 0.3}
            history.append(
                Validation(steps=round(1000 * part), seconds=float(1000 * part * step_seconds), miou=miou,
                           overall_accuracy=miou, iou=iou)
            )  # fmt: skip
        mode = "none" if arm == "plain" else "cached"
        config = {"name": f"{arm}-s{seed}", "seed": seed, "distill": {"mode": mode}, "arm": arm, "data": {"val": ["v"]}}
        config |= {"classes": {"not_scored": []}, "train": {}}
        made.append(
            Run(name=f"{arm}-s{seed}", seed=seed, mode=mode, device="cpu", total_steps=1000, config=config, cache=None,
                libraries={}, history=history).model_copy(update=changes)
        )  # fmt: skip
    return made


PLAIN = {1: 0.50, 2: 0.52, 3: 0.48}


def said_by(comparison):
    """What the terminal prints, each sentence on one line."""
    console = Console(width=2000, record=True, file=io.StringIO())
    for part in comparison_tables(comparison):
        console.print(part)
    return console.export_text()


def test_terminal_page_and_json_say_where_an_arm_gained_lost_or_cannot_be_told(tmp_path):
    better = runs_of("better", {1: 0.55, 2: 0.58, 3: 0.53}, 1)
    worse = runs_of("worse", {1: 0.45, 2: 0.46, 3: 0.43}, 1)
    unsure = runs_of("unsure", {1: 0.56, 2: 0.51, 3: 0.50}, 1)  # +0.06, -0.01, +0.02
    comparison = compare([*runs_of("plain", PLAIN, 1), *better, *worse, *unsure])
    found = {arm["label"]: arm["differences"] for arm in json.loads(json.dumps(comparison.as_dict()))["arms"]}
    assert found["plain"] is None
    assert {name: found[name][MEAN]["verdict"] for name in ("better", "worse", "unsure")} == {
        "better": "gained", "worse": "lost", "unsure": "cannot tell",
    }  # fmt: skip
    seeds = difference(0.06, -0.01, 0.02).seeds_to_settle
    assert found["unsure"]["Water"]["seeds_to_settle"] == seeds
    sentences = [
        "better against plain: gained in mIoU (+5.3 [+3.9, +6.8]), Water (+10.7 [+7.8, +13.5]); "
        "cannot tell in Forest (more than 100 seeds would settle it).",
        "worse against plain: lost in mIoU (-5.3 [-6.8, -3.9]), Water (-10.7 [-13.5, -7.8]); "
        "cannot tell in Forest (more than 100 seeds would settle it).",
        f"unsure against plain: cannot tell in mIoU (about {seeds} seeds would settle it), Forest (more than 100), Water (about {seeds}).",
    ]
    page = write_comparison(comparison, tmp_path).read_text()
    for sentence in sentences:
        assert sentence in said_by(comparison)
        assert f"<p>{sentence}</p>" in page


def test_one_seed_cannot_tell_and_names_no_number_of_seeds():
    comparison = compare([*runs_of("plain", {1: 0.5}, 1), *runs_of("kd", {1: 0.9}, 1)])
    assert "kd against plain: cannot tell from one seed.\n" in said_by(comparison)
    assert "would settle" not in said_by(comparison)


def test_a_slower_arm_counts_with_its_last_validation_in_the_time_of_the_shortest_run(tmp_path):
    """Slow steps take 1.5 s: of 1000 s, the last validation is that of 600 steps, after 900 s and with 0.6 of the last mIoU."""
    slow = {1: 0.70, 2: 0.73, 3: 0.68}
    comparison = compare([*runs_of("plain", PLAIN, 1), *runs_of("slow", slow, 1.5)])
    assert comparison.arms[1].differences[MEAN].verdict == "gained"
    found = comparison.equal_seconds
    assert (found.seconds, found.untold) == (1000.0, {})
    expected = {seed: 0.6 * slow[seed] - PLAIN[seed] for seed in PLAIN}
    assert found.arms[1].differences[MEAN].by_seed == pytest.approx(expected)
    assert found.arms[1].differences[MEAN].verdict == "lost"
    told = comparison.as_dict()["equal_seconds"]
    assert told["arms"][1]["differences"]["Water"]["mean"] == pytest.approx(2 * np.mean(list(expected.values())))
    for text in (said_by(comparison), write_comparison(comparison, tmp_path).read_text()):
        assert "After 16 min 40 s of training, the time of the shortest run (without validation and stage one):" in text
        assert "slow against plain: lost in mIoU (-7.8 [-9.1, -6.5])" in text


@pytest.mark.parametrize(
    ("validations", "step_seconds", "change", "reason"),
    [
        (1, 1.1, {}, "the validations are too sparse; within that time, the last one was: kd-s1 none, kd-s2 none, kd-s3 none"),
        (2, 1.1, {}, "the last one was: kd-s1 after 9 min 10 s, kd-s2 after 9 min 10 s, kd-s3 after 9 min 10 s. Validate more often, "
         "by a smaller train.val_every_epochs"),
        (10, 1.1, {"device": "cuda"}, "the runs were trained on different devices (cpu, cuda)"),
    ],
)  # fmt: skip
def test_an_arm_that_equal_seconds_cannot_tell_says_why(validations, step_seconds, change, reason):
    slow = runs_of("kd", {1: 0.70, 2: 0.73, 3: 0.68}, step_seconds, validations, **change)
    comparison = compare([*runs_of("plain", PLAIN, 1), *slow, *runs_of("quick", {1: 0.55, 2: 0.58, 3: 0.53}, 1)])
    found = comparison.equal_seconds
    assert [arm.label for arm in found.arms] == ["plain", "quick"]
    assert reason in found.untold["kd"]
    assert "kd against plain: cannot tell after 16 min 40 s, because the" in said_by(comparison)


def test_a_run_that_used_nearly_all_of_the_time_counts_and_one_that_used_less_does_not():
    plain = runs_of("plain", PLAIN, 1)
    for share, told in ((MIN_SHARE, True), (MIN_SHARE - 0.01, False)):
        kd = runs_of("kd", {1: 0.7, 2: 0.7, 3: 0.7}, 1, validations=1)
        early = [run.history[0].model_copy(update={"steps": 500, "seconds": 1000 * share}) for run in kd]
        late = [run.history[0].model_copy(update={"seconds": 1200.0}) for run in kd]
        kd = [run.model_copy(update={"history": [one, two]}) for run, one, two in zip(kd, early, late, strict=True)]
        assert ("kd" not in compare([*plain, *kd]).equal_seconds.untold) is told


def test_runs_of_one_name_in_two_groups_are_two_arms():
    named = [
        run.model_copy(update={"name": "same"}) for run in (*runs_of("a", {1: 0.5}, 1), *runs_of("b", {1: 0.6}, 1))
    ]
    comparison = compare([*runs_of("plain", {1: 0.4}, 1), *named])
    assert [arm.label for arm in comparison.arms] == ["plain", "same", "same (2)"]
    assert [arm.label for arm in comparison.equal_seconds.arms] == ["plain", "same", "same (2)"]
