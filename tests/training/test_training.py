"""Stage two: the loss that was meant, from the cache that was meant."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.commands import arguments, run_command
from helpers.configs import ENCODER
from helpers.doubles import Plain
from helpers.files import write_image
from helpers.runs import assert_same_weights, checkpoint, weights

from kdpipe.configs.errors import (
    CheckpointError,
    ConfigError,
    CorruptCache,
    DataError,
    IncompleteCache,
    KdpipeError,
    StaleCache,
    TrainingDiverged,
)
from kdpipe.pipeline.models.student import build_student, load_student_weights
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.runs.curves import read_curves
from kdpipe.pipeline.training import run as training
from kdpipe.pipeline.training.run import train, with_mode
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")


def test_training_from_the_cache_needs_no_teacher_on_disk(cached, make_config, small_student):
    summary = train(make_config(teacher__checkpoint="gone/teacher.pth"), CPU)
    assert summary.steps == 6
    assert np.isfinite(summary.losses).all()
    assert summary.fingerprint
    recorded = checkpoint(file="best.ckpt")["kdpipe"]
    assert recorded["fingerprint"] == summary.fingerprint
    assert {"torch", "zarr", "kdpipe"} <= recorded["libraries"].keys()
    assert yaml.safe_load(recorded["config"]) == yaml.safe_load(
        Path("model_weights/tests/tiny/config.yaml").read_text()
    )


@pytest.mark.long
def test_a_student_starts_from_weights_for_other_classes_with_a_new_head(cached, make_config, tmp_path):
    other = build_student("unetformer", 9, encoder="resnet18")
    torch.save(other.state_dict(), tmp_path / "other.pth")
    student = {"architecture": "unetformer", "encoder": "resnet18", "checkpoint": str(tmp_path / "other.pth")}
    with pytest.raises(CheckpointError, match="predicts 9 classes and the model 6; set student.replace_head: true"):
        train(make_config(student=student), CPU)
    config = make_config(student=student | {"replace_head": True}, train__max_steps=1, data__val=[])
    assert np.isfinite(train(config, CPU).losses).all()
    assert verify(config, "parity", CPU, sample=1).parity


@pytest.mark.long
def test_cached_and_online_are_the_same_run_to_the_encodings_bound(make_config, small_student):
    # Small steps of a small network: AdamW from random weights magnifies the last bits otherwise.
    config = make_config(cache__bits=16, train__lr=1e-4, train__backbone_lr=1e-5)
    precompute(config, CPU)
    one, two = train(config, CPU), train(with_mode(config, "online"), CPU)
    np.testing.assert_allclose(one.losses, two.losses, rtol=1e-3)
    alone = train(with_mode(config, "none"), CPU)
    assert np.abs(np.array(alone.losses) / one.losses - 1).min() > 1e-2
    assert {one.name, two.name, alone.name} == {"tiny", "tiny-online", "tiny-none"}


@pytest.mark.long
def test_the_number_of_workers_changes_nothing(cached, make_config, small_student):
    train(cached, CPU)
    train(make_config(name="two", train__workers=2), CPU)
    assert_same_weights(weights(), weights("two"))


def test_accumulated_batches_are_the_step_of_one_batch_of_their_size(cached, make_config, monkeypatch):
    """
    Six samples an epoch: one step of four, the rest dropped, at once or in halves.

    With every pixel inside and alpha 1 the mean of means is the mean; float32 sums in another order.
    """
    monkeypatch.setattr(training, "starting_student", lambda *args, **options: Plain())
    options = {"scales": [1.0], "mosaic": 0.0, "photometric": 0.0, "epochs": 3, "clip_norm": 1.0}
    options = {f"train__{key}": value for key, value in options.items()} | {"distill__alpha": 1.0}
    runs = {}
    for name, batch_size, accumulate in (("at-once", 4, 1), ("halves", 2, 2)):
        sizes = {"train__batch_size": batch_size, "train__accumulate": accumulate}
        runs[name] = train(make_config(name=name, **options, **sizes), CPU)
    assert [run.steps for run in runs.values()] == [3, 3]
    np.testing.assert_allclose(runs["halves"].losses, runs["at-once"].losses, rtol=1e-5)
    for name, value in weights("at-once").items():
        torch.testing.assert_close(weights("halves")[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train__accumulate": 4}, r"6 samples, fewer than train\.batch_size 2 x train\.accumulate 4"),
        ({"train__batch_size": 64}, r"an epoch has 6 samples, fewer than train\.batch_size 64"),
    ],
)
def test_fewer_samples_than_a_step_are_an_error_not_an_empty_run(cached, make_config, small_student, change, message):
    with pytest.raises(ConfigError, match=message):
        train(make_config(**change), CPU)


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
    with pytest.raises(CorruptCache, match=rf"1 damaged tile: Train/{shard.parent.name}"):
        train(cached, CPU)


def test_validation_needs_a_label(cached, make_config, landscape):
    config = make_config(data__val=[str(landscape / "Unlabelled")], data__allow_missing_masks=True)
    with pytest.raises(DataError, match=r"data\.val has no labelled tile to validate on: .*Unlabelled"):
        train(config, CPU)


def test_divergence_stops_with_advice(cached, make_config, small_student):
    advice = r"the loss became (nan|inf) at step \d .*try train\.lr: 1e\+29 \(now 1e\+30\) .*train\.clip_norm: 1\.0 \(now none\)"
    with pytest.raises(TrainingDiverged, match=advice):
        train(make_config(train__lr=1e30, train__backbone_lr=1e30), CPU)


def test_tiles_without_any_label_train_from_their_soft_targets_alone(make_config, small_student, tmp_path):
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


def test_the_learning_rate_restarts_as_configured(cached, make_config, small_student):
    train(make_config(train__epochs=4, train__restart_epochs=2), CPU)
    rates = list(read_curves("lightning_logs/tests/tiny")["lr"].values())
    assert rates == pytest.approx([1e-3] * 3 + [5e-4] * 3 + [1e-3] * 3 + [1e-3 * (1 + np.cos(np.pi / 4)) / 2] * 3)


def test_published_encoder_weights_load_strictly_from_a_file(tmp_path):
    donor = build_student("unet", 6, encoder="resnet18")
    torch.save(donor.encoder.state_dict(), tmp_path / "encoder.pth")
    student = build_student("unet", 6, encoder="resnet18", encoder_weights=str(tmp_path / "encoder.pth"))
    assert_same_weights(student.encoder.state_dict(), donor.encoder.state_dict())
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(KdpipeError, match="does not fit the model"):
        build_student("unet", 6, encoder="resnet18", encoder_weights=str(tmp_path / "wrong.pth"))


def test_a_run_starts_from_anothers_checkpoint(cached, make_config):
    train(make_config(train__max_steps=1, data__val=[]), CPU)
    student = build_student("unet", 6, encoder=ENCODER, checkpoint="model_weights/tests/tiny/last.ckpt")
    other = build_student("unet", 6, encoder=ENCODER)
    load_student_weights(other, "model_weights/tests/tiny/last.ckpt")
    assert_same_weights(student.state_dict(), other.state_dict())


def test_json_holds_the_summary(cached, small_student, tmp_path):
    options = ("--json", "s.json", "--set", "train.max_steps=2")
    done = run_command(*arguments(cached, "train-student", *options, folder=tmp_path))
    assert done.returncode == 0, done.stderr
    summary = json.loads(Path("s.json").read_text())
    assert (summary["steps"], summary["mode"], len(summary["losses"])) == (2, "cached", 2)
    assert "val mIoU" in done.stdout
