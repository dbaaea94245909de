"""Smaller files and files of classes: what is in them, that they are compared rightly, and that none is kept that is too bad."""

import json
import os
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.commands import run_command
from helpers.doubles import Lines
from helpers.files import read_raster
from PIL import Image
from test_export import CARD, student

from kdpipe.configs import dump_config
from kdpipe.configs.errors import ConfigError, DiskFull, KdpipeError
from kdpipe.pipeline.prediction import export, graphs, variants
from kdpipe.pipeline.prediction.agreement import latencies, tiles_to_verify
from kdpipe.pipeline.prediction.maps import predict
from kdpipe.pipeline.prediction.model import open_predictor
from kdpipe.pipeline.prediction.variants import Variant, export_variants

pytestmark = pytest.mark.long

ALL = [Variant(precision, argmax) for precision in ("fp16", "int8") for argmax in (False, True)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def run(path, image_HWC, output):
    """The answer of a file, by onnxruntime and NumPy alone."""
    inputs = ((image_HWC / 255 - MEAN) / STD).astype(np.float32).transpose(2, 0, 1)[None]
    return onnxruntime.InferenceSession(str(path)).run([output], {"images": inputs})[0][0]


def card_in(path):
    return json.loads({each.key: each.value for each in onnx.load(str(path)).metadata_props}["kdpipe"])


def nodes(model, op):
    return [node for node in model.graph.node if node.op_type == op]


@pytest.fixture
def written(trained, made):
    """`best.onnx` and both smaller files with their logits, beside the checkpoint, and the JSON of the commands; made once."""
    names = ("best.onnx", "best.fp16.onnx", "best.int8.onnx", "a.json")
    if "variants" not in made:
        assert run_command("export", "best.ckpt").returncode == 0
        options = ("--tolerance", "100", "--timed-size", "64", "--json", "a.json")
        done = run_command("export", "best.ckpt", "--fp16", "--int8", *options)
        assert done.returncode == 0, done.stderr
        made["said"] = done.stdout.encode()
        made["variants"] = b""
        made.update({name: (trained.parent / name).read_bytes() for name in names})
    for name in names:
        (trained.parent / name).write_bytes(made[name])
    return trained.parent, json.loads(made["a.json"]), made["said"].decode()


def labelled(landscape):
    for path in sorted((landscape / "Val" / "images").iterdir()):
        mask = next((landscape / "Val" / "masks").glob(f"{path.stem}.*"))
        yield np.asarray(Image.open(path)), np.asarray(Image.open(mask))


def miou_by_hand(pairs):
    """The mean IoU in percent over the classes that are labelled."""
    found, labels = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    found, labels = found[labels != 255], labels[labels != 255]
    return 100 * np.mean(
        [((found == c) & (labels == c)).sum() / ((found == c) | (labels == c)).sum() for c in np.unique(labels)]
    )


def test_scores_sizes_and_cards_of_the_files_are_told(written, landscape):
    folder, result, said = written
    assert [each["name"] for each in result["files"]] == ["fp32", "fp16", "int8"]
    assert (result["labelled"], result["tiles"], result["size_px"]) == (True, 2, 64)
    tiles = list(labelled(landscape))
    assert result["pixels"] == sum(mask.size for _, mask in tiles)
    plain = [run(folder / "best.onnx", image, "logits").argmax(axis=0) for image, _ in tiles]
    for each, name in zip(result["files"], ("best.onnx", "best.fp16.onnx", "best.int8.onnx"), strict=True):
        classes = [run(folder / name, image, "logits").argmax(axis=0) for image, _ in tiles]
        by_hand = miou_by_hand([(found, mask) for found, (_, mask) in zip(classes, tiles, strict=True)])
        assert each["miou"] == pytest.approx(by_hand, abs=1e-9)
        same = np.mean(np.concatenate([(a == b).ravel() for a, b in zip(plain, classes, strict=True)]))
        assert each["same_class"] == pytest.approx(same)
        assert each["size_bytes"] == (folder / name).stat().st_size
        assert each["latency_ms"] > 0
        assert card_in(folder / name)["precision"] == each["name"]
        assert f"{each['miou']:.2f}" in said
    files = result["files"]
    assert files[2]["fall"] == pytest.approx(files[0]["miou"] - files[2]["miou"])
    assert files[0]["file"] is None
    assert files[1]["file"] == str(folder / "best.fp16.onnx")
    assert files[1]["size_bytes"] < 0.6 * files[0]["size_bytes"]
    assert files[2]["size_bytes"] < files[1]["size_bytes"]
    assert not [name for name in os.listdir(folder) if "partial" in name]


def test_half_precision_holds_float16_and_keeps_its_input_and_output(written, landscape):
    folder, *_ = written
    model = onnx.load(str(folder / "best.fp16.onnx"))
    types = {each.data_type for each in model.graph.initializer if len(each.dims) == 4}
    assert types == {onnx.TensorProto.FLOAT16}
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    image, _ = next(labelled(landscape))
    found, expected = (run(folder / name, image, "logits") for name in ("best.fp16.onnx", "best.onnx"))
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    assert np.abs(found - expected).max() > 0


def test_integers_are_of_8_bits_with_a_scale_for_each_channel_and_the_last_layer_stays_as_it_was(written):
    model = onnx.load(str(written[0] / "best.int8.onnx"))
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    *quantised, last = nodes(model, "Conv")
    for node in quantised:
        weight, scale, zero = (constants[name] for name in made_by[node.input[1]].input)
        assert weight.dtype == np.int8
        assert scale.shape == (len(weight),)
        assert not zero.any()
        assert made_by[node.input[0]].op_type == "DequantizeLinear"
        assert constants[made_by[node.input[0]].input[2]].dtype == np.uint8
    assert constants[last.input[1]].dtype == np.float32


def test_activations_are_calibrated_on_the_images_that_are_given(tmp_path):
    graphs.write_graph(onnx.load_from_string(_written(student("halving"), tmp_path)), CARD, tmp_path / "a.onnx")
    rng = np.random.default_rng(0)
    images = [rng.uniform(low, 3, (1, 3, 64, 96)).astype(np.float32) for low in (-1, -2)]
    model = graphs.quantised(tmp_path / "a.onnx", images)
    made_by = {name: node for node in model.graph.node for name in node.output}
    seen = made_by[nodes(model, "Conv")[0].input[0]].input[1]
    scale = next(onnx.numpy_helper.to_array(each) for each in model.graph.initializer if each.name == seen)
    assert scale == pytest.approx((max(x.max() for x in images) - min(x.min() for x in images)) / 255, rel=1e-5)


def _written(model, folder):
    with export.exporting("onnx", "a network"):
        export.WRITERS["onnx"](model, folder / "made.onnx", CARD)
    return (folder / "made.onnx").read_bytes()


@pytest.mark.parametrize("name", ["ftunetformer", "linknet", pytest.param("unetformer", marks=pytest.mark.slow)])
def test_every_architecture_has_every_variant_for_images_of_every_size(name, tmp_path):
    model = student(name)
    source = tmp_path / "made.onnx"
    _written(model, tmp_path)
    rng = np.random.default_rng(1)
    calibrated_on = [rng.standard_normal((1, 3, 96, 128), np.float32) for _ in range(3)]
    changed = {"fp16": graphs.half(source), "int8": graphs.quantised(source, calibrated_on)}
    before = onnx.load(str(source))
    constants = {each.name for each in before.graph.initializer}
    products = {node.name for node in nodes(before, "MatMul") if not constants & set(node.input)}
    assert bool(products) == (name != "linknet")  # those of attention, which stay in float32
    made_by = {name: node.op_type for node in changed["int8"].graph.node for name in node.output}
    for node in nodes(changed["int8"], "MatMul"):
        in_integers = {made_by.get(each) for each in node.input} == {"DequantizeLinear"}
        assert in_integers == (node.name not in products)
    for precision, graph in changed.items():
        logits_file, classes_file = tmp_path / f"{precision}.onnx", tmp_path / f"{precision}.argmax.onnx"
        graphs.write_graph(graph, CARD, logits_file)
        graphs.write_graph(graphs.with_classes(graph), CARD, classes_file)
        sessions = [onnxruntime.InferenceSession(str(file)) for file in (source, logits_file, classes_file)]
        for shape in ((1, 3, 5, 40), (2, 3, 64, 96), (1, 3, 130, 97)):
            inputs = {"images": rng.standard_normal(shape, np.float32)}
            expected, logits, classes = (session.run(None, inputs)[0] for session in sessions)
            assert classes.dtype == np.uint8
            np.testing.assert_array_equal(classes, logits.argmax(axis=1))
            error = np.sqrt(((logits - expected) ** 2).mean()) / expected.std()
            assert error < {"fp16": 0.01, "int8": 0.25}[precision], (precision, shape, error)
    assert [each.name for each in changed["fp16"].graph.output] == ["classes"]


def test_files_of_classes_lose_nothing(written, landscape):
    folder, *_ = written
    done = run_command("export", "--checkpoint", "best.ckpt", "--argmax", "--timed-size", "64", "--json", "b.json")
    assert done.returncode == 0, done.stderr
    (reference, classes) = json.loads((folder / "b.json").read_text())["files"]
    assert (classes["name"], classes["fall"], classes["same_class"], classes["tolerance"]) == ("argmax", 0, 1, 0)
    assert reference["miou"] == classes["miou"]
    for image, _ in labelled(landscape):
        expected = run(folder / "best.onnx", image, "logits").argmax(axis=0)
        np.testing.assert_array_equal(run(folder / "best.argmax.onnx", image, "classes"), expected)
    card = card_in(folder / "best.argmax.onnx")
    assert (card["output"], card["input_dtype"], card["precision"]) == ("classes", "float32", "fp32")


def test_evaluate_and_predict_take_every_file(written, landscape):
    folder, result, _ = written
    assert (
        run_command("export", "best.ckpt", "--int8", "--argmax", "--timed-size", "32", "--tolerance", "100").returncode
        == 0
    )
    config = export.load_trained("best.ckpt").config
    (folder / "mine.yaml").write_text(dump_config(config))
    tile = next((landscape / "Val" / "images").iterdir())
    for name in ("fp16", "int8", "int8.argmax"):
        file = f"best.{name}.onnx"
        done = run_command("evaluate", file, "-c", "mine.yaml", "--json", "e.json", "--device", "cpu")
        assert done.returncode == 0, done.stderr
        found = json.loads((folder / "e.json").read_text())["together"]
        expected = next(each["miou"] for each in result["files"] if each["name"] == name.split(".")[0])
        assert 100 * found["scores"]["miou"] == pytest.approx(expected, abs=0.01)
        is_known = "calibration error –" not in done.stdout
        assert is_known == ("argmax" not in name)
        predict(open_predictor(file, "cpu"), [str(tile)], folder / name)
        classes = run(folder / "best.int8.onnx", np.asarray(Image.open(tile)), "logits").argmax(axis=0)
        if name != "fp16":
            assert (read_raster(folder / name / f"{tile.stem}.tif")[0] == classes).mean() > 0.999
    done = run_command("evaluate", "best.int8.argmax.onnx", "-c", "mine.yaml", "--window", "64", "--device", "cpu")
    assert done.returncode == 2
    assert "--window blends logits, and best.int8.argmax.onnx answers with classes" in done.stderr


def negated(file):
    """A graph that prefers what the network thinks the least likely."""
    model = onnx.load(str(file))
    for node in model.graph.node:
        node.output[:] = ["plain" if name == "logits" else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Neg", ["plain"], ["logits"]))
    return model


def test_a_file_that_loses_too_much_is_not_kept_and_the_others_are(trained, monkeypatch):
    monkeypatch.setattr(variants, "half", negated)
    result = export_variants(trained, [Variant("fp16"), Variant("fp32", argmax=True)], timed_px=32)
    (message,) = result.refused
    _, fp16, argmax = result.files
    assert fp16.fall > 1
    assert (
        f"its mIoU on 2 tiles is {fp16.miou:.2f}, that of fp32 is {argmax.miou:.2f}, so it fell by {fp16.fall:.2f} points"
        in message
    )
    assert message.startswith("the file fp16 was not kept: ")
    assert "and 0.2 are allowed. You can accept it with --tolerance" in message
    assert fp16.file is None
    assert sorted(os.listdir(trained.parent)).count("best.argmax.onnx") == 1
    assert not [name for name in os.listdir(trained.parent) if "fp16" in name or "partial" in name]
    accepted = export_variants(trained, [Variant("fp16")], timed_px=32, tolerance=100)
    assert accepted.refused == []
    assert (trained.parent / "best.fp16.onnx").exists()


def test_without_labels_the_share_of_equal_classes_decides(trained, landscape, monkeypatch):
    monkeypatch.setattr(variants, "quantised", lambda file, inputs: negated(file))
    images = str(landscape / "Val" / "images")
    result = export_variants(trained, [Variant("int8")], tiles=[images], timed_px=32)
    assert not result.labelled
    assert result.files[1].miou is None
    (message,) = result.refused
    assert (
        f"it gives {100 * (1 - result.files[1].same_class):.2f} % of the pixels of 2 tiles another class than fp32, and 1 are"
        in message
    )
    assert (
        "calibrate it on images like those that it is for (--calibrate FOLDER), name tiles with masks (--tiles ROOT)"
        in message
    )
    root = str(landscape / "Train")
    assert tiles_to_verify(_data(trained), [root], 3)[0].mask is not None
    limited = export_variants(trained, [Variant("fp32", argmax=True)], tiles=[root], timed_px=32, limit=3)
    assert (limited.labelled, limited.tiles) == (True, 3)


def _data(trained):
    return export.load_trained(trained).config.data


def test_numbers_beyond_float16_are_told_and_the_command_ends_with_1(trained, tmp_path):
    content = torch.load(trained, weights_only=True)
    for name, value in content["state_dict"].items():
        if "segmentation_head" in name:
            value *= 1e7
    torch.save(content, trained)
    done = run_command("export", trained, "--fp16", "--timed-size", "32", "--tolerance", "100")
    assert done.returncode == 1
    assert "refused" in done.stdout
    assert "fp16 was not kept: its logits are not finite, as float16 holds numbers up to 65504" in done.stderr
    assert not list(tmp_path.rglob("*.onnx*"))


@pytest.mark.parametrize("stopped_at", ["quantised", "agreements", "latencies"])
def test_a_stop_leaves_nothing(trained, stopped_at, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(variants, stopped_at, stop)
    before = sorted(os.listdir(trained.parent))
    with pytest.raises(KeyboardInterrupt):
        export_variants(trained, ALL[1:3])
    assert sorted(os.listdir(trained.parent)) == before


def test_an_error_of_the_quantiser_becomes_one_line(trained, monkeypatch):
    def fail(file, inputs):
        raise ValueError("no range for a tensor\nmore")

    monkeypatch.setattr(variants, "quantised", fail)
    message = (
        r"cannot be written as int8 argmax ONNX: no range for a tensor\. Leave out --int8 and --argmax, or --debug"
    )
    with pytest.raises(KdpipeError, match=message):
        export_variants(trained, [Variant("int8", argmax=True)])
    assert not list(trained.parent.rglob("*.onnx*"))


def test_a_full_disk_is_named_and_leaves_nothing(trained, monkeypatch):
    from pathlib import Path

    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    before = sorted(os.listdir(trained.parent))
    for format_ in ("onnx", "torchscript"):
        with pytest.raises(DiskFull, match=r"no room for .*best\..*: its disk is full"):
            export.export_student(trained, format_)
    with pytest.raises(DiskFull, match="no room for"):
        export_variants(trained, [Variant("fp16")])
    assert sorted(os.listdir(trained.parent)) == before


def test_what_cannot_be_written_or_calibrated_is_refused_before_any_work(trained, landscape, tmp_path):
    said = Lines()
    (tmp_path / "best.fp16.onnx").touch()
    with pytest.raises(ConfigError, match=r"best\.fp16\.onnx exists already"):
        export_variants(trained, ALL, progress=said)
    (tmp_path / "file").touch()
    with pytest.raises(KdpipeError, match="such as a file in the place of a folder"):
        export_variants(trained, [Variant("int8")], tmp_path / "file" / "a.onnx", progress=said)
    with pytest.raises(
        ConfigError, match=r"there are no tiles to calibrate on: .*; name a folder of images with --calibrate"
    ):
        export_variants(trained, [Variant("int8")], calibrate=str(tmp_path / "nowhere"), progress=said)
    shutil.copytree(landscape / "Val" / "images", tmp_path / "tiles")
    with pytest.raises(ConfigError, match="there are no tiles to verify the file on"):
        export_variants(trained, [Variant("int8")], tiles=[str(tmp_path / "none")], progress=said)
    assert said.said == []


def test_several_files_beside_out_are_named_by_what_they_are(trained, tmp_path):
    result = export_variants(trained, [Variant("fp16", argmax=True)], "sub/mine.onnx", timed_px=32, tolerance=100)
    assert result.files[1].file == str(tmp_path / "sub/mine.onnx")
    assert [variants._file_name(tmp_path / "mine.onnx", each) for each in ALL[1:3]] == [
        "mine.fp16.argmax.onnx",
        "mine.int8.onnx",
    ]


def test_files_take_turns_when_they_are_timed():
    calls = []
    taken = latencies({name: lambda name=name: calls.append(name) for name in "abc"})
    assert "".join(calls) == "abc" * 16  # one to warm up
    assert set(taken) == set("abc")
