"""`compare --by root`: each run's last checkpoint is scored on each root, and runs are paired by seed, root and class."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import run_command
from helpers.scored_tiles import numpy_iou, random_tile, stub, write_tile

from kdpipe.configs.errors import DataError
from kdpipe.pipeline.evaluation import roots as scoring
from kdpipe.pipeline.evaluation.compare import compare
from kdpipe.pipeline.evaluation.differences import MEAN
from kdpipe.pipeline.evaluation.roots import compare_roots
from kdpipe.pipeline.reports.html.comparison import write_comparison
from kdpipe.pipeline.runs.record import read_run, write_run

CPU = torch.device("cpu")
SEEDS = (1, 2, 3)


@pytest.fixture
def runs(trained, tmp_path):
    """Runs of three seeds without and with a teacher, by arm, and their folders: copies of one that was trained."""
    run, folders = read_run("model_weights/tests/tiny-none"), {}
    made = {}
    for arm, mode in (("plain", "none"), ("kd", "cached")):
        for seed in SEEDS:
            config = {**run.config, "distill": {**run.config["distill"], "mode": mode}}
            named = {"name": f"{arm}-s{seed}", "seed": seed, "mode": mode, "config": config}
            copy = run.model_copy(update=named)
            folder = tmp_path / copy.name
            folder.mkdir()
            shutil.copy("model_weights/tests/tiny-none/last.ckpt", folder)
            write_run(folder, copy)
            made[copy.name], folders[id(copy)] = copy, folder
    return made, folders


def test_runs_are_paired_by_seed_root_and_class(runs, make_config, tmp_path, monkeypatch):
    """On A the arm `kd` predicts the labels, but for some noise, and on B the baseline does."""
    made, folders = runs
    config = make_config()
    labelled = {}  # a tile's root and mask, by its image, which holds the labels
    for root, count in (("A", 2), ("B", 3)):
        for i in range(count):
            _, labels = random_tile(i + 10 * count)
            image = np.where(labels == 255, 0, labels).astype(np.uint8)
            write_tile(tmp_path / root, f"t{i}", image, labels)
            labelled[image.tobytes()] = root, image, labels

    def predicted(name, root, image):
        share = 0.1 + 0.02 * made[name].seed
        wrong = np.where(np.random.default_rng(made[name].seed).random(image.shape) < share, 5 - image, image)
        return wrong if name.startswith("kd") == (root == "A") else np.roll(wrong, 1, axis=1)

    def model_of(file, *args, **kwargs):
        def predict(image_HWC):
            root, image, _ = labelled[np.ascontiguousarray(image_HWC[..., 0]).tobytes()]
            return predicted(file.parent.name, root, image)

        return stub(config, predict)

    monkeypatch.setattr(scoring, "student_model", model_of)
    comparison = compare(list(made.values()))
    found = compare_roots(comparison.runs, folders, CPU, [str(tmp_path / "A"), str(tmp_path / "B")])
    assert [(Path(root.root).name, root.tiles) for root in found] == [("A", 2), ("B", 3), ("all roots", 5)]
    for root, names in zip(found, ("A", "B", "AB"), strict=True):
        shown = [tile for tile in labelled.values() if tile[0] in names]
        masks = [labels for _, _, labels in shown]
        iou = {name: numpy_iou([predicted(name, where, image) for where, image, _ in shown], masks) for name in made}
        plain, kd = root.arms
        assert (plain.label, kd.label) == ("plain", "kd")
        for c, of_class in enumerate(config.classes.names):
            expected = {seed: iou[f"kd-s{seed}"][c] - iou[f"plain-s{seed}"][c] for seed in SEEDS}
            assert kd.differences[of_class].by_seed == pytest.approx(expected)
        scored = [c for c, name in enumerate(config.classes.names) if name not in config.classes.not_scored]
        means = {seed: iou[f"kd-s{seed}"][scored].mean() - iou[f"plain-s{seed}"][scored].mean() for seed in SEEDS}
        assert kd.differences[MEAN].by_seed == pytest.approx(means)
    assert [root.arms[1].differences[MEAN].verdict for root in found[:2]] == ["gained", "lost"]
    comparison.roots = found
    page = write_comparison(comparison, tmp_path / "page").read_text()
    assert f"<p>{tmp_path / 'A'}: kd against plain: gained in mIoU (+" in page
    assert f"<p>{tmp_path / 'B'}: kd against plain: lost in mIoU (-" in page
    (chart,) = re.findall(r'aria-label="(mIoU by root: [^"]*)"', page)
    assert re.search("difference from plain with 95 % intervals.*A, kd: .*B, kd: -.*all roots, kd: ", chart), chart


@pytest.mark.parametrize("named", [False, True])
def test_the_command_scores_the_roots_of_data_val_or_those_that_are_named(runs, trained, landscape, tmp_path, named):
    made, _ = runs
    chosen = [name for name in made if name.endswith("s1")]
    options = ["--root", str(landscape / "Train"), "--root", str(landscape / "Val")] if named else ["--by", "root"]
    done = run_command(
        "compare", *chosen, *options, "--tiles", "0", "--device", "cpu", "--json", "c.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    roots = json.loads((tmp_path / "c.json").read_text(), parse_constant=pytest.fail)["roots"]
    shown = [str(landscape / "Train"), str(landscape / "Val"), "all roots"] if named else trained.data.val
    assert [root["root"] for root in roots] == shown
    last = made["plain-s1"].history[-1]
    on_val = next(root for root in roots if root["root"] == trained.data.val[0])
    assert on_val["trained_on"] == []
    assert on_val["arms"][0]["iou"][MEAN]["1"] == pytest.approx(
        last.miou, abs=1e-3
    )  # of validation, in its own precision
    assert on_val["arms"][1]["differences"][MEAN]["mean"] == 0  # the same weights
    if named:
        assert roots[0]["trained_on"] == chosen
        assert (
            f"{landscape / 'Train'}: trained on some of these tiles, so that the scores say nothing about other"
            in done.stdout
        )


def test_a_run_without_its_last_checkpoint_is_refused_before_any_is_scored(runs, monkeypatch):
    made, folders = runs
    (folders[id(made["kd-s3"])] / "last.ckpt").unlink()
    monkeypatch.setattr(scoring, "student_model", lambda *args, **kwargs: pytest.fail("a run was scored"))
    with pytest.raises(
        DataError, match=r"--by root scores the last checkpoint .*there is no \S*kd-s3/last.ckpt: copy it from where"
    ):
        compare_roots(compare(list(made.values())).runs, folders, CPU)
