"""Any number of bands, from tiles to maps: expected values are those of the network on rasterio's own bands, normalised in NumPy."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.banded import (
    NAMES,
    H,
    W,
    config_of,
    inputs_by_hand,
    logits_by_hand,
    softmax,
    write_teacher,
    write_tiles,
)
from helpers.commands import run_command
from helpers.doubles import Lines
from helpers.files import read_raster, write_tiff

from kdpipe.cache import SoftTargetCache, StaleCache
from kdpipe.configs.errors import CheckpointError, ConfigError
from kdpipe.pipeline.evaluation.evaluate import evaluate, student_model, teacher_model
from kdpipe.pipeline.models.normalize import IMAGENET_MEAN, IMAGENET_STD
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.prediction.export import export_student
from kdpipe.pipeline.prediction.maps import predict
from kdpipe.pipeline.prediction.model import open_predictor
from kdpipe.pipeline.teacher.frozen import open_teacher
from kdpipe.pipeline.training.run import train
from kdpipe.pipeline.verify.class_map import suggest_map
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")
MEAN, STD = (0.3, 0.4, 0.5, 0.2), (0.2, 0.25, 0.3, 0.15)
RANGES = [(0.0, 4000.0 + 500 * i) for i in range(12)]
S2 = [4, 3, 2, 8, 12]  # of Sentinel-2's twelve: red, green, blue, infrared, short-wave infrared

# Bands of the files, their type, keys of `data` and `teacher`, and by the file's numbers what the teacher sees and its stretch.
WORLDS = {
    "4 bands": {
        "bands": 4, "dtype": "uint8", "sees": [4, 1, 2, 3], "stretch": None, "student": [1, 2, 3],
        "data": {"bands": [1, 2, 3, 4], "band_names": NAMES},
        "teacher": {"bands": ["nir", "red", "green", "blue"], "normalize": {"mean": list(MEAN), "std": list(STD)}},
        "mean": MEAN, "std": STD,
    },
    "12 bands of 16 bits": {
        "bands": 12, "dtype": "uint16", "sees": S2, "stretch": [RANGES[number - 1] for number in S2], "student": [8, 4],
        "data": {"bands": list(range(1, 13)), "stretch": {"range": [list(pair) for pair in RANGES]}},
        "teacher": {"bands": S2}, "mean": [0] * 5, "std": [1] * 5,
    },
}  # fmt: skip
STUDENTS = {"4 bands": ["red", "green", "blue"], "12 bands of 16 bits": [8, 4]}


@pytest.fixture(scope="module", params=list(WORLDS))
def world(request, tmp_path_factory):
    """A complete cache and a student of fewer bands than its teacher, trained for two steps."""
    given = SimpleNamespace(name=request.param, **WORLDS[request.param])
    given.folder = tmp_path_factory.mktemp("bands")
    write_tiles(given.folder / "Train", given.bands, given.dtype)
    write_tiles(given.folder / "Val", given.bands, given.dtype, count=1, seed=9)
    given.teacher_file = write_teacher(given.folder / "teacher.pth", len(given.sees))
    given.make = partial(config_of, given.folder, given.teacher_file, given.data, given.teacher)
    given.config = given.make({"bands": STUDENTS[given.name]})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(given.folder)
        assert not precompute(given.config, CPU).failed
        train(given.config, CPU)
    given.checkpoint = given.folder / "model_weights/tests/banded/last.ckpt"
    return given


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world.folder)
    return world


def student_state(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {name.removeprefix("student."): value for name, value in saved.items()}


def student_inputs(world, path):
    count = len(world.student)
    mean, std = ([values[i % 3] for i in range(count)] for values in (IMAGENET_MEAN, IMAGENET_STD))
    stretch = None if world.stretch is None else [RANGES[number - 1] for number in world.student]
    return inputs_by_hand(path, world.student, mean, std, stretch)


def test_soft_targets_are_those_of_the_network_on_the_bands_that_the_teacher_sees(here):
    cache = SoftTargetCache.open(here.config.cache.path)
    state = torch.load(here.teacher_file, weights_only=True)
    for number in range(3):
        inputs = inputs_by_hand(
            here.folder / f"Train/images/t{number}.tif", here.sees, here.mean, here.std, here.stretch
        )
        mapped = np.einsum("thw,ts->shw", softmax(logits_by_hand(state, inputs)), here.config.class_map_matrix())
        expected = mapped**0.5 / (mapped**0.5).sum(axis=0)
        np.testing.assert_allclose(cache.read(f"Train/t{number}"), expected, rtol=0, atol=1 / 255 + 1e-4)
    assert cache.manifest.recipe.bands == here.sees
    assert cache.manifest.recipe.stretch == (here.stretch and [list(pair) for pair in here.stretch])


@pytest.mark.long
def test_a_student_of_fewer_bands_draws_the_map_of_its_own_bands(here, tmp_path):
    scene = here.folder / "Val/images/t0.tif"
    summary = predict(open_predictor(here.checkpoint, "cpu"), [str(scene)], tmp_path)
    logits = np.sort(expected := logits_by_hand(student_state(here.checkpoint), student_inputs(here, scene)), axis=0)
    clear = logits[-1] - logits[-2] > 1e-4
    assert clear.mean() > 0.99
    found = read_raster(summary.maps[0].files["classes"])[0]
    np.testing.assert_array_equal(found[clear], expected.argmax(axis=0)[clear])
    assert summary.maps[0].notes == []


@pytest.mark.long
def test_an_exported_student_has_as_many_inputs_and_names_its_bands(here, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    export_student(here.checkpoint, "onnx", tmp_path / "student.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "student.onnx"))
    scene = here.folder / "Val/images/t0.tif"
    inputs = student_inputs(here, scene)
    (found,) = session.run(["logits"], {"images": inputs.numpy()})
    np.testing.assert_allclose(found[0], logits_by_hand(student_state(here.checkpoint), inputs), atol=1e-3)
    card = json.loads(session.get_modelmeta().custom_metadata_map["kdpipe"])
    assert (card["bands"], card["image_bands"]) == (here.student, here.bands)
    names = {name: number for name, number in NAMES.items() if number in here.student}
    assert card.get("band_names", {}) == (names if "band_names" in here.data else {})
    maps = [
        read_raster(
            predict(open_predictor(file, "cpu"), [str(scene)], tmp_path / file.suffix[1:]).maps[0].files["classes"]
        )
        for file in (here.checkpoint, tmp_path / "student.onnx")
    ]
    assert (maps[0] == maps[1]).mean() > 0.999


@pytest.mark.long
def test_the_gate_passes_and_what_runs_the_teacher_runs(here):
    report = verify(here.config, "parity", CPU, sample=2)
    assert [finding for finding in report.findings if finding.code != "class-map"] == []  # its weights are random
    assert len(report.parity) == 2
    assert evaluate(teacher_model(here.config, CPU, tta="flips", window=64)).together.tiles == 1
    assert len(suggest_map(here.config, CPU, sample=2).rows) == 3


@pytest.mark.long
def test_the_owners_scores_are_compared_over_the_same_bands_and_another_order_is_explained(here, tmp_path):
    state = torch.load(here.teacher_file, weights_only=True)
    path = here.folder / "Train/images/t0.tif"
    fed = {
        "own": inputs_by_hand(path, here.sees, here.mean, here.std, here.stretch),
        "swapped": inputs_by_hand(path, here.sees[::-1], here.mean, here.std, here.stretch and here.stretch[::-1]),
    }
    for name, inputs in fed.items():
        (tmp_path / name / "Train").mkdir(parents=True)
        np.save(tmp_path / name / "Train/t0.npy", logits_by_hand(state, inputs).astype(np.float32))
    assert verify(here.config, "quick", CPU, reference=tmp_path / "own").findings == []
    (finding,) = verify(here.config, "quick", CPU, reference=tmp_path / "swapped").findings
    assert (
        f"feeds the bands {here.sees[::-1]}: set teacher.bands: {here.sees[::-1]}; then the largest" in finding.message
    )


@pytest.mark.long
def test_another_band_of_the_student_keeps_the_cache_and_one_of_the_teacher_makes_it_stale(here):
    said = Lines()
    numbers = here.student[::-1] if here.bands == 4 else [1, 2, 3]
    kept = here.make({"bands": numbers}, train__max_steps=1)
    assert not precompute(kept, CPU, progress=said).computed
    train(kept.model_copy(update={"name": "other"}), CPU)
    changed = here.make({}, teacher__bands=here.sees[::-1])
    with pytest.raises(StaleCache, match=r"bands: the cache has \[.*\], the configuration says"):
        precompute(changed, CPU)
    if here.stretch is None:  # a band that the student alone sees
        return
    fewer = [number for number in range(1, 13) if number != 11]
    ranges = [list(RANGES[number - 1]) for number in fewer]
    config = here.make({"bands": [8, 4]}, data__bands=fewer, data__stretch={"range": ranges})
    assert not precompute(config, CPU).computed


@pytest.mark.long
def test_recorded_views_show_the_teacher_its_own_bands(here, tmp_path):
    views = {"distill__teacher_view": "crop", "cache__views": 2, "cache__path": str(tmp_path / "views.zarr"),
             "train__photometric": 1.0, "train__max_steps": 1}  # fmt: skip
    config = here.make({"bands": STUDENTS[here.name]}, **views)
    assert not precompute(config, CPU).failed
    assert verify(config, "full", CPU).findings == []
    fewer = here.make({"bands": STUDENTS[here.name][:1]}, **views)
    assert not precompute(fewer, CPU).computed
    train(fewer.model_copy(update={"name": "views"}), CPU)
    train(
        config.model_copy(update={"name": "online", "distill": config.distill.model_copy(update={"mode": "online"})}),
        CPU,
    )
    with pytest.raises(StaleCache, match=r"views.visible: the cache has"):
        precompute(here.make({"bands": STUDENTS[here.name]}, data__visible=[2, 1, 3], **views), CPU)


def test_a_scene_of_another_number_of_bands_is_said_or_refused(here, tmp_path):
    pixels = read_raster(here.folder / "Val/images/t0.tif")
    more = write_tiff(tmp_path / "more.tif", np.concatenate([pixels, pixels[:1]]), photometric="minisblack", alpha="no")
    fewer = write_tiff(tmp_path / "fewer.tif", pixels[: max(here.student) - 1], photometric="minisblack", alpha="no")
    summary = predict(open_predictor(here.checkpoint, "cpu"), [str(more), str(fewer)], tmp_path / "maps")
    (drawn,) = summary.maps
    (note,) = drawn.notes
    assert note.startswith(f"it has {here.bands + 1} bands and the training images had {here.bands}: bands")
    reason = summary.failed[str(fewer)]
    assert f"and the student was trained on bands {here.student} of images with {here.bands}" in reason


@pytest.mark.long
def test_an_rgb_student_of_a_teacher_that_sees_infrared_is_scored_and_mapped_where_there_is_none(here, tmp_path):
    if here.bands != 4:
        pytest.skip("the other student sees infrared")
    write_tiles(tmp_path / "All", 4, "uint8", count=2, seed=4)
    for number in range(2):
        pixels = read_raster(tmp_path / f"All/images/t{number}.tif")
        write_tiff(tmp_path / f"RGB/images/t{number}.tif", pixels[:3], photometric="rgb")
        (tmp_path / "RGB/masks").mkdir(exist_ok=True)
        (tmp_path / f"RGB/masks/t{number}.png").write_bytes((tmp_path / f"All/masks/t{number}.png").read_bytes())
    done = {}
    for root in ("All", "RGB"):
        result = run_command(
            "evaluate", here.checkpoint, tmp_path / root, "--json", tmp_path / f"{root}.json", "--device", "cpu"
        )
        assert result.returncode == 0, result.stderr
        done[root] = json.loads((tmp_path / f"{root}.json").read_text())["together"]["confusion"]
    assert done["All"] == done["RGB"]
    model = student_model(here.checkpoint, CPU, tta=None, window=None)
    assert model.config.data.bands == (1, 2, 3, 4)  # with the teacher's, as reports need


def test_weights_for_another_number_of_bands_are_refused_with_the_keys(here):
    config = here.make({}, teacher__bands=here.sees[:2], teacher__normalize="unit")
    with pytest.raises(
        CheckpointError,
        match=rf"for images of {len(here.sees)} bands, and the network sees 2: set the bands of teacher",
    ):
        precompute(config.model_copy(update={"cache": config.cache.model_copy(update={"path": "other.zarr"})}), CPU)
    student = here.make({"bands": STUDENTS[here.name], "checkpoint": str(here.teacher_file)}, train__max_steps=1)
    with pytest.raises(
        (CheckpointError, ConfigError), match=rf"for images of {len(here.sees)} bands, and the network sees"
    ):
        train(student.model_copy(update={"name": "wrong"}), CPU)


@pytest.mark.long
def test_several_teachers_may_see_different_bands(here, tmp_path):
    other = write_teacher(tmp_path / "two.pth", 2)
    first = here.config.teacher
    second = first.model_copy(update={"checkpoint": str(other), "bands": here.sees[:2], "normalize": "unit"})
    both = here.config.model_copy(update={"teacher": None, "teachers": [first, second],
                                          "cache": here.config.cache.model_copy(update={"path": str(tmp_path / "both.zarr")})})  # fmt: skip
    assert not precompute(both, CPU).failed
    cache = SoftTargetCache.open(both.cache.path)
    recipe = cache.manifest.recipe
    assert (recipe.bands, [record.bands for record in recipe.teachers]) == (
        sorted(here.sees),
        [here.sees, here.sees[:2]],
    )
    path = here.folder / "Train/images/t0.tif"
    states = [torch.load(file, weights_only=True) for file in (here.teacher_file, other)]
    inputs = [
        inputs_by_hand(path, here.sees, here.mean, here.std, here.stretch),
        inputs_by_hand(path, here.sees[:2], [0] * 2, [1] * 2, here.stretch and here.stretch[:2]),
    ]
    mean = sum(logits_by_hand(*pair) for pair in zip(states, inputs, strict=True)) / 2
    mapped = np.einsum("thw,ts->shw", softmax(mean), both.class_map_matrix()) ** 0.5
    np.testing.assert_allclose(cache.read("Train/t0"), mapped / mapped.sum(axis=0), rtol=0, atol=1 / 255 + 1e-4)
    swapped = both.model_copy(update={"teachers": [first, second.model_copy(update={"bands": here.sees[1::-1]})]})
    with pytest.raises(StaleCache, match=r"teachers.1.bands: the cache has"):
        precompute(swapped, CPU)


@pytest.mark.long
def test_windows_of_a_scene_read_by_rows_are_those_of_the_whole_image(here, tmp_path):
    """A tile larger than the window is predicted band by band of rows; `open_teacher` predicts it as a whole."""
    teacher = {**here.teacher, "window": 64}
    config = config_of(
        here.folder, here.teacher_file, here.data, teacher, {}, cache__path=str(tmp_path / "windows.zarr")
    )
    precompute(config, CPU)
    cache = SoftTargetCache.open(config.cache.path)
    from kdpipe.data.rasters import read_image

    image = read_image(here.folder / "Train/images/t0.tif", config.data.bands, config.data.stretch and RANGES)
    assert image.shape == (H, W, len(config.data.bands))
    live = open_teacher(config, cache.manifest.recipe, CPU).soft_targets(image[None])[0]
    np.testing.assert_allclose(cache.read("Train/t0"), live, rtol=0, atol=1 / 255 + 1e-4)
