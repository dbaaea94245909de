"""An ONNX file that was damaged, changed, badly described or made to harm is refused before this process runs it."""

import json

import numpy as np
import onnx
import psutil
import pytest
import torch
from onnx import TensorProto, helper

from kdpipe.configs.errors import CheckpointError
from kdpipe.pipeline.models.external.onnx_file import SEAL_KEY, UNSEALED, seal
from kdpipe.pipeline.prediction.model import open_predictor

CARD = {
    "format": 1, "run": "r", "step": 1, "network": "n", "checkpoint_sha256": "0" * 64, "classes": ["A", "B"],
    "palette": [[0, 0, 0], [9, 9, 9]], "ignore_index": 255, "bands": [1, 2, 3], "stretch": None, "mean": [0, 0, 0], "std": [1, 1, 1],
    "sizes": "any", "kdpipe": "1",
}  # fmt: skip
WEIGHTS = np.float32([[1, 0, 0], [0, 1, 0]])  # of two classes: the first two bands
CONV = helper.make_node("Conv", ["images", "W"], ["logits"])


def write(path, nodes=(CONV,), *, image="images", out="logits", sealed=False, tensors=(), **card):
    weights = helper.make_tensor("W", TensorProto.FLOAT, [2, 3, 1, 1], WEIGHTS.ravel().tolist())
    values = [
        helper.make_tensor_value_info(image, TensorProto.FLOAT, ["n", 3, "h", "w"]),
        helper.make_tensor_value_info(out, TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph(list(nodes), "g", values[:1], values[1:], [weights, *tensors])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    props = {"kdpipe": json.dumps({**CARD, **card}), **({SEAL_KEY: UNSEALED} if sealed else {})}
    helper.set_model_props(model, props)
    path.write_bytes(model.SerializeToString())
    if sealed:
        seal(path)
    return path


@pytest.mark.long
def test_a_sealed_file_and_one_without_a_seal_predict_what_their_weights_say(tmp_path):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 5, 7), dtype=np.uint8))
    expected = np.einsum("cb,nbhw->nchw", WEIGHTS, images.numpy() / np.float32(255))
    for sealed in (True, False):
        predictor = open_predictor(write(tmp_path / "m.onnx", sealed=sealed), "cpu")
        np.testing.assert_allclose(predictor.logits(images).numpy(), expected, atol=1e-6)


def test_every_changed_byte_of_a_sealed_file_is_noticed_before_it_is_run(tmp_path, monkeypatch):
    path = write(tmp_path / "m.onnx", sealed=True)
    whole = path.read_bytes()
    key = range(whole.index(SEAL_KEY.encode()), whole.index(SEAL_KEY.encode()) + len(SEAL_KEY))
    monkeypatch.setattr("subprocess.run", lambda *arguments, **options: pytest.fail("it was run"))
    for place in range(len(whole)):
        if place in key:  # without its key, a file has no seal
            continue
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(
            CheckpointError, match=r"m\.onnx is not what `kdpipe export` wrote: its content does not fit the digest"
        ):
            open_predictor(path, "cpu")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"ignore_index": 10**9}, "ignore_index: Input should be less than or equal to 65535"),
        ({"ignore_index": -1}, "ignore_index: Input should be greater than or equal to 0"),
        ({"ignore_index": 1}, "ignore_index 1 is also the index of a class"),
        ({"bands": [0, 1, 2]}, "bands.0: Input should be greater than or equal to 1"),
        ({"stretch": [[1, 1]] * 3}, "stretch.0: a stretch needs low < high, found 1, 1"),
        ({"stretch": [[0, 1]]}, "stretch has 1 entries for 3 bands"),
        ({"std": [0, 1, 1]}, "std.0: Input should be greater than 0"),
        ({"mean": [0, 1]}, "mean has 2 entries for 3 bands"),
        ({"palette": [[999, 0, -5], [0, 0, 0]]}, "palette.0.0: Input should be less than or equal to 255"),
        ({"palette": [[0, 0, 0]]}, "palette has 1 colours for 2 classes"),
        ({"format": 2}, "format: Input should be 1"),
    ],
    ids=str,
)
def test_a_description_that_cannot_be_is_refused(card, message, tmp_path, monkeypatch):
    text = json.dumps({**CARD, **card})
    monkeypatch.setattr(
        "kdpipe.pipeline.prediction.model.described", lambda path, key: text
    )  # the trial has its own tests
    with pytest.raises(CheckpointError, match=f"has a description that this version cannot read: .*{message}"):
        open_predictor(write(tmp_path / "m.onnx", **card), "cpu")


HALF = helper.make_node("Conv", ["images", "W"], ["logits"], strides=[2, 2])
FLAT = [
    helper.make_node("Conv", ["images", "W"], ["c"]),
    helper.make_node("ReduceMax", ["c"], ["logits"], axes=[1], keepdims=0),
]
HUGE = [helper.make_node("Expand", ["images", "shape"], ["e"]), helper.make_node("Conv", ["e", "W"], ["logits"])]
HUGE_SHAPE = helper.make_tensor("shape", TensorProto.INT64, [4], [4000, 3, 1024, 1024])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "x", "nodes": [helper.make_node("Conv", ["x", "W"], ["logits"])]}, r"its inputs are \['x'\]"),
        ({"out": "y", "nodes": [helper.make_node("Conv", ["images", "W"], ["y"])]}, r"its outputs \['y'\]"),
        ({"classes": ["A", "B", "C"], "palette": [[0, 0, 0]] * 3}, r"by float32 of the shape \(1, 2, 128, 128\), expected .*1, 3,"),
        ({"nodes": [HALF]}, r"by float32 of the shape \(1, 2, 64, 64\)"),
        ({"nodes": FLAT}, r"by float32 of the shape \(1, 128, 128\)"),
        ({"nodes": HUGE, "tensors": [HUGE_SHAPE]}, "m.onnx is not a (network that predict can run|readable ONNX file)"),
    ],
    ids=["input", "output", "classes", "half the size", "three dimensions", "48 GiB"],
)  # fmt: skip
def test_a_network_of_another_form_is_tried_in_another_process_and_refused(options, message, tmp_path):
    path = write(tmp_path / "m.onnx", **options)
    before = psutil.Process().memory_info().rss
    with pytest.raises(CheckpointError, match=message):
        open_predictor(path, "cpu")
    assert psutil.Process().memory_info().rss - before < 200e6


def test_a_process_that_dies_of_the_file_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(CheckpointError, match=r"m\.onnx is not a readable ONNX file: it ends the process that runs it"):
        open_predictor(write(tmp_path / "m.onnx"), "cpu")


def test_nothing_is_imported_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("open('canary', 'w')")
    monkeypatch.chdir(tmp_path)
    open_predictor(write(tmp_path / "m.onnx"), "cpu")
    assert not (tmp_path / "canary").exists()


def test_tensors_in_other_files_of_the_machine_are_not_read(tmp_path):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(WEIGHTS.tobytes())
    (tmp_path / "inner").mkdir()
    path = write(tmp_path / "inner/m.onnx")
    model = onnx.load(str(path))
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../secret.bin"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"m\.onnx is not a readable ONNX file"):
        open_predictor(path, "cpu")
