"""Maps from files that answer with classes, and from four bands: expected values come from NumPy, rasterio and onnxruntime alone."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import rasterio
import torch
from helpers.commands import run_command
from helpers.configs import ENCODER
from helpers.files import noise, read_raster, write_scene
from helpers.map_process import NAMES, predictor

from kdpipe.configs import load_config
from kdpipe.configs.errors import CheckpointError, ConfigError
from kdpipe.pipeline.models.windows import cut_spans
from kdpipe.pipeline.prediction import export, graphs
from kdpipe.pipeline.prediction.maps import predict
from kdpipe.pipeline.prediction.model import card_of, open_predictor
from kdpipe.pipeline.runs.checkpoint import load_trained
from kdpipe.pipeline.training.run import train, with_mode

OHIO = Path(__file__).resolve().parents[3] / "shared" / "data" / "ohio"


@pytest.mark.parametrize("size", [1, 31, 64, 65, 96, 200, 1000])
def test_each_pixel_belongs_to_the_window_in_which_it_is_farthest_from_the_border(size):
    found = cut_spans(size, 64, 32)
    padded = -(-size // 32) * 32
    owner = np.full(padded, -1)
    for number, span in enumerate(found):
        mine = span.start + np.flatnonzero(span.shares.numpy())
        assert set(np.unique(span.shares)) <= {0.0, 1.0}
        assert (owner[mine] == -1).all()
        owner[mine] = number
    assert (owner >= 0).all()
    starts = np.array([span.start for span in found])
    place = np.arange(padded)[:, None] + 0.5
    margin = np.minimum(
        place - np.where(starts == 0, -np.inf, starts), np.where(starts + 64 >= padded, np.inf, starts + 64) - place
    )
    assert (margin[np.arange(padded), owner] == margin.max(axis=1)).all()


def test_windows_of_classes_are_cut_in_the_middle_of_what_they_share(tmp_path):
    """Each window has a class of its own, so that the map shows which window a pixel was taken from."""
    scene = write_scene(tmp_path / "scene.tif", noise(96, 200))
    calls = []

    def logits(images_NCHW):
        calls.append(len(images_NCHW))
        classes = torch.full(images_NCHW[:, 0].shape, (len(calls) - 1) % 3)
        return torch.nn.functional.one_hot(classes, 3).permute(0, 3, 1, 2).float()

    summary = predict(predictor(logits, output="classes"), [str(scene)], tmp_path / "out", window=64, overlap=32)
    # Windows begin at 0 and 32 down, and at 0, 32, … 160 across: their cuts are 16 px from the border of a neighbour.
    rows, columns = np.digitize(np.arange(96), [48]), np.digitize(np.arange(200), [48, 80, 112, 144, 176])
    expected = (rows[:, None] * 6 + columns) % 3
    np.testing.assert_array_equal(read_raster(tmp_path / "out" / "scene.tif")[0], expected)
    assert len(calls) == 12
    assert not summary.blended
    with rasterio.open(tmp_path / "out" / "scene.tif") as found:
        assert found.tags()["windows"] == "64 px, 32 px shared, TTA none, not blended"


@pytest.mark.long
def test_what_needs_scores_is_refused_for_a_file_of_classes(trained, landscape, tmp_path):
    (tile,) = list((landscape / "Val" / "images").iterdir())[:1]
    assert run_command("export", trained, "--argmax", "--timed-size", "32").returncode == 0
    for option in ("--confidence", "--probabilities"):
        done = run_command(
            "predict", "--checkpoint", "best.argmax.onnx", tile, "--out", "maps", option, "--device", "cpu"
        )
        assert done.returncode == 2
        assert "best.argmax.onnx answers with classes, and has no probabilities for --confidence or" in done.stderr
    with pytest.raises(ConfigError, match=r"--tta d4 averages logits, and best\.argmax\.onnx answers with classes"):
        open_predictor("best.argmax.onnx", "cpu", tta="d4")
    done = run_command("predict", "--checkpoint", "best.argmax.onnx", tile, "--out", "maps", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "cut in the middle, as classes cannot be blended" in done.stdout


def test_a_class_that_is_not_described_is_refused(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    nodes = [helper.make_node("ReduceMax", ["images"], ["most"], axes=[1], keepdims=0),
             helper.make_node("Cast", ["most"], ["classes"], to=TensorProto.UINT8)]  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("classes", TensorProto.UINT8, ["n", "h", "w"])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    card = predictor(output="classes", std=(0.0039,) * 3).card
    graphs.write_graph(model, card, tmp_path / "a.onnx")
    opened = open_predictor(tmp_path / "a.onnx", "cpu")
    found = opened.logits(torch.full((1, 3, 32, 32), len(NAMES) - 1, dtype=torch.uint8))
    assert found.argmax(dim=1).unique().tolist() == [2]
    with pytest.raises(CheckpointError, match=r"a\.onnx answers with the class 7, and describes 3 classes"):
        opened.logits(torch.full((1, 3, 32, 32), 7, dtype=torch.uint8))
    graphs.write_graph(
        onnx.load(str(tmp_path / "a.onnx")), card.model_copy(update={"output": "logits"}), tmp_path / "b.onnx"
    )
    with pytest.raises(CheckpointError, match=r"its outputs \['classes'\]"):
        open_predictor(tmp_path / "b.onnx", "cpu")


@pytest.fixture
def ohio_student(tmp_path, monkeypatch):
    """A student of four bands whose weights are random, and whose classes differ from pixel to pixel."""
    if not OHIO.is_dir():
        pytest.skip(f"needs the tiles of Ohio in {OHIO}")
    monkeypatch.chdir(tmp_path)
    changes = {
        "data.train": [str(OHIO / "scene_a")], "data.val": [str(OHIO / "scene_d")], "data.limit": 2, "train.max_steps": 1,
        "train.crop": 64, "train.batch_size": 2, "student.encoder": ENCODER, "name": "ohio", "train.epochs": 1,
    }  # fmt: skip
    config = load_config("ohio/teacher", tuple(f"{key}={value}" for key, value in changes.items()))
    train(with_mode(config, "none"), torch.device("cpu"))
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    content = torch.load(checkpoint, weights_only=True)
    for name, value in content["state_dict"].items():
        if "segmentation_head" in name and name.endswith("bias"):
            value.zero_()
        if "segmentation_head" in name and name.endswith("weight"):
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    torch.save(content, checkpoint)
    return checkpoint


@pytest.mark.long
def test_maps_of_real_tiles_of_four_bands_are_those_of_onnxruntime_by_hand(ohio_student, tmp_path):
    trained = load_trained(ohio_student).alone()
    source = tmp_path / "student.onnx"
    with export.exporting("onnx", "a network"):
        export.WRITERS["onnx"](trained.student, source, card_of(trained, ohio_student, "any size"))
    import onnx

    card = card_of(trained, ohio_student, "any size").model_copy(update={"output": "classes"})
    graphs.write_graph(graphs.with_classes(onnx.load(str(source))), card, tmp_path / "classes.onnx")
    scene = sorted((OHIO / "scene_d" / "images").iterdir())[0]
    with rasterio.open(scene) as raster:
        pixels, place, crs = raster.read(), raster.transform, raster.crs
    assert pixels.shape == (4, 256, 256)
    session = onnxruntime.InferenceSession(str(source))
    inputs = (pixels / 255).astype(np.float32)[None]

    predict(open_predictor(source, "cpu"), [str(scene)], tmp_path / "whole", window=256)
    logits = session.run(["logits"], {"images": inputs})[0][0]
    ranked = np.sort(logits, axis=0)
    clear = ranked[-1] - ranked[-2] > 1e-4
    found = read_raster(tmp_path / "whole" / f"{scene.stem}.tif")[0]
    np.testing.assert_array_equal(found[clear], logits.argmax(axis=0)[clear])
    assert clear.mean() > 0.99
    assert len(np.unique(found)) > 2
    with rasterio.open(tmp_path / "whole" / f"{scene.stem}.tif") as raster:
        assert (raster.transform, raster.crs) == (place, crs)

    # Of classes: windows of 128 px that begin at 0, 64 and 128 px, and are cut at 96 and 160 px.
    predict(open_predictor(tmp_path / "classes.onnx", "cpu"), [str(scene)], tmp_path / "cut", window=128, overlap=32)
    expected, sure = np.zeros((256, 256), int), np.zeros((256, 256), bool)
    for top, first_row, last_row in ((0, 0, 96), (64, 96, 160), (128, 160, 256)):
        for left, first, last in ((0, 0, 96), (64, 96, 160), (128, 160, 256)):
            window = inputs[..., top : top + 128, left : left + 128]
            scores = session.run(["logits"], {"images": np.ascontiguousarray(window)})[0][0]
            inside = np.s_[first_row - top : last_row - top, first - left : last - left]
            ranked = np.sort(scores, axis=0)
            expected[first_row:last_row, first:last] = scores.argmax(axis=0)[inside]
            sure[first_row:last_row, first:last] = (ranked[-1] - ranked[-2] > 1e-4)[inside]
    found = read_raster(tmp_path / "cut" / f"{scene.stem}.tif")[0]
    np.testing.assert_array_equal(found[sure], expected[sure])
    assert sure.mean() > 0.99
