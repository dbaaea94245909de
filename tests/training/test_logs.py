"""`metrics.csv` as it is written, and its one reader: whole runs over their resumes."""

import csv
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.commands import arguments, run_command

from kdpipe.pipeline.commands.actions import train as command
from kdpipe.pipeline.progress import Silent
from kdpipe.pipeline.reports.html.run import report_run
from kdpipe.pipeline.runs.curves import read_curves
from kdpipe.pipeline.training.run import train

CPU = torch.device("cpu")


def log(folder, version, train, val=()):
    """`metrics.csv` of a version, with a row for each step as Lightning's logger writes them."""
    path = folder / f"version_{version}"
    path.mkdir()
    names = ["epoch", "step", "train_kd_loss", "train_loss", "val_mIoU"]
    with (path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for step, loss in train:
            writer.writerow({"epoch": 0, "step": step, "train_loss": loss, "train_kd_loss": loss / 4})
        for step, miou in val:
            writer.writerow({"epoch": 0, "step": step, "val_mIoU": miou})


def test_the_versions_of_a_resumed_run_are_joined_and_those_of_another_run_are_not(tmp_path):
    assert read_curves(tmp_path / "nothing") == {}
    log(tmp_path, 0, [(1, 90.0), (2, 91.0), (3, 92.0)], [(2, 0.9)])  # another run, overwritten since
    log(
        tmp_path, 2, [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0)], [(3, 0.3), (5, 0.5)]
    )  # saved at 3, killed after 5
    assert read_curves(tmp_path)["train_loss"] == {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0, 5: 50.0}
    log(tmp_path, 3, [])  # stopped before its first step
    log(tmp_path, 10, [(4, 4.0), (5, 5.0), (6, 6.0)], [(6, "nan")])
    curves = read_curves(tmp_path)
    assert curves["train_loss"] == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0, 6: 6.0}
    assert curves["train_kd_loss"][4] == 1.0
    assert list(curves["val_mIoU"]) == [3, 6], "the score of the steps that were run again is none of this run's"
    assert set(curves) == {"train_loss", "train_kd_loss", "val_mIoU"}
    log(tmp_path, 11, [(4, 5.0)])  # resumed anew, with fewer steps
    assert read_curves(tmp_path)["train_loss"] == {1: 1.0, 2: 2.0, 3: 3.0, 4: 5.0}
    log(tmp_path, 12, [], [(4, 0.4)])  # --resume of a run that is at its end only validates
    curves = read_curves(tmp_path)
    assert (list(curves["train_loss"]), curves["val_mIoU"]) == ([1, 2, 3, 4], {3: 0.3, 4: 0.4})


def test_logs_that_are_lost_or_torn_are_no_error(tmp_path):
    log(tmp_path, 0, [(1, 1.0)])
    (tmp_path / "version_0/metrics.csv").write_text("step,train_loss\n1,0.5\n2,tor")
    assert read_curves(tmp_path) == {}
    (tmp_path / "version_0/metrics.csv").unlink()
    assert read_curves(tmp_path) == {}


def test_logs_lie_where_the_guide_has_them(cached, small_student):
    summary = train(cached, CPU)
    folder = Path("lightning_logs/tests/tiny/version_0")
    assert folder.samefile(summary.logs)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["train_loss"]) for r in rows if r["train_loss"]] == pytest.approx(summary.losses)
    assert [int(r["step"]) for r in rows if r["train_loss"]] == [1, 2, 3, 4, 5, 6]
    assert len([r for r in rows if r["val_mIoU"]]) == 2
    assert list(folder.glob("events.out.tfevents.*"))


class Killed(Silent):
    """Ends a run after its fifth step, two after its last checkpoint."""

    def bar(self, *args):
        steps = iter([False] * 4 + [True])

        def advance(*args, **figures):
            if next(steps):
                raise KeyboardInterrupt

        return nullcontext(advance)


@pytest.mark.long
def test_terminal_and_page_show_the_same_curves_of_a_resumed_run(cached, make_config, monkeypatch, tmp_path):
    config = make_config(student__encoder="tu-mobilenetv3_small_050")
    with pytest.raises(KeyboardInterrupt):
        train(config, CPU, progress=Killed())
    shown = []
    monkeypatch.setattr(command, "curves_text", lambda curves, *args, **options: shown.append(curves) or "")
    done = run_command(*arguments(config, "train-student", "--resume", "--device", "cpu", folder=tmp_path))
    assert "resuming after step 3" in done.stdout
    report = report_run("model_weights/tests/tiny", CPU, tiles=0)
    assert shown == [report.logged]
    assert [list(shown[0][name]) for name in ("train_loss", "val_mIoU")] == [[1, 2, 3, 4, 5, 6], [3, 6]]
    assert report.run.wall_seconds > report.run.history[-1].seconds > 0
    assert len(list(Path("lightning_logs/tests/tiny").glob("version_*/metrics.csv"))) == 2
