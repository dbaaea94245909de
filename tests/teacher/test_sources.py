"""Teachers of every kind go through the whole pipeline, and the cache holds what their owner's script predicts."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.commands import run_command
from helpers.configs import tiny_config
from helpers.foreign_networks import export, owners_logits, teacher_of
from PIL import Image

from kdpipe.cache import SoftTargetCache
from kdpipe.configs.errors import CheckpointError, ConfigError, StaleCache
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.evaluation.evaluate import evaluate, teacher_model
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.training.targets import open_fresh_cache
from kdpipe.pipeline.verify.class_map import suggest_map
from kdpipe.pipeline.verify.gate import verify

KINDS = ["model", "segformer", "onnx", "pt2"]
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def worlds(landscape, teacher_file, tmp_path_factory):
    """A function that gives the section `teacher` of a kind, the folder of its files, and a complete cache of 8 bits at T 2."""
    made = {}

    def world(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            teacher = teacher_of(kind, folder)
            config = tiny_config(landscape, teacher_file, folder, teacher=teacher)
            precompute(config, CPU)
            made[kind] = teacher, folder
        return made[kind]

    return world


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def config_of(worlds, kind, make_config, tmp_path):
    """`make_config` with the kind's teacher, whose files and cache are copies."""
    teacher, folder = worlds(kind)
    shutil.copytree(folder, tmp_path / "teacher")
    here = json.loads(json.dumps(teacher).replace(str(folder), str(tmp_path / "teacher")))
    path = str(tmp_path / "teacher/cache.zarr")

    def config(**overrides):
        return make_config(**({"teacher": here, "cache__path": path} | overrides))

    config.teacher = here
    return config


def test_the_cache_holds_what_the_owners_script_predicts(config_of):
    config = config_of()
    cache = SoftTargetCache.open(config.cache.path)
    tile = list_tiles(config.data, "train")[0]
    logits = owners_logits(config_of.teacher, np.asarray(Image.open(tile.image).convert("RGB")))
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


def test_an_interrupted_run_goes_on_and_nothing_is_computed_twice(config_of, tmp_path):
    config = config_of(cache__path=str(tmp_path / "begun.zarr"), cache__bits=16)
    only = config.model_copy(update={"data": config.data.model_copy(update={"unlabelled": []})})
    assert precompute(only, CPU).computed == 6
    assert precompute(config_of(cache__path=str(tmp_path / "begun.zarr"), cache__bits=16), CPU).computed == 0


def test_any_change_of_what_determines_it_is_seen(config_of, kind, tmp_path):
    config = config_of()
    assert precompute(config, CPU).computed == 0
    changed = {
        "model": "pooled.pth",
        "segformer": "segformer/preprocessor_config.json",
        "onnx": "teacher.onnx",
        "pt2": "teacher.pt2",
    }[kind]
    file = tmp_path / "teacher" / changed
    if kind == "segformer":
        file.write_text(file.read_text().replace("0.485", "0.5"))
    elif kind == "model":
        state = torch.load(file, weights_only=True)
        state["head.bias"] += 1
        torch.save(state, file)
    else:
        torch.manual_seed(1)
        export(torch.nn.Conv2d(3, 8, 1).eval(), file)
    with pytest.raises(StaleCache, match="sha256"):
        precompute(config, CPU)


def test_another_kind_of_teacher_is_another_teacher(config_of, make_config, tmp_path):
    config = make_config(cache__path=config_of().cache.path)
    with pytest.raises(StaleCache, match=r"architecture: the cache has null, the configuration says \"unet\""):
        precompute(config, CPU)


def test_a_missing_file_is_named_and_training_does_not_need_it(config_of, kind, tmp_path):
    config = config_of()
    for path in (tmp_path / "teacher").iterdir():
        if path.name != "cache.zarr":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    key = {"model": "checkpoint", "segformer": "pretrained"}.get(kind, "file")
    with pytest.raises(CheckpointError, match=rf"teacher.{key}: no (file|folder) at"):
        precompute(config, CPU)
    assert open_fresh_cache(config, list_tiles(config.data, "train"), None).manifest.tiles


@pytest.mark.parametrize("kind", ["model", "segformer"])
def test_views_tta_windows_and_logits(config_of, tmp_path):
    """Each way to run a teacher passes parity for every kind."""
    ways = {
        "views": {"distill__teacher_view": "crop", "cache__views": 1},
        "tta": {"teacher": config_of.teacher | {"tta": "flips", "window": 64}},
        "logits": {"cache__kind": "logits"},
    }
    for name, way in ways.items():
        config = config_of(**way, cache__path=str(tmp_path / f"{name}.zarr"))
        precompute(config, CPU)
        assert failures(verify(config, "parity", CPU, sample=1)) == [], name


def test_a_map_is_suggested_and_the_teacher_is_scored(config_of):
    config = config_of()
    assert len(suggest_map(config, CPU, sample=2).rows) == 8
    assert evaluate(teacher_model(config, CPU, tta=None, window=None)).together.tiles == 2


@pytest.mark.parametrize("kind", ["model", "segformer"])
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
        image = np.asarray(Image.open(tile.image).convert("RGB"))
        path = tmp_path / "saved" / f"{tile.id}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, owners_logits(config_of.teacher, image))
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
