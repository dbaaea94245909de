"""Stage two: the loss that was meant, from the cache that was meant, resumable to the bit."""

import csv
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.commands import run_command
from helpers.doubles import Plain
from helpers.files import write_image

from kdpipe.configs import dump_config
from kdpipe.configs.errors import (
    CheckpointError,
    ConfigError,
    CorruptCache,
    IncompleteCache,
    Interrupted,
    KdpipeError,
    StaleCache,
    TrainingDiverged,
)
from kdpipe.pipeline.models.student import build_student, load_student_weights
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.reports.terminal.curves import read_curves
from kdpipe.pipeline.runs.checkpoint import changed_keys
from kdpipe.pipeline.runs.record import read_run
from kdpipe.pipeline.training import run as training
from kdpipe.pipeline.training.loaders import BatchStream
from kdpipe.pipeline.training.run import train, with_mode
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")


def weights(name="tiny", file="last.ckpt"):
    return torch.load(Path("model_weights/tests") / name / file, weights_only=True)["state_dict"]


def metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same_weights(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_training_from_the_cache_needs_no_teacher_on_disk(cached, make_config):
    elsewhere = cached.teacher.model_copy(update={"checkpoint": "gone/teacher.pth"})
    summary = train(cached.model_copy(update={"teacher": elsewhere}), CPU)
    assert summary.steps == 6
    assert np.isfinite(summary.losses).all()
    assert summary.fingerprint
    recorded = torch.load("model_weights/tests/tiny/best.ckpt", weights_only=True)["kdpipe"]
    assert recorded["fingerprint"] == summary.fingerprint
    assert {"torch", "zarr", "kdpipe"} <= recorded["libraries"].keys()
    assert yaml.safe_load(recorded["config"]) == yaml.safe_load(
        Path("model_weights/tests/tiny/config.yaml").read_text()
    )


def test_a_unetformer_trains_with_its_auxiliary_head_and_lookahead_and_resumes(cached, make_config):
    config = make_config(student={"architecture": "unetformer", "encoder": "resnet18"})
    config = config.model_copy(update={"train": config.train.model_copy(update={"lookahead": True})})
    whole = train(config, CPU)
    assert np.isfinite(whole.losses).all()
    # The auxiliary head is trained: its weights are not those that the seed gave it.
    torch.manual_seed(config.seed)
    fresh = build_student("unetformer", 6, encoder="resnet18").state_dict()
    name = "decoder.aux_head.conv_out.0.weight"
    expected = weights()
    assert not torch.equal(expected["student." + name], fresh[name])
    half = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 3})})
    train(half, CPU, overwrite=True)
    train(config, CPU, resume=True)
    assert_same_weights(weights(), expected)


def test_a_student_starts_from_weights_for_other_classes_with_a_new_head(cached, make_config, tmp_path):
    other = build_student("unetformer", 9, encoder="resnet18")
    torch.save(other.state_dict(), tmp_path / "other.pth")
    student = {"architecture": "unetformer", "encoder": "resnet18", "checkpoint": str(tmp_path / "other.pth")}
    with pytest.raises(
        CheckpointError, match="predicts 9 classes and the model 6; set student.replace_head: true"
    ):
        train(make_config(student=student), CPU)
    config = make_config(student=student | {"replace_head": True})
    assert np.isfinite(train(config, CPU).losses).all()
    assert verify(config, "parity", CPU, sample=1).parity


def test_logs_lie_where_the_guide_has_them(cached):
    summary = train(cached, CPU)
    folder = Path("lightning_logs/tests/tiny/version_0")
    rows = metrics(folder)
    assert [float(r["train_loss"]) for r in rows if r["train_loss"]] == pytest.approx(summary.losses)
    assert [int(r["step"]) for r in rows if r["train_loss"]] == [1, 2, 3, 4, 5, 6]
    assert len([r for r in rows if r["val_mIoU"]]) == 2
    assert list(folder.glob("events.out.tfevents.*"))


def test_cached_and_online_are_the_same_run_to_the_encodings_bound(make_config):
    # Small steps of a network without depthwise convolutions: AdamW from random weights magnifies the last bits otherwise.
    config = make_config(cache__bits=16, student__encoder="resnet18", train__lr=1e-4, train__backbone_lr=1e-5)
    precompute(config, CPU)
    one, two = train(config, CPU), train(with_mode(config, "online"), CPU)
    np.testing.assert_allclose(one.losses, two.losses, rtol=1e-3)
    alone = train(with_mode(config, "none"), CPU)
    assert np.abs(np.array(alone.losses) / one.losses - 1).min() > 1e-2
    assert {one.name, two.name, alone.name} == {"tiny", "tiny-online", "tiny-none"}


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_stopped_run_resumes_to_the_same_weights_bit_for_bit(cached, make_config, stop_after):
    """Three steps an epoch: after step 1 and 4 in mid-epoch, after step 3 between epochs."""
    whole = train(cached.model_copy(update={"name": "whole"}), CPU)
    stop = threading.Event()

    class StopThere:
        def say(self, line):
            pass

        def bar(self, *args):
            from contextlib import nullcontext

            count = 0

            def advance(steps=1, **figures):
                nonlocal count
                count += 1
                if count == stop_after:
                    stop.set()

            return nullcontext(advance)

    with pytest.raises(Interrupted, match=f"stopped after step {stop_after} of 6; .* --resume"):
        train(cached, CPU, progress=StopThere(), stop=stop)
    resumed = train(cached, CPU, resume=True)
    assert len(resumed.losses) == 6 - stop_after
    curves = read_curves(resumed.logs)
    assert list(curves["train_loss"]) == [1, 2, 3, 4, 5, 6]
    assert curves == read_curves(whole.logs)
    run = read_run(resumed.weights)
    assert [found.steps for found in run.history] == [3, 6]
    assert [found.iou for found in run.history] == [
        found.iou for found in read_run("model_weights/tests/whole").history
    ]
    assert 0 < run.history[0].seconds < run.history[1].seconds
    assert_same_weights(weights(), weights("whole"))
    best = [torch.load(f"model_weights/tests/{n}/best.ckpt", weights_only=True)["position"] for n in ("tiny", "whole")]
    for key in ("batches", "steps", "best_miou", "best_step"):
        assert best[0][key] == best[1][key]


def test_kill_9_in_mid_epoch_resumes_to_the_same_weights_bit_for_bit(cached, make_config, tmp_path):
    """A process of its own, whose worker reads ahead, is killed; the command goes on here without a worker."""
    config = make_config(train__checkpoint_every_steps=1, train__epochs=3)
    train(config.model_copy(update={"name": "whole"}), CPU)
    with_worker = config.model_copy(update={"train": config.train.model_copy(update={"workers": 1})})
    (tmp_path / "c.yaml").write_text(dump_config(with_worker))
    command = [sys.executable, "-m", "kdpipe.pipeline", "train-student", "-c", "c.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    last = Path("model_weights/tests/tiny/last.ckpt")
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(last, weights_only=True)["position"]["steps"] < 9
    done = run_command("train-student", "-c", "c.yaml", "--resume", "--set", "train.workers=0")
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout
    assert "Learning curves, against steps" in done.stdout
    assert "\x1b" not in done.stdout, "no colours in a file"
    assert_same_weights(weights(), weights("whole"))


def test_ctrl_c_saves_and_says_how_to_go_on(cached, make_config, tmp_path):
    config = make_config(train__epochs=200, train__workers=1, train__val_every_epochs=500)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    command = [sys.executable, "-m", "kdpipe.pipeline", "train-student", "-c", "c.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not Path("model_weights/tests/tiny/last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    assert "--resume to go on" in complaint
    assert "Traceback" not in complaint


def test_the_number_of_workers_changes_nothing(cached):
    train(cached, CPU)
    two = cached.model_copy(update={"name": "two", "train": cached.train.model_copy(update={"workers": 2})})
    train(two, CPU)
    assert_same_weights(weights(), weights("two"))


def test_accumulated_batches_are_the_step_of_one_batch_of_their_size(cached, monkeypatch):
    """
    Six samples an epoch: one step of four, the rest dropped, at once or in halves.

    With every pixel inside and alpha 1 the mean of means is the mean; float32 sums in another order.
    """
    monkeypatch.setattr(training, "build_student", lambda *args, **options: Plain())
    changes = {"scales": [1.0], "mosaic": 0.0, "photometric": 0.0, "epochs": 3, "clip_norm": 1.0}
    config = cached.model_copy(update={"distill": cached.distill.model_copy(update={"alpha": 1.0})})
    runs = {}
    for name, sizes in (("at-once", (4, 1)), ("halves", (2, 2))):
        both = changes | {"batch_size": sizes[0], "accumulate": sizes[1]}
        runs[name] = train(config.model_copy(update={"name": name, "train": config.train.model_copy(update=both)}), CPU)
    assert [run.steps for run in runs.values()] == [3, 3]
    np.testing.assert_allclose(runs["halves"].losses, runs["at-once"].losses, rtol=1e-5)
    for name, value in weights("at-once").items():
        torch.testing.assert_close(weights("halves")[name], value, rtol=1e-3, atol=1e-5)


def test_fewer_samples_than_a_step_accumulates_is_an_error(cached):
    config = cached.model_copy(update={"train": cached.train.model_copy(update={"accumulate": 4})})
    with pytest.raises(ConfigError, match=r"6 samples, fewer than train\.batch_size 2 x train\.accumulate 4"):
        train(config, CPU)


def test_an_existing_run_is_not_overwritten_unless_asked(cached):
    train(cached, CPU)
    before = weights()
    with pytest.raises(ConfigError, match=r"holds a run already; go on with --resume, replace it with --overwrite"):
        train(cached, CPU)
    assert_same_weights(before, weights())
    train(cached, CPU, overwrite=True)


def test_resuming_with_another_configuration_is_refused_naming_the_key(cached):
    train(cached, CPU)
    changed = cached.model_copy(update={"train": cached.train.model_copy(update={"lr": 0.5})})
    with pytest.raises(ConfigError, match=r"train\.lr: was 0\.001, is 0\.5"):
        train(changed, CPU, resume=True)
    longer = cached.model_copy(update={"train": cached.train.model_copy(update={"epochs": 3})})
    assert train(longer, CPU, resume=True).steps == 9


def test_resuming_on_another_cache_is_refused(cached, make_config):
    train(cached, CPU)
    content = torch.load("model_weights/tests/tiny/last.ckpt", weights_only=True)
    content["kdpipe"]["fingerprint"] = "0" * 64
    torch.save(content, "model_weights/tests/tiny/last.ckpt")
    with pytest.raises(StaleCache, match="trained from the cache with fingerprint 0000"):
        train(cached, CPU, resume=True)


def test_a_missing_cache_is_refused_before_the_first_step(make_config):
    with pytest.raises(IncompleteCache, match="does not exist; run `kdpipe precompute-teacher`"):
        train(make_config(), CPU)
    assert not Path("model_weights").exists()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"distill__temperature": 4.0}, "temperature: the cache has 2.0, the configuration says 4.0"),
        ({"teacher__encoder": "resnet18"}, r"teacher\.encoder"),
        ({"class_map__Road": {"Background": 1}}, "class_map"),
    ],
)
def test_a_stale_cache_is_refused_naming_what_differs(cached, make_config, change, field):
    with pytest.raises(StaleCache, match=field):
        train(make_config(**change), CPU)


def test_a_cache_without_one_of_the_tiles_is_refused(cached, make_config, landscape):
    with pytest.raises(IncompleteCache, match=r"2 missing tiles: Unlabelled/"):
        train(make_config(data__unlabelled=[str(landscape / "Unlabelled")]), CPU)


def test_a_damaged_tile_is_refused_by_name(cached):
    shard = next(Path(cached.cache.path).glob("tiles/Train/*/0.0.0"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptCache, match=rf"1 damaged tiles: Train/{shard.parent.name}"):
        train(cached, CPU)


def test_divergence_stops_with_advice(cached):
    config = cached.model_copy(update={"train": cached.train.model_copy(update={"lr": 1e30, "backbone_lr": 1e30})})
    advice = r"the loss became (nan|inf) at step \d .*try train\.lr: 1e\+29 \(now 1e\+30\) .*train\.clip_norm: 1\.0 \(now none\)"
    with pytest.raises(TrainingDiverged, match=advice):
        train(config, CPU)


def test_tiles_without_any_label_train_from_their_soft_targets_alone(make_config, tmp_path):
    for i in range(3):
        write_image(tmp_path / "Bare" / "images" / f"t{i}.png", 70, 80 + i, seed=i)
    (tmp_path / "Bare" / "masks").mkdir()
    config = make_config(
        data__train=[str(tmp_path / "Bare")], data__allow_missing_masks=True, data__val=[], train__mosaic=1.0
    )
    precompute(config, CPU)
    summary = train(config, CPU)
    assert np.isfinite(summary.losses).all()
    assert summary.final == {}


def test_fewer_samples_than_a_batch_is_an_error_not_an_empty_run(cached, make_config):
    config = make_config(train__batch_size=64)
    with pytest.raises(ConfigError, match="an epoch has 6 samples, fewer than train.batch_size 64"):
        train(config, CPU)


def test_the_learning_rate_restarts_as_configured(cached):
    config = cached.model_copy(update={"train": cached.train.model_copy(update={"epochs": 4, "restart_epochs": 2})})
    train(config, CPU)
    rows = metrics(Path("lightning_logs/tests/tiny/version_0"))
    rates = [float(r["lr"]) for r in rows if r["lr"]]
    assert rates == pytest.approx([1e-3] * 3 + [5e-4] * 3 + [1e-3] * 3 + [1e-3 * (1 + np.cos(np.pi / 4)) / 2] * 3)


def test_a_stream_resumed_anywhere_gives_the_same_batches():
    whole = list(BatchStream(11, 3, 4, seed=5, start=0))
    assert len(whole) == 12
    for start in range(13):
        assert list(BatchStream(11, 3, 4, seed=5, start=start)) == whole[start:]
    singles = list(BatchStream(11, 1, 4, seed=5, start=0, accumulate=3))
    assert [[k for batch in singles[i : i + 3] for k in batch] for i in range(0, len(singles), 3)] == whole
    epochs = [sorted(k % 11 for batch in whole[e * 3 : e * 3 + 3] for k in batch) for e in range(4)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)


def test_published_encoder_weights_load_strictly_from_a_file(tmp_path):
    donor = build_student("unet", 6, encoder="resnet18")
    torch.save(donor.encoder.state_dict(), tmp_path / "encoder.pth")
    student = build_student("unet", 6, encoder="resnet18", encoder_weights=str(tmp_path / "encoder.pth"))
    for name, value in student.encoder.state_dict().items():
        assert torch.equal(value, donor.encoder.state_dict()[name])
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(KdpipeError, match="does not fit the model"):
        build_student("unet", 6, encoder="resnet18", encoder_weights=str(tmp_path / "wrong.pth"))


def test_a_run_starts_from_anothers_checkpoint(cached):
    train(cached, CPU)
    student = build_student("unet", 6, encoder="mobilenet_v2", checkpoint="model_weights/tests/tiny/last.ckpt")
    other = build_student("unet", 6, encoder="mobilenet_v2")
    load_student_weights(other, "model_weights/tests/tiny/last.ckpt")
    assert_same_weights(student.state_dict(), other.state_dict())


def test_changed_keys_names_nested_keys_and_passes_resumable_ones():
    assert changed_keys({"a": {"b": 1}, "train": {"epochs": 1}}, {"a": {"b": 2}, "train": {"epochs": 9}}) == [
        "a.b: was 1, is 2"
    ]


def test_json_holds_the_summary(cached, tmp_path):
    (tmp_path / "c.yaml").write_text(dump_config(cached))
    done = run_command("train-student", "-c", "c.yaml", "--json", "s.json", "--set", "train.max_steps=2")
    assert done.returncode == 0, done.stderr
    summary = json.loads(Path("s.json").read_text())
    assert (summary["steps"], summary["mode"], len(summary["losses"])) == (2, "cached", 2)
    assert "val mIoU" in done.stdout
