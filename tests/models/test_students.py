"""The students: the published networks' outputs, names and weights."""

import json

import numpy as np
import pytest
import timm
import torch
from helpers.golden import golden_value
from timm.models.swin_transformer import SwinTransformer
from torch.nn import functional as F

from kdpipe.configs.errors import CheckpointError, ConfigError
from kdpipe.pipeline.models.student import build_student, encoder_parameters
from kdpipe.pipeline.models.swin import SwinEncoder
from kdpipe.pipeline.models.unetformer import FTUNetFormer, UNetFormer
from kdpipe.pipeline.models.weights import load_encoder

HEAD = "decoder.segmentation_head.2.0.weight"


def tiny(num_classes=6, **options):
    sizes = {"width": 64, "heads": 16, "embed_dim": 32, "depths": (1, 1, 2, 1), "encoder_heads": (1, 2, 4, 8)}
    return FTUNetFormer(num_classes, **(sizes | options))


@pytest.fixture
def golden_model(dubai):
    """The tiny model with the golden weights, and the published names and shapes."""
    shapes = json.loads((dubai / "golden" / "ftunetformer_tiny_keys.json").read_text())
    model = tiny()
    integers = ("relative_position_index", "num_batches_tracked")
    state = {
        name: model.state_dict()[name] if name.endswith(integers) else golden_value(name, shape)
        for name, shape in shapes.items()
    }
    model.load_published_state_dict({f"net.{name}": value for name, value in state.items()})
    return model.eval(), shapes


def test_ftunetformer_has_the_logits_of_the_reference(golden_model, dubai):
    model, shapes = golden_model
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == shapes
    x = np.random.default_rng(448).standard_normal((1, 3, 192, 256)).astype("float32")
    expected = np.load(dubai / "golden" / "ftunetformer_tiny.npz")["y"]
    with torch.inference_mode():
        logits = model(torch.from_numpy(x))[:, :, ::2, ::2].numpy()
    # The reference's logits reach 0.9; agreement measured at 1.0e-6.
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_full_size_models_have_the_published_numbers_of_parameters():
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        model = FTUNetFormer(6)
    assert (count(model), count(model.backbone), count(model.decoder)) == (95_978_478, 86_745_016, 9_233_462)
    assert count(UNetFormer(6)) == 11_724_894


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 200), (130, 97)])
@pytest.mark.parametrize("student", ["ftunetformer", "unetformer"])
def test_students_take_any_size_and_learn_at_it(student, size):
    torch.manual_seed(0)
    model = tiny() if student == "ftunetformer" else UNetFormer(6)
    x = torch.randn(2, 3, *size)
    model.train()
    outputs = model(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert [tuple(output.shape) for output in outputs] == [(2, 6, *size)] * len(outputs)
    sum(output.square().mean() for output in outputs).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []
    with torch.inference_mode():
        assert model.eval()(x).shape == (2, 6, *size)


def test_an_image_alone_and_in_a_batch_have_the_same_logits():
    torch.manual_seed(0)
    model = tiny().eval()
    x = torch.randn(3, 3, 75, 110)
    with torch.inference_mode():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("student", ["ftunetformer", "unetformer"])
def test_every_side_from_32_px_has_finite_logits_of_its_size(student):
    torch.manual_seed(0)
    model = (tiny(width=32, heads=4, embed_dim=16) if student == "ftunetformer" else UNetFormer(6)).eval()
    with torch.inference_mode():
        for side in range(32, 97, 5):
            for size in ((side, 129 - side), (129 - side, side)):
                logits = model(torch.randn(1, 3, *size))
                assert logits.shape == (1, 6, *size)
                assert torch.isfinite(logits).all()


@pytest.mark.parametrize("size", [(64, 96), (33, 75)])
@pytest.mark.parametrize("student", ["ftunetformer", "unetformer"])
def test_bfloat16_as_in_training_gives_nearly_the_gradients_of_float32(student, size):
    """Under autocast, as in training: weights and gradients in float32, matrix products in bfloat16."""
    torch.manual_seed(0)
    model = (tiny() if student == "ftunetformer" else UNetFormer(6)).eval()  # without dropout and batch statistics
    x = torch.randn(2, 3, *size)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(x).float()
        logits.square().mean().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        found.append((logits.detach(), torch.cat(gradients)))
    (exact, gradient), (rounded, rounded_gradient) = found
    # bfloat16 keeps 8 bits, an error of 0.2 % a product; over some twenty layers it stays well below the logits' spread.
    assert (rounded - exact).abs().mean() < 0.05 * exact.std()
    assert F.cosine_similarity(gradient, rounded_gradient, dim=0) > 0.99


def test_auxiliary_logits_come_in_training_mode_only():
    model = UNetFormer(4)
    x = torch.randn(2, 3, 64, 64)
    logits, auxiliary = model.train()(x)
    assert logits.shape == auxiliary.shape == (2, 4, 64, 64)
    assert model.eval()(x).shape == (2, 4, 64, 64)


@pytest.mark.parametrize("prefix", ["", "net.", "model.", "module.", "module.net.", "student."])
@pytest.mark.parametrize("nested", [False, True])
def test_published_weights_load_under_any_usual_prefix(prefix, nested):
    torch.manual_seed(0)
    source, model = tiny(), tiny()
    state = {prefix + name: value for name, value in source.state_dict().items()}
    model.load_published_state_dict({"state_dict": state, "epoch": 3} if nested else state)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_weights_that_do_not_fit_are_named():
    state = dict(tiny().state_dict())
    state["decoder.b5.weight"] = state.pop("backbone.norm0.weight")
    with pytest.raises(CheckpointError, match=r"1 missing: backbone\.norm0\.weight; 1 unexpected: decoder\.b5\.weight"):
        tiny().load_published_state_dict(state)
    state = dict(tiny().state_dict())
    state["backbone.patch_embed.proj.weight"] = torch.zeros(32, 4, 4, 4)
    with pytest.raises(
        CheckpointError, match=r"1 of another shape: backbone\.patch_embed\.proj\.weight \(\(32, 4, 4, 4\)"
    ):
        tiny().load_published_state_dict(state)


@pytest.mark.parametrize("make", [tiny, UNetFormer])
def test_a_head_for_other_classes_is_replaced_only_on_request(make):
    torch.manual_seed(0)
    source, model = make(8), make(6)
    own = model.state_dict()[HEAD].clone()
    with pytest.raises(CheckpointError, match="predicts 8 classes and the model 6; set student.replace_head: true"):
        model.load_published_state_dict(source.state_dict())
    model.load_published_state_dict(source.state_dict(), replace_head=True)
    loaded = model.state_dict()
    assert torch.equal(loaded[HEAD], own)
    heads = set(model.heads)
    assert all(torch.equal(loaded[name], value) for name, value in source.state_dict().items() if name not in heads)


def test_timms_swin_weights_load_and_mean_the_same():
    """At 224 px every map but the last is a larger multiple of the window, where timm's order does not matter."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 4, 8)}
    reference = SwinTransformer(img_size=224, num_classes=10, drop_path_rate=0.0, **sizes).eval()
    encoder = SwinEncoder(32, (2, 2, 2, 1), (1, 2, 4, 8)).eval()
    notes = load_encoder(encoder, reference.state_dict(), origin="timm's")
    assert notes == [
        "timm's: 4 tensors outside the encoder were ignored: norm.weight, norm.bias, head.fc.weight and 1 more",
        "timm's lacks 8 tensors, which keep initial values: norm0.weight, norm0.bias, norm1.weight and 5 more",
    ]
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        tokens = reference.patch_embed(x)
        for stage, feature in zip(reference.layers, encoder(x), strict=True):
            tokens = stage(tokens)
            expected = F.layer_norm(tokens, tokens.shape[-1:]).permute(0, 3, 1, 2)
            torch.testing.assert_close(feature, expected, atol=1e-4, rtol=1e-4)


def test_encoder_weights_come_from_an_encoders_or_a_networks_file():
    torch.manual_seed(0)
    source = tiny(8)
    decoder = len(source.state_dict()) - len(source.backbone.state_dict())
    said = [f"a file: {decoder} tensors outside the encoder were ignored: decoder.pre_conv.0.weight, "]
    for state, expected in ((source.state_dict(), said), (source.backbone.state_dict(), [])):
        encoder = SwinEncoder(32, (1, 1, 2, 1), (1, 2, 4, 8))
        notes = load_encoder(
            encoder, {"state_dict": {f"model.{name}": value for name, value in state.items()}}, origin="a file"
        )
        assert [note[: len(text)] for note, text in zip(notes, expected, strict=True)] == expected
        assert all(
            torch.equal(value, source.backbone.state_dict()[name]) for name, value in encoder.state_dict().items()
        )
    state = dict(source.backbone.state_dict())
    del state["layers.0.blocks.0.mlp.fc1.bias"]
    with pytest.raises(
        CheckpointError, match=r"a file does not fit the model; .* 1 missing: layers\.0\.blocks\.0\.mlp\.fc1\.bias"
    ):
        load_encoder(SwinEncoder(32, (1, 1, 2, 1), (1, 2, 4, 8)), state, origin="a file")


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_unetformers_encoder_takes_timms_weights(name, tmp_path):
    source = timm.create_model(name)
    torch.save(source.state_dict(), tmp_path / "encoder.pth")
    said = []
    weights = str(tmp_path / "encoder.pth")
    model = build_student("unetformer", 6, say=said.append, encoder=name, encoder_weights=weights).eval()
    left = "fc.weight, fc.bias" if name == "resnet18" else "head.norm.weight, head.norm.bias, head.fc.weight and 1 more"
    assert said == [
        f"student.encoder_weights {weights}: {2 if name == 'resnet18' else 4} tensors outside the encoder were ignored: {left}"
    ]
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model.backbone(x)[-1], source.eval().forward_features(x), atol=1e-4, rtol=1e-4)


def test_students_are_built_by_name_with_their_options():
    model = build_student("unetformer", 5, encoder="resnet18")
    assert isinstance(model, UNetFormer)
    encoder = encoder_parameters(model)
    assert {name.split(".")[0] for name, p in model.named_parameters() if id(p) in encoder} == {"backbone"}
    assert {name.split(".")[0] for name, p in model.named_parameters() if id(p) not in encoder} == {"decoder"}
    with pytest.raises(ConfigError, match="ftunetformer has an encoder of its own"):
        build_student("ftunetformer", 6, encoder="resnet18")
    with pytest.raises(ConfigError, match="unetformer needs one of timm's, such as resnet18"):
        build_student("unetformer", 6)
    with pytest.raises(ConfigError, match="timm cannot build 'resnet81' for unetformer"):
        build_student("unetformer", 6, encoder="resnet81")
    with pytest.raises(
        ConfigError, match=r"vit_tiny_patch16_224 has feature maps at strides \[16, 16, 16.*, and 4, 8, 16 and 32"
    ):
        build_student("unetformer", 6, encoder="vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match="replace_head is for ftunetformer and unetformer, not for unet"):
        build_student("unet", 6, encoder="resnet18", replace_head=True)
