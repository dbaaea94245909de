"""
SIGTERM to every process of a job, as SLURM, `timeout` and Kubernetes send it, twice to the main one, at any moment of a command.

Whatever the moment: exit code 130 within ten seconds, no traceback, what was finished is kept, and the same command goes on.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.commands import run_command
from helpers.docs_pages import blocks
from helpers.files import tree
from helpers.runs import checkpoint
from helpers.stopped_commands import StoppedCommands

from kdpipe.configs import dump_config
from kdpipe.configs.errors import Interrupted
from kdpipe.pipeline.progress import at_once, stop_on_signal

SECONDS = 10 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # others may use the cores too
RUN = Path("model_weights/tests/tiny")
TRAIN = ["train-student", "-c", "config.yaml"]
pytestmark = [pytest.mark.timeout(300), pytest.mark.long]


@pytest.fixture(scope="module")
def commands():
    started = StoppedCommands()
    yield started
    started.close()


@pytest.fixture
def long_run(cached, make_config, tmp_path):
    """The folder of a configuration of many steps, whose cache is complete."""
    config = make_config(train__epochs=200, train__val_every_epochs=2, train__checkpoint_every_steps=2, train__crop=32)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    return tmp_path


def assert_stopped(found, text):
    code, seconds, output = found
    assert code == 130, output
    assert seconds < SECONDS, output
    assert text in " ".join(output.split())
    assert "Traceback" not in output, output


def test_sigterm_may_come_again_and_a_second_ctrl_c_ends_at_once():
    with stop_on_signal() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_in_a_destructor_whose_exceptions_python_drops_is_heard_a_moment_later():
    class Ended:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with stop_on_signal() as stop, pytest.raises(Interrupted, match="so far"), at_once(stop, "so far"):
        Ended()
        time.sleep(30)


@pytest.mark.parametrize(
    ("moment", "workers", "mark"),
    [("set-up", 0, "mark"), ("", 2, str(RUN / "config.yaml"))],
    ids=["while tiles are listed", "while workers start"],
)
def test_training_that_has_made_no_step_ends_at_once_and_can_be_started_again(
    commands, long_run, moment, workers, mark
):
    argv = [*TRAIN, "--set", f"train.workers={workers}"]
    assert_stopped(commands.stopped(argv, long_run, moment, mark), "stopped before a step was made")
    assert not list(RUN.glob("*.ckpt"))
    assert not RUN.with_name("tiny.lock").exists()
    assert run_command(*TRAIN, "--set", "train.epochs=1").returncode == 0


@pytest.mark.parametrize(("moment", "workers", "steps"), [("step", 1, 2), ("checkpoint", 0, 3), ("validation", 0, 6)])
def test_training_saves_and_the_same_command_resumes(commands, long_run, moment, workers, steps):
    argv = [*TRAIN, "--set", f"train.workers={workers}"]
    assert_stopped(commands.stopped(argv, long_run, moment), f"stopped after step {steps} of 600; the run is saved")
    assert checkpoint()["position"]["steps"] == steps
    assert not list(RUN.glob(".*"))  # nothing half written
    done = run_command(*TRAIN, "--resume", "--set", "train.epochs=3")
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {steps}" in done.stdout
    assert next(past["steps"] for past in checkpoint()["position"]["history"]) == 6, "the validation is made up for"


def test_ctrl_c_to_the_group_is_answered_alike(commands, long_run):
    assert_stopped(commands.stopped(TRAIN, long_run, "validation", number=signal.SIGINT), "the run is saved")


def test_stage_one_keeps_its_finished_tiles(commands, long_run, finished_cache):
    shutil.rmtree(long_run / "cache.zarr")
    argv = ["precompute-teacher", "-c", "config.yaml", "--set", "teacher.batch_size=1"]
    assert_stopped(commands.stopped(argv, long_run, "prediction"), "stopped; 3 of 6 tiles are finished and kept")
    done = run_command(*argv)
    assert "3 of 6 tiles are finished already and kept" in " ".join(done.stdout.split())
    assert not (long_run / "cache.zarr.lock").exists()


def test_evaluate_and_predict_end_and_leave_no_half_map(commands, long_run, landscape):
    assert run_command(*TRAIN, "--set", "train.epochs=1").returncode == 0
    best = str(RUN / "best.ckpt")
    assert_stopped(commands.stopped(["evaluate", best, str(landscape / "Val")], long_run, "scores"), "stopped at once")
    (long_run / "mark").unlink()
    argv = ["predict", str(landscape / "Train/images"), "--checkpoint", best, "--out", "maps"]
    assert_stopped(commands.stopped(argv, long_run, "window"), "2 of 6 scenes have their map")
    assert len(list((long_run / "maps").glob("*.tif"))) == 2
    assert not [path for path in (long_run / "maps").iterdir() if path.name.startswith(".")]


def stopped_group(argv, folder, has_come):
    """The exit code of a command in a group of its own, its seconds from SIGTERM to its end, and its output."""
    with (folder / "output.txt").open("w") as output:
        command = [sys.executable, "-m", "kdpipe.pipeline", *argv]
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, start_new_session=True)
    deadline = time.monotonic() + 150
    while not has_come() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    said = (folder / "output.txt").read_text
    assert process.poll() is None, said()
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    code, seconds = process.wait(timeout=60), time.monotonic() - start
    while time.monotonic() < start + seconds + SECONDS:  # no process of the group is left
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return code, seconds, said()
        time.sleep(0.05)
    raise AssertionError(
        subprocess.run(["ps", "-g", str(process.pid)], capture_output=True, text=True, check=True).stdout
    )


def test_workers_of_dask_store_what_they_have_and_the_same_command_goes_on(long_run, finished_cache):
    shutil.rmtree(long_run / "cache.zarr")
    argv = ["precompute-teacher", "-c", "config.yaml", "--workers", "2", "--set", "teacher.batch_size=1"]
    tiles = lambda: len(list((long_run / "cache.zarr").glob("tiles/*/*/zarr.json")))  # noqa: E731
    assert_stopped(stopped_group(argv, long_run, tiles), "of 6 tiles are finished and kept")
    kept = tiles()
    assert 1 <= kept <= 6
    assert not (long_run / "cache.zarr.lock").exists()
    done = run_command("precompute-teacher", "-c", "config.yaml", "--set", "teacher.batch_size=1")
    assert f"{kept} of 6 tiles are finished already and kept" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_workers_of_dask_that_still_import_libraries_end_at_once(long_run):
    shutil.rmtree(long_run / "cache.zarr")
    argv = ["precompute-teacher", "-c", "config.yaml", "--workers", "2"]
    has_come = lambda: "starting 2 workers" in (long_run / "output.txt").read_text()  # noqa: E731
    before = tree(long_run)
    assert_stopped(stopped_group(argv, long_run, has_come), "stopped before a tile was computed")
    after = tree(long_run)
    assert {path: after[path] for path in after if not path.endswith("output.txt")} == before


@pytest.mark.parametrize(
    ("file", "text"),
    [
        pytest.param("last.ckpt", "the run is saved", id="in a step"),
        pytest.param(
            ".", "stopped before a step was made", id="while the second process starts", marks=pytest.mark.slow
        ),
    ],
)
def test_all_processes_of_a_run_on_several_devices_stop(long_run, file, text):
    argv = [*TRAIN, "--devices", "2", "--device", "cpu", "--set", "train.batch_size=1", "--set", "train.crop=64"]
    assert_stopped(stopped_group(argv, long_run, (RUN / file).exists), text)
    assert (RUN / "last.ckpt").exists() == (file == "last.ckpt")


def test_the_script_for_slurm_goes_on_when_the_time_was_up_and_not_after_scancel(long_run):
    """SLURM signals the batch shell alone before the time limit, and every process for `scancel`."""
    (script,) = (block.text for block in blocks("docs/cluster.md") if "scontrol requeue" in block.text)
    (long_run / "config.yaml").rename(long_run / "mine.yaml")
    (long_run / "job.sh").write_text(script)
    programs = {
        "srun": 'exec "$@"',  # which passes signals on to its tasks
        "scontrol": 'echo "$@" >> asked',
        "kdpipe": f'exec {sys.executable} -m kdpipe.pipeline "$@"',
    }
    for name, line in programs.items():
        (long_run / name).write_text(f"#!/bin/bash\n{line}\n")
        (long_run / name).chmod(0o755)
    environment = os.environ | {"SLURM_JOB_ID": "7", "PATH": f"{long_run}:{os.environ['PATH']}"}
    for to_all in (False, True):
        with (long_run / "output.txt").open("w") as output:
            job = subprocess.Popen(
                ["bash", "job.sh"], stdout=output, stderr=output, cwd=long_run, env=environment, start_new_session=True
            )
        came = (RUN / "last.ckpt").stat().st_mtime_ns if to_all else 0
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (
            not (RUN / "last.ckpt").exists() or (RUN / "last.ckpt").stat().st_mtime_ns == came
        ):
            time.sleep(0.01)
        if to_all:
            os.killpg(job.pid, signal.SIGTERM)
        else:
            job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=60) == 130, (long_run / "output.txt").read_text()
        said = " ".join((long_run / "output.txt").read_text().split())
        assert "the run is saved" in said
        assert ("resuming after step" in said) == to_all
        assert (long_run / "asked").read_text() == "requeue 7\n"
