"""`--resume`: to the bit the weights of an uninterrupted run, however it ended; and never another run, cache or configuration."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.commands import arguments, run_command
from helpers.doubles import Lines, StopAfter
from helpers.files import tree
from helpers.runs import assert_same_weights, checkpoint, weights
from lightning.fabric import Fabric

from kdpipe.configs.errors import ConfigError, IncompleteCache, Interrupted, StaleCache
from kdpipe.pipeline.models.student import build_student
from kdpipe.pipeline.progress import Silent
from kdpipe.pipeline.runs.curves import read_curves
from kdpipe.pipeline.runs.record import read_run
from kdpipe.pipeline.runs.resumable import changed_keys
from kdpipe.pipeline.training import run
from kdpipe.pipeline.training.run import train

CPU = torch.device("cpu")


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_stopped_run_resumes_to_the_same_weights_bit_for_bit(cached, make_config, small_student, stop_after):
    """Three steps an epoch: after step 1 and 4 in mid-epoch, after step 3 between epochs."""
    whole = train(make_config(name="whole"), CPU)
    stop = threading.Event()
    with pytest.raises(Interrupted, match=f"stopped after step {stop_after} of 6; .* --resume"):
        train(cached, CPU, progress=StopAfter(stop_after, stop), stop=stop)
    before = checkpoint()["position"]
    resumed = train(cached, CPU, resume=True)
    assert len(resumed.losses) == 6 - stop_after
    curves, expected = (read_curves(Path(summary.logs).parent) for summary in (resumed, whole))
    assert list(curves.pop("seconds_per_step")) == list(expected.pop("seconds_per_step")) == [1, 2, 3, 4, 5, 6]
    assert curves == expected
    found, expected = read_run(resumed.weights), read_run(whole.weights)
    assert [past.steps for past in found.history] == [3, 6]
    assert [past.iou for past in found.history] == [past.iou for past in expected.history]
    assert_same_weights(weights(), weights("whole"))
    best = [checkpoint(name, "best.ckpt")["position"] for name in ("tiny", "whole")]
    for key in ("batches", "steps", "best_miou", "best_step"):
        assert best[0][key] == best[1][key]
    # Times are those of the whole run, and the same wherever they are told.
    assert 0 < found.history[0].seconds < found.history[1].seconds < resumed.wall_seconds
    assert resumed.wall_seconds > before["wall_seconds"] > before["seconds"] > 0
    assert (found.wall_seconds, found.seconds_per_step) == (resumed.wall_seconds, resumed.seconds_per_step)
    assert expected.seconds_per_step == whole.seconds_per_step > 0


@pytest.mark.long
def test_a_unetformer_trains_with_its_auxiliary_head_and_lookahead_and_resumes(cached, make_config):
    options = {
        "student": {"architecture": "unetformer", "encoder": "resnet18"},
        "train__lookahead": True,
        "data__val": [],
    }
    config = make_config(**options)
    whole = train(config, CPU)
    assert all(0 < loss < float("inf") for loss in whole.losses)
    # The auxiliary head is trained: its weights are not those that the seed gave it.
    torch.manual_seed(config.seed)
    fresh = build_student("unetformer", 6, encoder="resnet18").state_dict()
    name = "decoder.aux_head.conv_out.0.weight"
    expected = weights()
    assert not torch.equal(expected["student." + name], fresh[name])
    train(make_config(**options, train__max_steps=3), CPU, overwrite=True)
    train(config, CPU, resume=True)
    assert_same_weights(weights(), expected)


def test_the_optimizers_state_is_restored_to_where_fabric_has_put_the_parameters(cached, small_student, monkeypatch):
    """A move to float64 stands for one to a GPU: `load_state_dict` brings a state to dtype and device of its parameter alike."""
    train(cached, CPU)
    setup = Fabric.setup

    def moved(self, student, *optimizers, **options):
        return setup(self, student.double(), *optimizers, **options)

    monkeypatch.setattr(Fabric, "setup", moved)
    learner = run._set_up(cached, CPU, Silent(), threading.Event(), resume=True, overwrite=False).learner
    states = [(p, state["exp_avg"]) for p, state in learner.optimizer.state.items()]
    assert len(states) == len(list(learner.student.parameters()))
    assert {(p.dtype, average.dtype) for p, average in states} == {(torch.float64, torch.float64)}


def started(config, folder, *options):
    """The command `train-student` in a process of its own."""
    command = [sys.executable, "-m", "kdpipe.pipeline", *arguments(config, "train-student", *options, folder=folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(file, seconds=120):
    deadline = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.mark.long
def test_kill_9_in_mid_epoch_resumes_to_the_same_weights_bit_for_bit(cached, make_config, tmp_path):
    """A process of its own, whose worker reads ahead, is killed; the command goes on here without a worker. Until then, it may not."""
    options = {"student__encoder": "tu-mobilenetv3_small_050", "train__checkpoint_every_steps": 1, "train__epochs": 3}
    train(make_config(name="whole", **options), CPU)
    process = started(make_config(train__workers=1, **options), tmp_path)
    last = Path("model_weights/tests/tiny/last.ckpt")
    wait_for(last)
    process.send_signal(signal.SIGSTOP)
    before = tree(last.parent)
    for options in (["--resume"], ["--overwrite"], ["--overwrite", "--set", "seed=9"]):
        refused = run_command("train-student", "-c", "config.yaml", *options)
        assert refused.returncode == 3
        said = " ".join(refused.stderr.split())
        assert f"model_weights/tests/tiny is being written by process {process.pid} on {socket.gethostname()}" in said
    assert tree(last.parent) == before
    process.kill()
    process.wait()
    process.stderr.close()
    assert checkpoint()["position"]["steps"] < 9
    done = run_command("train-student", "-c", "config.yaml", "--resume", "--set", "train.workers=0")
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout
    assert "Learning curves, against steps" in done.stdout
    assert "\x1b" not in done.stdout, "no colours in a file"
    assert_same_weights(weights(), weights("whole"))
    assert not last.parent.with_name("tiny.lock").exists()


def test_a_file_of_the_name_of_a_runs_lock_is_refused_and_stays(cached, small_student):
    theirs = Path("model_weights/tests/tiny.lock")
    theirs.parent.mkdir(parents=True)
    theirs.write_text("my own")
    with pytest.raises(ConfigError, match=r"tiny\.lock is not kdpipe's.* nothing was changed: move it"):
        train(cached, CPU)
    assert theirs.read_text() == "my own"
    assert list(theirs.parent.iterdir()) == [theirs]


def test_without_locks_a_run_warns_and_goes_on(cached, small_student, monkeypatch):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    lines = Lines()
    assert train(cached, CPU, progress=lines).steps == 6
    assert re.search(r"warning: the file system of .*/tiny has no locks .* start no second run", lines.said[0])


def test_a_refused_run_leaves_nothing_behind(make_config, tmp_path):
    config = make_config()
    before = tree(tmp_path)
    with pytest.raises(IncompleteCache):
        train(config, CPU)
    assert tree(tmp_path) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_ctrl_c_saves_and_says_how_to_go_on(cached, make_config, tmp_path):
    process = started(make_config(train__epochs=200, train__workers=1, train__val_every_epochs=500), tmp_path)
    wait_for(Path("model_weights/tests/tiny/last.ckpt"))
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    assert "--resume to go on" in complaint
    assert "Traceback" not in complaint


def test_an_existing_run_is_not_overwritten_unless_asked(cached, small_student):
    train(cached, CPU)
    before = weights()
    with pytest.raises(ConfigError, match=r"holds a run already; go on with --resume, replace it with --overwrite"):
        train(cached, CPU)
    assert_same_weights(before, weights())
    train(cached, CPU, overwrite=True)


def test_resuming_with_another_configuration_is_refused_naming_the_key(cached, make_config, small_student):
    train(cached, CPU)
    with pytest.raises(ConfigError, match=r"train\.lr: was 0\.001, is 0\.5"):
        train(make_config(train__lr=0.5), CPU, resume=True)
    assert train(make_config(train__epochs=3), CPU, resume=True).steps == 9


def test_resuming_on_another_cache_is_refused(cached, small_student):
    train(cached, CPU)
    content = checkpoint()
    content["kdpipe"]["fingerprint"] = "0" * 64
    torch.save(content, "model_weights/tests/tiny/last.ckpt")
    with pytest.raises(StaleCache, match="trained from the cache with fingerprint 0000"):
        train(cached, CPU, resume=True)


def test_changed_keys_names_nested_keys_and_passes_resumable_ones():
    assert changed_keys({"a": {"b": 1}, "train": {"epochs": 1}}, {"a": {"b": 2}, "train": {"epochs": 9}}) == [
        "a.b: was 1, is 2"
    ]
