"""Predictions of another program as a teacher: what is read of them, what is refused, and what makes a tile stale."""

import os
import shutil

import numpy as np
import pytest
import torch
from helpers.commands import run_command
from helpers.predicted_world import CPU, SIZES, TEACHER, T, config, image_of, logits_at, softened
from helpers.stored_predictions import as_stored, probabilities, write_prediction
from PIL import Image

from kdpipe.cache import SoftTargetCache, StaleCache
from kdpipe.configs import parse_config
from kdpipe.configs.errors import ConfigError, DataError
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.losses import soft_loss
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.precompute.subjects import subjects
from kdpipe.pipeline.training.targets import open_fresh_cache, open_targets, training_samples
from kdpipe.pipeline.verify.gate import verify


def write(folder, are, ending, change=lambda stored: stored, **options):
    for name in SIZES:
        stored = change(as_stored(logits_at(folder, name), are))
        write_prediction(folder / f"saved/{name}{ending}", stored, **options)


def expected(folder, name, are):
    logits = logits_at(folder, name)
    if are == "classes":
        return softened(np.eye(len(TEACHER))[logits.argmax(axis=0)].transpose(2, 0, 1))
    return softened(probabilities(logits))


def to_bytes(probs_CHW):
    return np.rint(probs_CHW * 254).astype(np.uint8)


FORMS = {
    "logits .npy": ("logits", ".npy", {}, 0),
    "logits .tif": ("logits", ".tif", {}, 0),
    "float16 .npz": ("logits", ".npz", {"change": lambda stored: stored.astype(np.float16)}, 2e-3),
    "probabilities .npy": ("probabilities", ".npy", {}, 0),
    "probabilities of 8 bits": ("probabilities", ".tif", {"change": to_bytes, "scale": 1 / 254}, 0.06),
    "classes .png": ("classes", ".png", {}, 0),
    "classes .npy": ("classes", ".npy", {"change": lambda stored: stored[None].astype(np.int64)}, 0),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_the_cache_holds_the_mapped_and_softened_predictions(world, form):
    are, ending, options, rounding = FORMS[form]
    write(world, are, ending, **options)
    made = config(world, are)
    assert precompute(made, CPU).computed == 3
    cache = SoftTargetCache.open(made.cache.path)
    for name in SIZES:
        assert np.abs(cache.read(f"Mine/{name}") - expected(world, name, are)).max() <= 1 / 255 + 1e-5 + rounding
    report = verify(made, "parity", CPU, sample=3)
    assert [finding for finding in report.findings if finding.code != "class-map"] == []
    assert len(report.parity) == 3


def test_a_cache_of_logits_takes_another_temperature_and_a_dropped_channel_takes_no_part(world):
    write(world, "logits", ".npy")
    made = config(world, "logits", cache={"kind": "logits", "bits": 16})
    precompute(made, CPU)
    assert open_targets(made, list_tiles(made.data, "train"), None, CPU).source is not None
    stored = SoftTargetCache.open(made.cache.path).read_logits("Mine/a")
    logits = logits_at(world, "a")
    assert np.abs(stored - (logits - logits.max(axis=0))).max() < 2e-2
    dropped = config(
        world, "logits", teacher={"drop_channels": [1]}, cache={"path": str(world / "dropped.zarr")},
        class_map={"tree": {"green": 1}, "roof": {"grey": 1}},
    )  # fmt: skip
    precompute(dropped, CPU)
    kept = probabilities(logits[[0, 2]]) ** (1 / T)
    found = SoftTargetCache.open(dropped.cache.path).read("Mine/a")
    assert np.abs(found - kept / kept.sum(axis=0)).max() <= 1 / 255 + 1e-5


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_one_channel_of_a_sigmoid_becomes_two(world, kind):
    z = {name: logits_at(world, name)[0] for name in SIZES}
    for name, values in z.items():
        stored = values if kind == "logits" else 1 / (1 + np.exp(-values))
        write_prediction(world / f"saved/{name}.npy", stored[None].astype(np.float32))
    made = config(
        world, kind, teacher={"classes": ["rest", "roof"]}, class_map={"rest": {"green": 1}, "roof": {"grey": 1}}
    )
    precompute(made, CPU)
    shares = np.stack([1 / (1 + np.exp(z["a"])), 1 / (1 + np.exp(-z["a"]))]) ** (1 / T)
    found = SoftTargetCache.open(made.cache.path).read("Mine/a")
    assert np.abs(found - shares / shares.sum(axis=0)).max() <= 1 / 255 + 1e-5


GAP = np.s_[..., 5:20, 8:30]


def with_gap(are):
    def change(stored):
        stored = stored.astype(np.float32) if are != "classes" else stored
        stored[GAP] = 255 if are == "classes" else np.nan
        return stored

    return change


@pytest.mark.parametrize(("are", "kind"), [("probabilities", "soft"), ("classes", "soft"), ("logits", "logits")])
def test_pixels_without_a_prediction_teach_nothing_but_their_labels(world, are, kind):
    write(world, are, ".npy", with_gap(are))
    made = config(world, are, cache={"kind": kind})
    precompute(made, CPU)
    tiles = list_tiles(made.data, "train")
    source = open_targets(made, tiles, None, CPU).source
    target = source.read("Mine/a", (0, 0, *SIZES["a"]))
    gap = np.zeros(SIZES["a"], dtype=bool)
    gap[GAP] = True
    assert (target[:, gap] == 0).all()
    assert np.allclose(target[:, ~gap].sum(axis=0), 1)
    dataset = training_samples(made, tiles, None, source)
    seen = 0
    for sample in (dataset[k] for k in range(12)):
        taught = sample["target"].sum(axis=0) > 0
        assert (taught == sample["inside"]).all()
        assert (sample["mask"][~taught] != 255).any() or taught.all(), "labels teach there too"
        seen += int((~taught).sum())
        logits = torch.randn(1, 2, 32, 32, requires_grad=True)
        batch = {name: torch.from_numpy(sample[name][None].copy()) for name in ("target", "inside")}
        soft_loss(logits, batch["target"], batch["inside"], T).backward()
        assert (logits.grad[0][:, torch.from_numpy(~taught)] == 0).all()
    assert seen > 0
    labels = {subject.id: subject.labels() for subject in subjects(made, tiles, None)}
    assert (labels["Mine/a"][gap] == 255).all()
    assert (labels["Mine/a"][~gap] != 255).all()


def test_a_changed_prediction_or_image_makes_its_own_tile_stale(world):
    write(world, "probabilities", ".npy")
    made = config(world)
    before = precompute(made, CPU).fingerprint
    saved = world / "saved/a.npy"
    os.utime(saved, ns=(1, 1))
    assert precompute(made, CPU).computed == 0, "touched"
    np.savez(world / "saved/a.npz", np.load(saved))
    saved.unlink()
    assert precompute(made, CPU).computed == 0, "saved in another format"
    np.savez(world / "saved/a.npz", np.load(world / "saved/b.npy"))
    with pytest.raises(StaleCache, match=r"1 stale tile.*Mine/a"):
        open_fresh_cache(made, list_tiles(made.data, "train"), None)
    assert [finding.tile for finding in verify(made, "quick", CPU).findings] == ["Mine/a"]
    again = precompute(made, CPU)
    assert (again.computed, again.kept) == (1, 2)
    assert again.fingerprint != before
    pixels = np.asarray(Image.open(image_of(world, "b"))).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(image_of(world, "b"))
    assert precompute(made, CPU).computed == 1
    shutil.move(world / "saved", world / "moved")
    assert precompute(config(world, predictions=str(world / "moved")), CPU).computed == 0, "in another folder"


def test_training_needs_no_predictions_and_stage_one_says_that_they_are_gone(world):
    write(world, "probabilities", ".npy")
    made = config(world)
    precompute(made, CPU)
    shutil.rmtree(world / "saved")
    assert open_fresh_cache(made, list_tiles(made.data, "train"), None).tile_ids
    assert precompute(made, CPU).computed == 0
    with pytest.raises(DataError, match=r"there is no file or folder .*saved"):
        verify(made, "parity", CPU)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(image_of(world, "a"))
    with pytest.raises(StaleCache, match="Mine/a"):
        open_fresh_cache(made, list_tiles(made.data, "train"), None)


def test_a_missing_prediction_is_named_before_the_first_tile(world):
    write(world, "probabilities", ".npy")
    (world / "saved/a.npy").unlink()
    (world / "saved/north/c.npy").unlink()
    with pytest.raises(
        DataError,
        match=r"lack 2 of 3 tiles: Mine/a, Mine/north/c; expected a file such as a.npy",
    ):
        precompute(config(world), CPU)
    assert not (world / "probabilities.zarr").exists()


@pytest.mark.parametrize("name", ["north/c.npy", "Mine/north/c.npy", "c.npy"])
def test_a_file_is_named_by_the_id_or_its_end(world, name):
    write(world, "probabilities", ".npy")
    (world / "saved/Mine/north").mkdir(parents=True)
    shutil.move(world / "saved/north/c.npy", world / "saved" / name)
    assert precompute(config(world), CPU).computed == 3


def test_two_files_of_a_tile_and_two_tiles_of_a_file_are_refused(world):
    write(world, "probabilities", ".npy")
    shutil.copy(world / "saved/a.npy", world / "saved/a.tif")
    with pytest.raises(DataError, match="two files hold the prediction of Mine/a"):
        precompute(config(world), CPU)
    (world / "saved/a.tif").unlink()
    shutil.copytree(world / "data/Mine", world / "data/Other")
    both = config(world, data={"train": [str(world / "data/Mine"), str(world / "data/Other")]})
    with pytest.raises(
        DataError, match=r"a.npy may be the prediction of Mine/a or of Other/a: name it by the tile's id"
    ):
        precompute(both, CPU)


WRONG = {
    "sums": ("probabilities", lambda p: p * 1.1, "channels that sum to 1.1, and the probabilities"),
    "negative": ("probabilities", lambda p: p - [[[0.5]], [[-0.25]], [[-0.25]]], "values down to -0.*set teacher.are: logits"),
    "whole numbers": ("probabilities", to_bytes, r"holds uint8 values up to \d+ and declares no scale"),
    "half NaN": ("probabilities", lambda p: np.concatenate([p[:1] * np.nan, p[1:]]), r"NaN or infinity in some channels of 2080 pixels"),
    "infinite": ("logits", lambda z: z / 0.0 if False else np.where(z > z.mean(), np.inf, z), "NaN or infinity in some channels"),
    "channels": ("logits", lambda z: z[:2], r"shape \(2, 40, 52\), and its tile needs \(3, 40, 52\): .*Save every channel"),
    "turned": ("logits", lambda z: z.transpose(1, 2, 0), r"This is \(H, W, C\): save scores.transpose\(2, 0, 1\)"),
    "batch": ("logits", lambda z: z[None], "This is a batch of one"),
    "other size": ("logits", lambda z: z[:, 1:], "Resize the scores to the tile's size"),
    "text": ("logits", lambda z: z.astype("U3"), "are: logits needs numbers"),
    "class beyond": ("classes", lambda c: c + 1, r"holds 3, no index of teacher.classes \(0..2\): name every class"),
    "scores as classes": ("classes", lambda c: np.stack([c] * 3), "are: classes needs one index for each pixel"),
    "floats as classes": ("classes", lambda c: c.astype(np.float32), "needs integers, the index of a class"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_values_that_are_not_what_the_configuration_says_are_refused_before_the_first_tile(world, fault):
    are, change, message = WRONG[fault]
    write(world, are, ".npy", change)
    with pytest.raises(DataError, match=message):
        precompute(config(world, are), CPU)
    assert not (world / f"{are}.zarr").exists()


def test_a_damaged_file_fails_alone_and_names_its_tile(world):
    write(world, "probabilities", ".npy")
    (world / "saved/b.npy").write_bytes((world / "saved/b.npy").read_bytes()[:900])
    summary = precompute(config(world), CPU)
    assert list(summary.failed) == ["Mine/b"]
    assert "saved/b.npy" in summary.failed["Mine/b"]
    assert summary.computed == 2
    assert summary.fingerprint is None


@pytest.mark.parametrize(
    ("teacher", "distill", "message"),
    [
        ({"tta": "flips"}, {}, "tta is flips, but predictions were made already"),
        ({"scales": [1.0, 2.0]}, {}, r"scales is \[1.0, 2.0\], but predictions"),
        ({"window": 512}, {}, "window is 512, but predictions"),
        ({"normalize": "imagenet"}, {}, "normalize is imagenet, but predictions"),
        ({"bands": [1]}, {}, "bands is .*, but predictions"),
        ({"precision": "bf16"}, {}, "precision is bf16, but predictions"),
        ({"checkpoint": "x.pth"}, {}, "checkpoint does not go with predictions"),
        ({"are": None}, {}, "are is missing: predictions needs it"),
        ({}, {"teacher_view": "crop"}, "distill.teacher_view: crop needs a network"),
        ({}, {"mode": "online"}, "distill.mode: online asks a network at each step"),
    ],
)  # fmt: skip
def test_what_needs_a_network_is_refused_with_the_reason(tmp_path, teacher, distill, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, teacher=teacher, distill=distill)


def test_several_teachers_are_refused_with_predictions(tmp_path):
    one = config(tmp_path).model_dump(mode="json")
    with pytest.raises(ConfigError, match="teachers.0.predictions stand alone"):
        parse_config(one | {"teacher": None, "teachers": [one["teacher"], one["teacher"]]}, "test")


FOUND = {
    "logits": (".npy", "float32 (3, 40, 52)", "logits"),
    "probabilities": (".tif", "float32 (3, 40, 52)", "probabilities"),
    "classes": (".npz", "uint8 (40, 52)", "classes"),
}


@pytest.mark.parametrize("are", FOUND)
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_inspect_and_init_say_what_a_folder_of_predictions_holds(world, are):
    ending, shape, guess = FOUND[are]
    write(world, are, ending)
    found = run_command("inspect", world / "saved")
    assert found.returncode == 0, found.stderr
    said = " ".join(found.stdout.split())
    assert f"3 files of predictions, the first of {shape}" in said
    assert f"predictions: {world / 'saved'} are: {guess}" in said
    made = run_command(
        "init", "data/Mine", "--teacher", "saved", "--teacher-classes", ",".join(TEACHER), "--out", "mine.yaml"
    )
    assert made.returncode == 0, made.stderr
    text = (world / "mine.yaml").read_text()
    assert "predictions: saved" in text
    assert f"are: {guess}" in text
    assert "normalize" not in text[text.index("teacher:") : text.index("class_map:")]
