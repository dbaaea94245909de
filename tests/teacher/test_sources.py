"""Teachers of every kind go through the whole pipeline, and the cache holds what their owner's script predicts."""

import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import run_command
from helpers.doubles import Lines
from helpers.files import tree
from helpers.foreign_networks import export
from helpers.teacher_kinds import CPU, IDENTIFYING, KINDS, pixels, scores_of_owner

from kdpipe.cache import SoftTargetCache
from kdpipe.configs.errors import CheckpointError, ConfigError, DataError, StaleCache
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.evaluation.evaluate import evaluate, teacher_model
from kdpipe.pipeline.inspection.cache import inspect_cache
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.reports.terminal.inspection import cache_tables
from kdpipe.pipeline.training.targets import open_fresh_cache
from kdpipe.pipeline.verify.class_map import suggest_map
from kdpipe.pipeline.verify.gate import verify


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_the_cache_holds_what_the_owners_script_predicts(config_of):
    config = config_of()
    cache = SoftTargetCache.open(config.cache.path)
    tile = list_tiles(config.data, "train")[0]
    logits = scores_of_owner(config_of.teacher, np.asarray(pixels(tile.image)))
    probs = np.exp(logits - logits.max(axis=0)) / np.exp(logits - logits.max(axis=0)).sum(axis=0)
    mapped = np.einsum("thw,ts->shw", probs, config.class_map_matrix())
    softened = np.sqrt(mapped) / np.sqrt(mapped).sum(axis=0)  # T 2
    assert np.abs(cache.read(tile.id) - softened).max() <= 1 / 255 + 2e-5


def failures(report):
    """What a report finds but that the classes of a random teacher are not those of the labels."""
    return [finding for finding in report.findings if finding.code != "class-map"]


def test_parity_is_proven(config_of):
    report = verify(config_of(), "parity", CPU, sample=2)
    assert failures(report) == []
    assert report.parity, "something was compared"


@pytest.mark.long
def test_an_interrupted_run_goes_on_and_nothing_is_computed_twice(config_of, tmp_path):
    config = config_of(cache__path=str(tmp_path / "begun.zarr"), cache__bits=16, data__limit=3)
    assert precompute(config, CPU).computed == 3
    again = precompute(config_of(cache__path=str(tmp_path / "begun.zarr"), cache__bits=16), CPU)
    assert (again.kept, again.computed) == (3, 3)


class Killing(Lines):
    """Kills its process once three tiles are stored."""

    @contextmanager
    def bar(self, title, total, unit, done=0):
        stored = []

        def advance(steps=1, **figures):
            stored.extend([None] * steps)
            if len(stored) == 3 and unit == "tiles":
                os.kill(os.getpid(), signal.SIGKILL)

        yield advance


@pytest.mark.long
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(config_of, tmp_path):
    config = config_of(cache__path=str(tmp_path / "killed.zarr"))
    child = os.fork()
    if child == 0:
        try:
            precompute(config, CPU, Killing())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "killed.zarr/manifest.json").exists()
    assert precompute(config, CPU).kept >= 3
    assert tree(tmp_path / "killed.zarr") == tree(config_of.original)


def test_a_damaged_tile_is_repaired_to_the_same_bytes(config_of):
    config = config_of()
    cache = Path(config.cache.path)
    shard = next(cache.glob("tiles/Train/*/0.0.0"))
    shard.write_bytes(shard.read_bytes()[::-1])
    assert [finding.code for finding in verify(config, "full", CPU).findings] == ["damaged-tile"]
    assert precompute(config, CPU, repair=True).computed == 1
    assert tree(cache) == tree(config_of.original)


def test_inspect_says_what_the_teacher_is(config_of, kind):
    config = config_of()
    found = inspect_cache(config.cache.path, config)
    assert found.differences == []
    (shown, *_) = cache_tables(found)
    row = dict(zip(shown.columns[0].cells, shown.columns[1].cells, strict=True))["teacher"]
    said = {
        "smp": "unet, tu-test_resnet", "model": "helpers.foreign_networks:Pooled", "onnx": "teacher.onnx",
        "pt2": "teacher.pt2", "predictions": "probabilities that another program predicted",
    }  # fmt: skip
    assert row.startswith(said.get(kind, "config.json"))


def change(file, kind):
    if kind == "smp" or kind == "model":
        state = torch.load(file, weights_only=True)
        next(reversed(state.values())).add_(1)
        torch.save(state, file)
    elif file.suffix == ".json":
        text = file.read_text()
        assert "0.485" in text
        file.write_text(text.replace("0.485", "0.5"))
    else:
        torch.manual_seed(1)
        export(torch.nn.Conv2d(3, 8, 1).eval(), file)


def test_any_change_of_what_determines_it_is_seen(config_of, kind, tmp_path):
    config = config_of()
    assert precompute(config, CPU).computed == 0
    if kind == "predictions":  # which are compared tile by tile
        first = sorted((tmp_path / "teacher/saved").glob("train_*.npy"))[0]
        np.save(first, np.load(first)[::-1])
        with pytest.raises(StaleCache, match=f"1 stale tile.*{first.stem}"):
            open_fresh_cache(config, list_tiles(config.data, "train"), None)
        assert precompute(config, CPU).computed == 1
        return
    change(tmp_path / "teacher" / IDENTIFYING[kind], kind)
    with pytest.raises(StaleCache, match="sha256"):
        precompute(config, CPU)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_another_kind_of_teacher_is_another_teacher(config_of, make_config, tmp_path):
    config = make_config(cache__path=config_of().cache.path)
    with pytest.raises(StaleCache, match=r"architecture: the cache has null, the configuration says \"unet\""):
        precompute(config, CPU)


def test_a_missing_file_is_named_and_training_does_not_need_it(config_of, kind, tmp_path):
    config = config_of()
    for path in (tmp_path / "teacher").iterdir():
        if path.name != "cache.zarr":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    key = {"smp": "checkpoint", "model": "checkpoint", "onnx": "file", "pt2": "file"}.get(kind, "pretrained")
    error, message = CheckpointError, rf"teacher.{key}: no (file|folder) at"
    if kind == "predictions":
        error, message = DataError, "teacher.predictions: there is no file or folder"
        next(Path(config.cache.path).glob("tiles/Train/*/0.0.0")).unlink()
    with pytest.raises(error, match=message):
        precompute(config, CPU)
    if kind != "predictions":
        assert open_fresh_cache(config, list_tiles(config.data, "train"), None).manifest.tiles


WAYS = {
    "views": {"distill__teacher_view": "crop", "cache__views": 1},
    "tta": {"teacher": {"tta": "flips", "scales": [1.0, 1.5]}},
    "windows": {"teacher": {"window": 64}},
    "logits": {"cache__kind": "logits"},
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_run_a_teacher_passes_parity(config_of, kind, way, tmp_path):
    overrides = {"cache__path": str(tmp_path / "other.zarr"), "data__limit": 1, **WAYS[way]}
    if "teacher" in overrides:
        overrides["teacher"] = config_of.teacher | overrides["teacher"]
    if kind == "predictions" and way != "logits":
        with pytest.raises(ConfigError, match="predictions"):
            config_of(**overrides)
        return
    config = config_of(**overrides)
    assert precompute(config, CPU).computed == 1
    report = verify(config, "parity", CPU)
    assert failures(report) == []
    assert len(report.parity) == 1


def test_a_map_is_suggested_and_the_teacher_is_scored(config_of):
    config = config_of()
    assert len(suggest_map(config, CPU, sample=2).rows) == 8
    assert evaluate(teacher_model(config, CPU, tta=None, window=None)).together.tiles == 2


@pytest.mark.parametrize("kind", ["model", "segformer", "predictions"])
def test_commands_take_it(config_of, tmp_path, monkeypatch):
    """The seat of a user: a YAML file, stage one, the proof, a student, its score."""
    import yaml

    raw = config_of(train__max_steps=2, train__epochs=1).model_dump(mode="json")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw))
    for command in (
        ["precompute-teacher", "-c", "mine.yaml"],
        ["inspect", raw["cache"]["path"]],
        ["train-student", "-c", "mine.yaml"],
        ["evaluate", "--teacher", "-c", "mine.yaml"],
    ):
        found = run_command(*command)
        assert found.returncode == 0, (command, found.stderr)


def test_the_owners_scores_are_recognised(config_of, tmp_path):
    config = config_of()
    (tmp_path / "saved").mkdir()
    for tile in list_tiles(config.data, "train")[:2]:
        image = np.asarray(pixels(tile.image))
        path = tmp_path / "saved" / f"{tile.id}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, scores_of_owner(config_of.teacher, image))
    report = verify(config, "quick", CPU, reference=tmp_path / "saved")
    assert report.findings == []


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({}, "needs one of architecture .* found none"),
        ({"architecture": "unet", "encoder": "resnet18", "checkpoint": "x", "file": "y.onnx"}, "architecture and file"),
        ({"model": "mine:build"}, "checkpoint is missing: model needs it"),
        ({"architecture": "unet", "checkpoint": "x"}, "encoder is missing: architecture needs it"),
        ({"file": "y.onnx", "checkpoint": "x"}, "checkpoint does not go with file"),
        ({"pretrained": "folder", "normalize": "imagenet"}, "brings a normalisation of its own"),
        ({"model": "no colon", "checkpoint": "x"}, "teacher.model"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(make_config, teacher, message):
    classes = ["Tree", "Rangeland", "Cropland", "Developed", "Road", "Bareland", "Water", "Background"]
    with pytest.raises(ConfigError, match=message):
        make_config(teacher={"classes": classes} | teacher)
