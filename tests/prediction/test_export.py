"""Exported files predict images of every size as the checkpoint does, and describe themselves."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import run_command
from helpers.configs import ENCODER
from PIL import Image

from kdpipe.configs.errors import CheckpointError, ConfigError, KdpipeError
from kdpipe.data.rasters import read_image, read_mask
from kdpipe.pipeline.evaluation.evaluate import student_model
from kdpipe.pipeline.models.student import build_student
from kdpipe.pipeline.models.unetformer import FTUNetFormer, UNetFormer
from kdpipe.pipeline.models.views import padded_logits
from kdpipe.pipeline.prediction import export
from kdpipe.pipeline.prediction.export import AnySize, export_student
from kdpipe.pipeline.prediction.maps import predict
from kdpipe.pipeline.prediction.model import Card, open_predictor

CPU = torch.device("cpu")
# The smallest, below a stride, multiples of it, and sizes at which each map of the pyramid is padded or not.
SIZES = [(1, 1, 1), (1, 5, 40), (2, 32, 32), (3, 33, 47), (1, 64, 200), (1, 130, 97)]
CARD = Card(
    run="tiny", step=2, network="stub", checkpoint_sha256="0" * 64, classes=["a", "b"], palette=[(0, 0, 0), (1, 2, 3)],
    ignore_index=255, bands=(1, 2, 3), stretch=None, mean=(0, 0, 0), std=(1, 1, 1), sizes="any", kdpipe="0",
)  # fmt: skip


def student(name):
    torch.manual_seed(0)
    if name == "halving":
        layers = [torch.nn.Conv2d(3 if i == 0 else 4, 4, 3, stride=2, padding=1) for i in range(5)]
        model = torch.nn.Sequential(*layers, torch.nn.Upsample(scale_factor=32, mode="bilinear"))
    elif name == "ftunetformer":
        model = FTUNetFormer(6, width=32, heads=4, embed_dim=16, depths=(1, 1, 2, 1), encoder_heads=(1, 1, 2, 2))
    elif name == "unetformer":
        model = UNetFormer(6, encoder="resnet18", width=32, heads=4)
    else:
        model = build_student(name, 6, encoder="tu-regnetx_002")
    return model.eval().requires_grad_(False)


def read_card(path):
    """The card in an exported file, by the library of its format alone."""
    content = {export.CARD_FILE: ""}
    if path.suffix == ".onnx":
        import onnx

        content[export.CARD_FILE] = {p.key: p.value for p in onnx.load(str(path)).metadata_props}["kdpipe"]
    elif path.suffix == ".pt2":
        torch.export.load(path, extra_files=content)
    else:
        export._load_torchscript(path, content)
    return Card.model_validate_json(content[export.CARD_FILE])


@pytest.fixture
def exported(trained, made):
    """The ONNX file beside the checkpoint, and the JSON of the command that wrote it; made once."""
    if "onnx" not in made:
        done = run_command("export", "--checkpoint", trained, "--format", "onnx", "--json", "a.json")
        assert done.returncode == 0
        assert "largest difference in probability" in done.stdout
        assert not [name for name in os.listdir(trained.parent) if "partial" in name]
        made["json"] = (trained.parent / "a.json").read_bytes()
        made["onnx"] = trained.with_suffix(".onnx").read_bytes()
    trained.with_suffix(".onnx").write_bytes(made["onnx"])
    return trained.with_suffix(".onnx"), json.loads(made["json"])


@pytest.mark.long
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Constant folding:UserWarning"
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # smp's size check; wrong traces show in the logits
@pytest.mark.parametrize("name", ["ftunetformer", "unetformer", "linknet"])
@pytest.mark.parametrize("format_", ["onnx", "torchscript"])
def test_one_traced_graph_predicts_images_of_every_size(name, format_, tmp_path):
    model = student(name)
    export.WRITERS[format_](model, tmp_path / "file", CARD)
    model_of_file = export.READERS[format_](tmp_path / "file")
    assert not model.training
    for count, height, width in SIZES:
        x = torch.randn(count, 3, height, width)
        with torch.inference_mode():
            expected = padded_logits(model, x)
            found = model_of_file(x)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1, float(expected.abs().max())))


@pytest.mark.parametrize(
    "name",
    ["halving", *(pytest.param(name, marks=pytest.mark.slow) for name in ("linknet", "unetformer", "ftunetformer"))],
)
def test_pt2_predicts_sizes_that_are_multiples_of_32(name, tmp_path):
    model = student(name)
    export.WRITERS["pt2"](model, tmp_path / "file", CARD)
    model_of_file = export.READERS["pt2"](tmp_path / "file")
    for size in ((1, 288, 288), (3, 288, 512), (2, 480, 352)):
        x = torch.randn(size[0], 3, *size[1:])
        with torch.inference_mode():
            expected = model(x)
            torch.testing.assert_close(
                model_of_file(x), expected, rtol=0, atol=1e-5 * max(1, float(expected.abs().max()))
            )
    if name == "linknet":  # refuses other sizes itself
        with pytest.raises(AssertionError, match="Guard failed"):
            model_of_file(torch.randn(1, 3, 300, 288))


def test_a_file_that_its_runtime_cannot_run_is_one_paragraph_and_not_kept(trained, tmp_path, monkeypatch):
    class Broken:
        def __init__(self, *args):
            pass

        def run(self, *args):
            raise RuntimeError("the kernel is missing\nat line 3")

    monkeypatch.setattr(export, "open_session", Broken)
    with pytest.raises(KdpipeError, match="written as onnx, does not run: the kernel is missing. Add --size PX"):
        export_student(trained, "onnx", tmp_path / "a.onnx")
    assert not list(tmp_path.glob("*a.onnx*"))


def test_padding_in_the_graph_equals_the_pipelines():
    class Inputs(torch.nn.Module):
        def forward(self, x):
            return x

    for height, width in ((1, 1), (1, 40), (17, 31), (32, 33), (63, 97)):
        x = torch.randn(2, 3, height, width)
        graph, seen = AnySize(Inputs()), []
        graph.student.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        assert torch.equal(graph(x), x)
        padded_logits(graph.student, x)
        assert torch.equal(*seen)


def test_an_exported_file_is_verified_and_describes_itself(exported):
    file, result = exported
    assert result["sizes"] == "any size"
    assert (result["tiles"], result["images"]) == (2, 6)
    assert result["largest_difference"] < 1e-4
    assert result["same_class"] > 0.999
    card = read_card(file)
    assert card.classes == ["Background", "Forest", "Grassland", "Cropland", "Settlement", "SemiNatural"]
    assert (card.mean, card.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (card.bands, card.stretch, card.ignore_index) == ((1, 2, 3), None, 255)
    assert (card.run, card.step, card.network) == ("tiny-none", 2, f"unet with {ENCODER}")
    assert card.palette[1] == (0, 158, 115)


@pytest.mark.parametrize("format_", ["torchscript", "pt2"])
def test_other_formats_carry_the_card_too(format_, tmp_path):
    file = tmp_path / f"a.{format_}"
    with export.exporting(format_, "a network"):
        export.WRITERS[format_](student("halving"), file, CARD)
    assert read_card(file) == CARD


def test_metadata_suffices_to_use_an_onnx_file_without_kdpipe(exported, trained, landscape):
    """The snippet of docs/maps.md, with onnxruntime, NumPy and Pillow alone, against the checkpoint in kdpipe."""
    exported[0].rename("student.onnx")
    tile = next((landscape / "Val" / "images").iterdir())
    Image.open(tile).save("tile.png")
    page = (Path(__file__).resolve().parents[2] / "docs" / "maps.md").read_text()
    found = {}
    exec(re.search(r"```python\n(.+?)```", page, flags=re.DOTALL)[1], found)
    expected = student_model(trained, CPU, tta=None, window=None).predict(read_image(tile)).argmax(axis=0)
    assert (found["classes"] == expected).mean() > 0.999
    assert found["classes"].shape == expected.shape
    described = [(i.name, i.type, i.shape) for i in found["session"].get_inputs()]
    assert described == [("images", "tensor(float)", ["n", 3, "height", "width"])]


@pytest.mark.long
def test_an_onnx_file_gives_the_map_of_its_checkpoint(exported, trained, landscape, tmp_path):
    tile = next((landscape / "Val" / "images").iterdir())
    for name, model in (("a", trained), ("b", exported[0])):
        predict(open_predictor(model, "cpu", tta="flips"), [str(tile)], tmp_path / name, window=64, overlap=32)
    maps = [read_mask(tmp_path / name / f"{tile.stem}.tif", 6, 255) for name in "ab"]
    assert (maps[0] == maps[1]).mean() > 0.999


def test_a_file_with_other_predictions_is_not_kept(trained, monkeypatch):
    def otherwise(file):
        return lambda images: torch.randn(len(images), 6, *images.shape[-2:])

    monkeypatch.setitem(export.WRITERS, "torchscript", lambda student, file, card, side: file.touch())
    monkeypatch.setitem(export.READERS, "torchscript", otherwise)
    message = r"else than the checkpoint: a probability differs by 0\.\d+, expected at most 0\.001; it was not kept"
    with pytest.raises(KdpipeError, match=message):
        export_student(trained, "torchscript")
    monkeypatch.setitem(export.READERS, "torchscript", lambda file: lambda images: otherwise(file)(images) * torch.nan)
    with pytest.raises(KdpipeError, match="a probability differs by nan"):
        export_student(trained, "torchscript")
    assert not [name for name in os.listdir(trained.parent) if "torchscript" in name]


def test_a_file_whose_size_is_fixed_is_not_kept(trained, monkeypatch):
    monkeypatch.setitem(export.WRITERS, "torchscript", lambda student, file, card, side: file.touch())
    monkeypatch.setitem(export.READERS, "torchscript", lambda file: lambda images: torch.zeros(2, 6, 97, 130))
    with pytest.raises(
        KdpipeError, match=r"maps images of .* to \(2, 6, 97, 130\), expected .*: its size is not dynamic"
    ):
        export_student(trained, "torchscript")
    assert not [name for name in os.listdir(trained.parent) if "torchscript" in name]


def test_an_exporters_error_becomes_one_line(trained, monkeypatch):
    def fail(student, file, card, side):
        raise RuntimeError("aten::strange is not supported\nmore")

    monkeypatch.setitem(export.WRITERS, "pt2", fail)
    with pytest.raises(
        KdpipeError,
        match=rf"unet with {ENCODER} cannot be written as pt2: aten::strange is not supported\. Add --size PX",
    ):
        export_student(trained, "pt2")


def test_missing_packages_are_named_with_how_to_install_them(trained, monkeypatch):
    for package in ("onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            message = (
                rf"{package}, which is not installed; install kdpipe's extra `export`: `pip install '\.\[export\]'` in"
            )
            with pytest.raises(ConfigError, match=message):
                export_student(trained, "onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="an ONNX file needs onnxruntime"):
        open_predictor("a.onnx", None)


def test_an_existing_file_is_refused(trained):
    trained.with_suffix(".onnx").touch()
    with pytest.raises(ConfigError, match=r"best\.onnx exists already: .*--overwrite"):
        export_student(trained, "onnx")


def test_tiles_to_verify_on_are_required(trained, landscape, tmp_path, monkeypatch):
    with pytest.raises(
        ConfigError,
        match="there are no tiles to verify the file on: there is no file or folder .*; name images with --tiles",
    ):
        export_student(trained, "torchscript", tiles=["nowhere"])
    loaded = export.load_trained(trained)
    data = loaded.config.data.model_copy(update={"val": []})
    without = export.Trained(loaded.student, loaded.config.model_copy(update={"data": data}), None, loaded.position)
    with pytest.raises(ConfigError, match=r"as data\.val is empty: name images with --tiles"):
        export.images_of(without, [])
    found = export.images_of(without, [str(landscape / "Train" / "images")])
    assert len(found) == export.VERIFIED_TILES


@pytest.mark.long
def test_other_onnx_files_and_missing_devices_are_refused(trained, tmp_path):
    import onnx

    node = onnx.helper.make_node("Identity", ["images"], ["logits"])
    values = [onnx.helper.make_tensor_value_info(name, 1, [1, 3, 4, 4]) for name in ("images", "logits")]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", values[:1], values[1:]),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, str(tmp_path / "other.onnx"))
    with pytest.raises(
        CheckpointError,
        match=r"other\.onnx does not say what its classes, bands and normalisation are: add -c CONFIG",
    ):
        open_predictor(tmp_path / "other.onnx", None)
    onnx.helper.set_model_props(model, {"kdpipe": '{"format": 2}'})
    onnx.save(model, str(tmp_path / "later.onnx"))
    with pytest.raises(CheckpointError, match=r"later\.onnx has a description that this version cannot read"):
        open_predictor(tmp_path / "later.onnx", None)
    (tmp_path / "bad.onnx").write_text("hello")
    with pytest.raises(CheckpointError, match=r"bad\.onnx is not a readable ONNX file"):
        open_predictor(tmp_path / "bad.onnx", None)
    with pytest.raises(
        ConfigError,
        match=r"--device mps: the installed onnxruntime computes on cpu only; for cuda, install onnxruntime-gpu",
    ):
        open_predictor(tmp_path / "later.onnx", "mps")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "none.ckpt", "--format", "onnx"], "no checkpoint at"),
        (["--checkpoint", "none.ckpt", "--format", "coreml"], "'coreml' is not one of"),
        (["--format", "onnx"], "name RUN, the folder of a run or a checkpoint, or --checkpoint; found neither"),
        (["a.ckpt", "--checkpoint", "a.ckpt"], "or --checkpoint; found both"),
        (["a.ckpt", "--fp16", "--format", "pt2"], "write ONNX files, and --format is pt2"),
        (["a.ckpt", "--fp16", "--calibrate", "here"], "--calibrate is for --int8: add it, or leave --calibrate out"),
        (["a.ckpt", "--tolerance", "1"], "--tolerance is for --fp16, --int8 or --argmax"),
    ],
)
def test_mistakes_end_in_one_paragraph(arguments, message, tmp_path):
    done = run_command("export", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.slow
def test_the_real_ftunetformer_is_one_onnx_graph_for_all_sizes(tmp_path):
    torch.manual_seed(0)
    model = build_student("ftunetformer", 6).eval().requires_grad_(False)
    with export.exporting("onnx", "ftunetformer"):
        export.WRITERS["onnx"](model, tmp_path / "file", CARD)
    model_of_file = export.READERS["onnx"](tmp_path / "file")
    for size in ((1, 64, 64), (1, 300, 257), (2, 512, 512)):
        x = torch.randn(size[0], 3, *size[1:])
        with torch.inference_mode():
            expected, found = padded_logits(model, x), model_of_file(x)
        assert (found.softmax(dim=1) - expected.softmax(dim=1)).abs().max() < 1e-4
