"""Weights as trainers save them: wrapped, averaged, beside other tensors. What loads is the network, and what is left out is named."""

import argparse
import itertools
import pathlib
import textwrap
import warnings

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from helpers.configs import ENCODER
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import AveragedModel

from kdpipe.configs.errors import CheckpointError
from kdpipe.configs.schema import Teacher
from kdpipe.pipeline.models.smp import create_smp_model
from kdpipe.pipeline.models.student import build_student
from kdpipe.pipeline.teacher.loading import load_teacher

CLASSES = ["a", "b", "c"]


def network(seed):
    torch.manual_seed(seed)
    return create_smp_model("unet", ENCODER, len(CLASSES), key="teacher").eval()


RAW, EMA = network(1), network(2)
R, E = RAW.state_dict(), EMA.state_dict()


def under(prefix, state=None):
    return {prefix + name: value for name, value in (state or R).items()}


class Trainer(torch.nn.Module):
    """The module of smp's own example, with a loss that has class weights."""

    def __init__(self):
        super().__init__()
        self.model = RAW
        self.register_buffer("mean", torch.tensor([0.5, 0.25, 0.125]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1))
        self.criterion = torch.nn.CrossEntropyLoss(weight=torch.ones(3))


class Compiled(torch.nn.Module):
    """Lightning's module around a compiled network."""

    def __init__(self, network):
        super().__init__()
        self.segmentor = torch.compile(network)


def lightning_average():
    """What Lightning's callback makes of a checkpoint."""
    callback, module = WeightAveraging(), Compiled(RAW)
    callback._average_model = AveragedModel(Compiled(EMA))
    checkpoint = {"state_dict": module.state_dict(), "epoch": 1}
    callback.on_save_checkpoint(None, module, checkpoint)
    return checkpoint


def compiled_parts():
    """Encoder and decoder compiled, each alone."""
    return {
        name.replace("encoder.", "encoder._orig_mod.", 1).replace("decoder.", "decoder._orig_mod.", 1): value
        for name, value in R.items()
    }


# Each with words of the notes on it.
RAW_FORMS = {
    "segmentor": ({"state_dict": under("segmentor.")}, ()),
    "compiled": (torch.compile(RAW).state_dict(), ()),
    "compiled in Lightning": ({"state_dict": Compiled(RAW).state_dict()}, ()),
    "compiled in DDP": (under("module._orig_mod."), ()),
    "DDP in compiled": ({"model": under("_orig_mod.module.")}, ()),
    "compiled parts": (compiled_parts(), ()),
    "FSDP": (under("_fsdp_wrapped_module."), ()),
    "model_state_dict": ({"model_state_dict": R, "optimizer_state_dict": {"state": {}}, "epoch": 3}, ()),
    "model_state": ({"model_state": under("module."), "epoch": 3}, ()),
    "another key": ({"weights": R, "epoch": 3}, ()),
    "double": ({name: value.double() if value.is_floating_point() else value for name, value in R.items()}, ()),
    "twice": ({"state_dict": {**under("model."), **under("net.")}}, ()),
    "trainer": (
        {"state_dict": Trainer().state_dict(), "epoch": 3},
        ("not in the network, which is model: mean (0.5, 0.25, 0.125), std (1, 2, 4), criterion.weight (1, 1, 1)",
         "teacher.normalize has to do so too"),
    ),
    "no counters": (
        {name: value for name, value in R.items() if "num_batches_tracked" not in name},
        ("counters num_batches_tracked of batch norms, which no prediction uses",),
    ),
}  # fmt: skip
BOTH_FORMS = {
    "model_ema": {"model": R, "model_ema": E, "epoch": 3},
    "state_dict_ema": {"state_dict": under("module."), "state_dict_ema": E},
    "ema in the module": {"state_dict": {**under("model."), **under("ema_model.", E)}},
    "averaged in the module": {
        "state_dict": {**under("model."), **{f"slow.{k}": v for k, v in AveragedModel(EMA).state_dict().items()}}
    },
    "Lightning's average": lightning_average(),
    "MMEngine's hook": {
        "state_dict": E,
        "ema_state_dict": {"steps": torch.tensor(1), **under("module.")},
        "message_hub": {},
    },
}
EMA_FORMS = {
    "model_ema alone": {"model_ema": E},
    "ema alone": {"ema": {"module": E}, "epoch": 1},
    "AveragedModel": AveragedModel(EMA).state_dict(),
}


@pytest.fixture
def load(tmp_path):
    """Loads a content of a file as the teacher; returns the weights and what was said."""

    def load(content, **changes):
        path = tmp_path / "t.pth"
        if content is not None:
            torch.save(content, path)
        keys = {"architecture": "unet", "encoder": ENCODER, "checkpoint": str(path), "classes": CLASSES}
        said = []
        loaded = load_teacher(Teacher(**keys | changes), say=said.append)
        return loaded, said

    return load


def answers_as(found, expected):
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        return torch.equal(found(x), expected(x))


@pytest.mark.parametrize("form", RAW_FORMS)
def test_weights_load_as_trainers_save_them_and_what_is_left_out_is_named(load, form):
    content, words = RAW_FORMS[form]
    loaded, said = load(content)
    assert answers_as(loaded, RAW)
    assert len(said) == (1 if words else 0)
    assert all(word in said[0] for word in words)


@pytest.mark.parametrize("form", BOTH_FORMS)
def test_averaged_weights_beside_raw_ones_are_told_of_and_taken_if_asked_for(load, form):
    loaded, said = load(BOTH_FORMS[form])
    assert answers_as(loaded, RAW)
    assert any("the raw ones are taken; teacher.weights: ema takes the averaged ones" in line for line in said)
    assert answers_as(load(None, weights="raw")[0], RAW)
    loaded, said = load(None, weights="ema")
    assert answers_as(loaded, EMA)
    assert any("the averaged ones are taken; teacher.weights: raw takes the raw ones" in line for line in said)


@pytest.mark.parametrize("form", EMA_FORMS)
def test_averaged_weights_alone_are_taken(load, form):
    loaded, said = load(EMA_FORMS[form])
    assert answers_as(loaded, EMA)
    assert "holds averaged (EMA) weights alone, and they are taken" in said[0]
    assert answers_as(load(None, weights="ema")[0], EMA)
    with pytest.raises(CheckpointError, match=r"teacher.weights is raw, and .*t.pth holds no raw weights, only"):
        load(None, weights="raw")


def test_averaged_weights_that_a_file_lacks_are_refused(load):
    with pytest.raises(
        CheckpointError, match=r"weights is ema, and .* holds no averaged weights, only the file itself"
    ):
        load(R, weights="ema")


def test_a_tensor_under_the_networks_prefix_that_it_lacks_is_refused(load):
    with pytest.raises(CheckpointError, match="1 unexpected: head2.weight"):
        load({"state_dict": {**under("model."), "model.head2.weight": torch.ones(2), "loss.weight": torch.ones(3)}})


def test_a_tensor_of_the_network_that_lies_outside_its_prefix_is_missed(load):
    state = under("model.")
    state["net.segmentation_head.0.bias"] = state.pop("model.segmentation_head.0.bias")
    with pytest.raises(CheckpointError, match="1 missing: segmentation_head.0.bias"):
        load({"state_dict": state})


def test_the_lines_for_one_of_several_networks_make_a_file_that_loads(load, tmp_path):
    with pytest.raises(CheckpointError, match=r"weights of 2 networks: state_dict.student, state_dict.old") as refused:
        load({"state_dict": {**under("student."), **under("old.", E)}})
    exec(textwrap.dedent(str(refused.value).partition("\n\n")[2]), {})
    loaded, said = load(None, checkpoint=str(tmp_path / "t_weights.pth"))
    assert answers_as(loaded, RAW)
    assert said == []


# What keeps a file from being read without executing code: a number of NumPy, an object, a path among settings.
BESIDE = (
    {"best_score": np.float64(0.7)},
    {"args": argparse.Namespace(lr=1)},
    {"hyper_parameters": {"root": pathlib.Path("/data")}, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}},
)


@pytest.mark.parametrize(
    ("form", "beside"), list(zip([*RAW_FORMS, *BOTH_FORMS, *EMA_FORMS], itertools.cycle(BESIDE), strict=False))
)
def test_the_lines_for_a_file_that_holds_more_make_one_that_loads_as_well(load, tmp_path, form, beside):
    content = RAW_FORMS[form][0] if form in RAW_FORMS else (BOTH_FORMS | EMA_FORMS)[form]
    with pytest.raises(CheckpointError, match="holds more than weights") as refused:
        load({**content, **beside})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(textwrap.dedent(str(refused.value).partition("\n\n")[2]), {})
    saved = str(tmp_path / "t_weights.pth")
    assert answers_as(load(None, checkpoint=saved)[0], EMA if form in EMA_FORMS else RAW)
    if form in BOTH_FORMS:
        assert answers_as(load(None, checkpoint=saved, weights="ema")[0], EMA)


@pytest.mark.parametrize("form", [*RAW_FORMS, "model_ema"])
def test_a_student_starts_from_the_same_files(tmp_path, form):
    content, words = RAW_FORMS[form] if form in RAW_FORMS else (BOTH_FORMS[form], ("the raw ones are taken",))
    torch.save(content, tmp_path / "s.pth")
    said = []
    student = build_student("unet", len(CLASSES), encoder=ENCODER, checkpoint=str(tmp_path / "s.pth"), say=said.append)
    assert answers_as(student.eval(), RAW)
    assert all(any(word in line for line in said) for word in words if "normalize" not in word)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_weights_that_are_not_finite_are_named_before_a_run(load, tmp_path, role, value):
    state = {name: tensor.clone() for name, tensor in R.items()}
    state["segmentation_head.0.weight"].view(-1)[3] = value
    message = r"NaN or infinite, .* 1 of \d+ tensors: segmentation_head.0.weight \(1 of \d+\)\. Its training diverged"
    with pytest.raises(CheckpointError, match=message):
        if role == "teacher":
            load(state)
        torch.save(state, tmp_path / "s.pth")
        build_student("unet", len(CLASSES), encoder=ENCODER, checkpoint=str(tmp_path / "s.pth"))


def test_numbers_that_float32_cannot_hold_are_named(load):
    state = {name: value.double() if value.is_floating_point() else value for name, value in R.items()}
    state["segmentation_head.0.bias"] = state["segmentation_head.0.bias"] + 1e300
    with pytest.raises(CheckpointError, match=r"segmentation_head.0.bias \(3 of 3\)"):
        load(state)


def features_of_older_smp(name, network, x):
    """What smp 0.3 made of timm's network: the outputs of its stem and stages."""
    if name.startswith("regnet"):
        stages = [network.stem, network.s1, network.s2, network.s3, network.s4]
    elif name.startswith("gernet"):
        last = torch.nn.Sequential(network.stages[3], network.stages[4], network.final_conv)
        stages = [network.stem, *network.stages[:3], last]
    else:
        first = torch.nn.Sequential(network.conv1, network.bn1, network.act1)
        stages = [
            first,
            torch.nn.Sequential(network.maxpool, network.layer1),
            network.layer2,
            network.layer3,
            network.layer4,
        ]
    for stage in stages:
        x = stage(x)
        yield x


@pytest.mark.long
@pytest.mark.parametrize(
    "encoder_name", ["timm-regnetx_002", "tu-regnetx_002", "timm-res2net50_26w_4s", "timm-resnest14d", "timm-gernet_s"]
)
def test_encoders_that_older_smp_named_otherwise_compute_the_same(load, encoder_name):
    name = encoder_name.partition("-")[2]
    torch.manual_seed(0)
    encoder = timm.create_model(name).eval()
    for norm in encoder.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.1, 0.1)
            norm.running_var.uniform_(0.5, 2)
    rest = create_smp_model("unet", f"tu-{name}", len(CLASSES), key="teacher").state_dict()
    state = {name: value for name, value in rest.items() if not name.startswith("encoder.")}
    older = under("encoder.", {k: v for k, v in encoder.state_dict().items() if not k.startswith(("head", "fc"))})
    loaded, _ = load({"state_dict": older | state}, encoder=encoder_name)
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        found, expected = loaded.encoder(x)[1:], list(features_of_older_smp(name, encoder, x))
    assert len(found) == len(expected) == 5
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["timm-efficientnet-b0", "timm-skresnet18", "timm-mobilenetv3_small_075"])
def test_other_encoders_with_the_older_prefix_load_under_their_own_names(load, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        network = smp.Unet(name, encoder_weights=None, classes=len(CLASSES)).eval()
    assert answers_as(load(network.state_dict(), encoder=name)[0], network)


@pytest.mark.long
def test_an_encoder_of_the_same_family_and_other_tensors_is_named_in_the_error(load):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        network = smp.Unet("timm-efficientnet-b0", encoder_weights=None, classes=len(CLASSES))
    with pytest.raises(
        CheckpointError, match=r"(?s)holds unet with timm-efficientnet-b0.*encoder: timm-efficientnet-b0"
    ):
        load(network.state_dict(), encoder="tu-efficientnet_b0")


def test_options_that_weights_do_not_show_are_asked_for(load):
    options = {"encoder_output_stride": 8, "decoder_channels": 8}
    network = smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=len(CLASSES), **options).eval()
    keys = {"architecture": "deeplabv3plus", "encoder": "resnet18", "options": {"decoder_channels": 8}}
    at_stride_16, said = load(network.state_dict(), **keys)
    assert not answers_as(at_stride_16, network)
    assert "weights do not show encoder_output_stride and decoder_atrous_rates, and smp's defaults are used" in said[0]
    as_trained, said = load(None, **keys | {"options": options | {"decoder_atrous_rates": [12, 24, 36]}})
    assert answers_as(as_trained, network)
    assert said == []
