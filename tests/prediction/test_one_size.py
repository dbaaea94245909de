"""Exports for images of one size: networks whose graph depends on it, and the windows that `predict` and `evaluate` cut."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import rasterio
import torch
from helpers.commands import run_command
from helpers.files import write_image
from helpers.foreign_networks import CLASSES, library_network, save_transformers, task_tokens
from test_export import CARD, read_card
from torch.nn import functional

from kdpipe.configs.errors import ConfigError
from kdpipe.pipeline.models.external.outputs import AtImageSize
from kdpipe.pipeline.models.external.transformers_student import pretrained_student
from kdpipe.pipeline.prediction import export
from kdpipe.pipeline.prediction.export import export_student
from kdpipe.pipeline.prediction.maps import predict
from kdpipe.pipeline.prediction.model import open_predictor
from kdpipe.pipeline.prediction.traced import one_size, require_side

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
EIGHT = CARD.model_copy(update={"classes": CLASSES, "palette": [(0, 0, 0)] * 8})


def save_lively(kind, folder):
    """A network whose weights are large enough for its answer to depend on the image, which those of transformers are not."""
    network = library_network(kind, save_transformers(kind, folder))
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.5 / weight[0].numel() ** 0.5)
    network.save_pretrained(folder)
    return folder


def owners_probabilities(kind, folder, images):
    """`(N, C, H, W)`, by transformers alone."""
    with torch.inference_mode():
        output = library_network(kind, folder)(images, **task_tokens(kind, folder, len(images)))
        if hasattr(output, "masks_queries_logits"):
            classes, masks = output.class_queries_logits.softmax(-1)[..., :-1], output.masks_queries_logits.double()
            logits = torch.einsum("nqc,nqhw->nchw", classes.double(), masks.sigmoid()).log()
        else:
            logits = output.logits
        size = images.shape[-2:]
        probabilities = functional.interpolate(logits, size=size, mode="bilinear", align_corners=False).softmax(dim=1)
        return probabilities.float()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["beit", "upernet", "dpt", "mask2former", "oneformer"])
def test_a_graph_of_one_size_predicts_what_the_networks_own_library_does(kind, tmp_path):
    """At 96 px the last maps of UPerNet and BEiT have 3 x 3 px, and are pooled to 2 x 2."""
    folder = save_lively(kind, tmp_path / kind)
    names = [f"c{i}" for i in range(8)]
    student = AtImageSize(pretrained_student(str(folder), names, 3, print), 8, kind, lambda sentence: None).eval()
    with export.exporting("onnx", kind):
        export.WRITERS["onnx"](student.requires_grad_(False), tmp_path / "s.onnx", EIGHT, 96)
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx")
    assert session.get_inputs()[0].shape == ["n", 3, 96, 96]
    assert session.get_outputs()[0].shape == ["n", 8, 96, 96]
    for count in (1, 3):
        images = torch.randn(count, 3, 96, 96)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        expected = owners_probabilities(kind, folder, images)
        assert expected.std(dim=(-2, -1)).max() > 0.01
        torch.testing.assert_close(torch.from_numpy(logits).softmax(dim=1), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [1, 3, (2, 6), (None, 4)])
def test_pooling_is_that_of_torch_for_sizes_that_do_not_divide(size):
    pool = torch.nn.AdaptiveAvgPool2d(size)
    images = torch.randn(2, 3, 20, 7)
    torch.testing.assert_close(one_size(torch.nn.Sequential(pool))(images), pool(images))


@pytest.fixture
def fixed(trained, made):
    """The ONNX file of 64 px beside the checkpoint, and the JSON of its export; made once."""
    file = trained.parent / "fixed.onnx"
    if "fixed" not in made:
        done = run_command("export", trained, "--size", "64", "--out", file, "--json", "a.json")
        assert done.returncode == 0, done.stderr
        assert "images of 64 x 64 px only" in " ".join(done.stdout.split())
        made["fixed"], made["fixed.json"] = file.read_bytes(), Path("a.json").read_bytes()
    file.write_bytes(made["fixed"])
    return file, json.loads(made["fixed.json"])


def test_the_card_and_the_graph_say_the_size(fixed):
    file, result = fixed
    assert read_card(file).sizes == result["sizes"] == "64 x 64 px only"
    session = onnxruntime.InferenceSession(file)
    assert [each.shape for each in (*session.get_inputs(), *session.get_outputs())] == [
        ["n", 3, 64, 64],
        ["n", 6, 64, 64],
    ]
    assert result["pixels"] == 64 * 64 * result["images"]
    assert result["images"] == 3 * result["tiles"]


@pytest.mark.long
def test_maps_are_cut_into_windows_of_the_size_and_small_scenes_mirrored(fixed, trained, tmp_path):
    scenes = [write_image(tmp_path / f"{name}.png", *size, seed=3) or str(tmp_path / f"{name}.png")
              for name, size in (("large", (130, 100)), ("small", (40, 50)), ("flat", (20, 150)))]  # fmt: skip
    summary = predict(open_predictor(fixed[0], "cpu"), scenes, "found", probabilities=True)
    assert (summary.window, summary.overlap, summary.failed) == (64, 32, {})
    # A checkpoint pads to multiples of 32 px alone, so its scenes are mirrored to 64 px here.
    for scene in scenes:
        with rasterio.open(scene) as source:
            image = source.read().transpose(1, 2, 0)
        height, width = image.shape[:2]
        padded = np.pad(image, ((0, max(0, 64 - height)), (0, max(0, 64 - width)), (0, 0)), mode="reflect")
        write_png = tmp_path / "padded" / Path(scene).name
        write_png.parent.mkdir(exist_ok=True)
        from PIL import Image

        Image.fromarray(padded).save(write_png)
        predict(
            open_predictor(trained, "cpu"),
            [str(write_png)],
            "expected",
            window=64,
            overlap=32,
            probabilities=True,
            overwrite=True,
        )
        stored = [
            rasterio.open(f"{folder}/{write_png.stem}.probabilities.tif").read()[:, :height, :width].astype(int)
            for folder in ("found", "expected")
        ]
        assert np.abs(stored[0] - stored[1]).max() <= 1


def test_another_window_is_refused_by_predict_and_evaluate(fixed, trained, tmp_path):
    write_image(tmp_path / "a.png", 70, 70)
    message = "fixed.onnx takes images of 64 x 64 px only, and --window is 96: leave it out, or set --window 64"
    for command in (
        ["predict", "--checkpoint", fixed[0], "--out", "m", "a.png"],
        ["evaluate", fixed[0], "-c", "c.yaml"],
    ):
        config_of(trained)
        done = run_command(*command, "--window", "96")
        assert done.returncode == 2
        assert message in done.stderr


def config_of(trained):
    from kdpipe.configs import dump_config

    Path("c.yaml").write_text(dump_config(export.load_trained(trained).config))


def scored(*arguments):
    done = run_command("evaluate", *arguments, "--json", "e.json")
    assert done.returncode == 0, done.stderr
    return json.loads(Path("e.json").read_text())["together"]["scores"]["miou"]


@pytest.mark.long
def test_scores_are_those_of_the_checkpoint_in_the_same_windows(fixed, trained):
    config_of(trained)
    assert scored(fixed[0], "-c", "c.yaml") == pytest.approx(scored(trained, "--window", "64"), abs=1e-4)


@pytest.mark.long
def test_smaller_files_and_files_of_classes_keep_the_size(fixed, trained):
    config_of(trained)
    options = ("--size", "64", "--tolerance", "100", "--json", "v.json")
    done = run_command("export", trained, "--fp16", "--int8", *options)
    assert done.returncode == 0, done.stderr
    done = run_command("export", trained, "--argmax", "--size", "64", "--json", "c.json")
    assert done.returncode == 0, done.stderr
    found = json.loads(Path("c.json").read_text())
    assert (found["size_px"], found["files"][1]["same_class"]) == (64, 1.0)
    for name, shape in (("fp16", ["n", 6, 64, 64]), ("int8", ["n", 6, 64, 64]), ("argmax", ["n", 64, 64])):
        session = onnxruntime.InferenceSession(trained.with_suffix(f".{name}.onnx"))
        assert session.get_inputs()[0].shape == ["n", 3, 64, 64]
        assert session.get_outputs()[0].shape == shape
    # No window of a file of classes is blended, so that no average of indices enters.
    assert 0 <= scored(trained.with_suffix(".argmax.onnx"), "-c", "c.yaml") <= 1


@pytest.mark.long
@pytest.mark.parametrize("format_", ["torchscript", "pt2"])
def test_other_formats_have_one_size_too(format_, trained):
    result = export_student(trained, format_, f"s.{format_}", side=64)
    assert result.sizes == read_card(Path(f"s.{format_}")).sizes == "64 x 64 px only"
    assert result.largest_difference <= export.MAX_DIFFERENCE


@pytest.mark.parametrize(
    ("side", "message"),
    [(100, "--size must be a multiple of 32 px, from 64 up, .*; found 100"), (32, "found 32"),
     (64, "takes images of 96 x 96 px only, and --size is 64: set --size 96")],
)  # fmt: skip
def test_a_size_that_no_window_has_is_refused(side, message):
    network = torch.nn.Identity()
    network.img_size, network.strict_img_size = (96, 96), True
    with pytest.raises(ConfigError, match=message):
        require_side(side, network)
    require_side(96, network)
    require_side(None, network)
