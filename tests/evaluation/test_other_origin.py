"""Files of other origin in `evaluate` and `predict`: a configuration describes them, and they are scored as in ten lines without kdpipe."""

import json
import pickle
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import rasterio
import torch
import yaml
from helpers.commands import run_command
from helpers.foreign_networks import Pooled, export, save_transformers
from helpers.own_students import MEAN, STD
from helpers.scored_tiles import numpy_iou
from PIL import Image
from torch import nn

from kdpipe.configs import dump_config
from kdpipe.data.rasters import image_size

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
KINDS = ("onnx", "pt2", "weights of one's own", "weights of transformers", "weights of smp")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def made(kind, make_config, tmp_path):
    """A file of each kind; writes its config `c.yaml`, and returns the file and what maps normalised images to coarse logits."""
    torch.manual_seed(1)
    student = {"architecture": "unet", "encoder": "resnet18"}
    if kind in ("onnx", "pt2"):
        network = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(8, 6, 1)).eval()
        file, logits = export(network, tmp_path / f"theirs.{kind}"), network
        if kind == "onnx":
            session = onnxruntime.InferenceSession(file)
            logits = lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])  # noqa: E731
    elif kind == "weights of one's own":
        network = Pooled(6).eval()
        student = {"model": "helpers.foreign_networks:Pooled", "options": {"num_classes": 6}}
        file, logits = tmp_path / "theirs.pth", lambda x: network(x)["out"]
        torch.save({"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}}, file)
    elif kind == "weights of transformers":
        import transformers as tf

        student = {"pretrained": str(save_transformers("segformer", tmp_path / "six", classes=6))}
        network = tf.AutoModelForSemanticSegmentation.from_pretrained(student["pretrained"]).eval()
        file, logits = tmp_path / "six" / "model.safetensors", lambda x: network(x).logits
        from safetensors.torch import save_file

        file = tmp_path / "trained.safetensors"
        save_file(network.state_dict(), file)
    else:
        import segmentation_models_pytorch as smp

        network = smp.Unet("resnet18", encoder_weights=None, classes=6).eval()
        file, logits = tmp_path / "theirs.pth", network
        torch.save(network.state_dict(), file)
    (tmp_path / "c.yaml").write_text(dump_config(make_config(student=student)))
    return file, logits


def probabilities(logits, image):
    """Float32 `(6, H, W)`, from an image `(H, W, 3)`."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % 32), (0, -width % 32), (0, 0)), mode="reflect")
    inputs = torch.from_numpy((padded / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        found = nn.functional.interpolate(logits(inputs), size=padded.shape[:2], mode="bilinear", align_corners=False)
    return found[0, :, :height, :width].softmax(dim=0).numpy()


@pytest.mark.long
def test_it_is_scored_and_mapped_as_by_hand(made, landscape, tmp_path):
    file, logits = made
    predicted, masks = [], []
    paths = sorted((landscape / "Val" / "images").iterdir())
    for path in paths:
        predicted.append(probabilities(logits, np.array(Image.open(path).convert("RGB"))))
        masks.append(np.array(Image.open(landscape / "Val" / "masks" / f"{path.stem}.png")))
    done = run_command("evaluate", file, "-c", "c.yaml", "--json", "e.json")
    assert done.returncode == 0, done.stderr
    found = json.loads(Path("e.json").read_text())
    expected = numpy_iou([each.argmax(axis=0) for each in predicted], masks)
    for name, value in zip(found["classes"], expected, strict=True):
        score = found["together"]["scores"]["iou"][name]
        assert score is None or score == pytest.approx(value, abs=1e-4), name
    assert found["model"] == file.name
    done = run_command("predict", "--checkpoint", file, "-c", "c.yaml", "--probabilities", "--out", "maps", *paths)
    assert done.returncode == 0, done.stderr
    for path, probs in zip(paths, predicted, strict=True):
        with rasterio.open(f"maps/{path.stem}.probabilities.tif") as stored:
            np.testing.assert_allclose(stored.read() / 254, probs, atol=0.5 / 254 + 1e-5)


def test_without_a_config_what_is_missing_is_said(made, landscape):
    file, _ = made
    evaluated = run_command("evaluate", file, landscape / "Val")
    mapped = run_command("predict", "--checkpoint", file, "--out", "maps", landscape / "Val" / "images")
    assert evaluated.returncode == mapped.returncode == 2
    for done in (evaluated, mapped):
        assert "add -c CONFIG" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.long
def test_other_classes_and_bands_are_refused(make_config, tmp_path):
    network = nn.Conv2d(4, 6, 1).eval()
    file = export(network, tmp_path / "four.onnx", bands=4)
    (tmp_path / "c.yaml").write_text(dump_config(make_config()))
    done = run_command("evaluate", file, "-c", "c.yaml")
    assert (
        "is a network of 4 bands, and the configuration has 3: name those of the network in student.bands"
        in done.stderr
    )
    file = export(nn.Conv2d(3, 5, 1).eval(), tmp_path / "five.onnx")
    done = run_command("predict", "--checkpoint", file, "-c", "c.yaml", "--out", "maps", "x.png")
    assert (
        "is a network of 5 classes, and the configuration has 6: name those of the network in classes.names"
        in done.stderr
    )


@pytest.mark.long
def test_a_network_of_one_size_is_given_windows_of_it(make_config, landscape, tmp_path):
    (tmp_path / "c.yaml").write_text(dump_config(make_config()))
    file = export(nn.Conv2d(3, 6, 1).eval(), tmp_path / "fixed.onnx", size=96)
    image = next(path for path in sorted((landscape / "Train" / "images").iterdir()) if min(image_size(path)) < 96)
    done = run_command(
        "predict", "--checkpoint", file, "-c", "c.yaml", "--window", "96", "--overlap", "32", "--out", "m", image
    )
    assert done.returncode == 0, done.stderr
    with rasterio.open(f"m/{image.stem}.tif") as stored:
        assert stored.shape == image_size(image)
    large = Image.new("RGB", (200, 200))
    large.save(tmp_path / "large.png")
    done = run_command("predict", "--checkpoint", file, "-c", "c.yaml", "--out", "n", "large.png", "--json", "n.json")
    assert done.returncode == 0, done.stderr
    found = json.loads(Path("n.json").read_text())
    assert (found["window"], found["overlap"]) == (96, 32)
    done = run_command("predict", "--checkpoint", file, "-c", "c.yaml", "--out", "o", "--window", "64", "large.png")
    assert (
        "fixed.onnx takes images of 96 x 96 px only, and --window is 64: leave it out, or set --window 96"
        in done.stderr
    )


@pytest.mark.long
def test_what_kdpipe_wrote_needs_no_config_and_keeps_its_own_values(trained, tmp_path):
    best = Path("model_weights/tests/tiny-none/best.ckpt")
    done = run_command("evaluate", best, "-c", f"{best.parent}/config.yaml")
    assert "carries its own configuration: leave -c out" in done.stderr
    exported = tmp_path / "s.onnx"
    assert run_command("export", "--checkpoint", best, "--format", "onnx", "--out", exported).returncode == 0
    # Another normalisation in the config: the file's own counts.
    raw = yaml.safe_load((best.parent / "config.yaml").read_text())
    raw["student"]["normalize"] = "unit"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    scored = []
    for arguments in ([best], [exported, "-c", tmp_path / "c.yaml"]):
        done = run_command("evaluate", *arguments, "--json", tmp_path / "e.json")
        assert done.returncode == 0, done.stderr
        scored.append(json.loads((tmp_path / "e.json").read_text())["together"]["scores"]["miou"])
    assert scored[0] == pytest.approx(scored[1], abs=1e-4)
    done = run_command("evaluate", exported)
    assert "does not say where masks lie and what is in them: add -c CONFIG" in done.stderr
    raw["classes"]["names"] = raw["classes"]["names"][::-1]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    done = run_command("evaluate", exported, "-c", tmp_path / "c.yaml")
    assert "says that its classes are Background, Forest" in done.stderr


class Canary:
    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.long
def test_hostile_and_damaged_files_are_one_paragraph(make_config, tmp_path):
    (tmp_path / "c.yaml").write_text(dump_config(make_config()))
    whole = export(nn.Conv2d(3, 6, 1).eval(), tmp_path / "whole.onnx").read_bytes()
    Path("half.onnx").write_bytes(whole[: len(whole) // 2])
    Path("half.pt2").write_bytes(b"PK\3\4")
    Path("code.pth").write_bytes(pickle.dumps(Canary()))
    Path("empty.torchscript").write_bytes(b"")
    model = onnx.load_from_string(whole)
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("pads", [2**30] * 4))
    Path("memory.onnx").write_bytes(model.SerializeToString())
    for name in ("half.onnx", "half.pt2", "code.pth", "empty.torchscript", "memory.onnx", "absent.onnx", "absent.pth"):
        for command in (["evaluate", name], ["predict", "x.png", "--out", "maps", "--checkpoint", name]):
            done = run_command(*command, "-c", "c.yaml")
            assert done.returncode == 2, (name, done.stderr)
            assert name in done.stderr
            assert not Path("ran").exists()
