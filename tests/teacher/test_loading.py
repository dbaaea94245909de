"""Teachers load strictly, from every form that people hold weights in, and errors give the lines that fit the file."""

import argparse
import re
import textwrap
import warnings

import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import torch
import yaml

from kdpipe.configs.errors import CheckpointError, ConfigError
from kdpipe.pipeline.devices import resolve_device
from kdpipe.pipeline.models.recognise import recognise
from kdpipe.pipeline.models.smp import create_smp_model
from kdpipe.pipeline.models.student import build_student
from kdpipe.pipeline.teacher.loading import load_teacher


@pytest.fixture
def load(make_config, tmp_path):
    """Loads a file of the test as the configured teacher."""

    def load(name="t.pth", **changes):
        return load_teacher(make_config().teacher.model_copy(update={"checkpoint": str(tmp_path / name), **changes}))

    return load


@pytest.fixture
def state(teacher_file):
    """The tensors of the configured teacher."""
    return torch.load(teacher_file, weights_only=True)


def test_a_teacher_of_another_number_of_channels_is_refused_in_the_users_words(make_config):
    teacher = make_config().teacher
    with pytest.raises(
        CheckpointError, match=r"holds unet with mobilenet_v2, 8 channels, but teacher says .* 7 channels"
    ):
        load_teacher(teacher.model_copy(update={"classes": teacher.classes[:7]}))


def test_weights_are_never_dropped_in_silence(load, state, tmp_path):
    name = next(name for name in state if name.startswith("decoder"))
    state["decoder.odd"] = state.pop(name)
    torch.save(state, tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match=rf"1 missing: {re.escape(name)}; 1 unexpected: decoder.odd"):
        load()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_any_width_load_as_float32(load, state, tmp_path, dtype):
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    torch.save(state, tmp_path / "t.pth")
    model = load()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(value, state[name].to(value.dtype)) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_quantised_integers_are_not_taken_for_weights(load, state, tmp_path):
    state["segmentation_head.0.weight"] = state["segmentation_head.0.weight"].to(torch.int8)
    torch.save(state, tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match=r"1 not floating-point: segmentation_head.0.weight \(int8\)"):
        load()


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_checkpoint_that_executes_code_is_refused_and_not_executed(load, tmp_path, capsys):
    torch.save({"a": Harmful()}, tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match=r"holds more than weights: .* could execute code .*\(builtins.print\)"):
        load()
    assert "executed" not in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("form", ["module", "module under model", "more than weights", "older file", "TorchScript"])
def test_the_advice_on_a_refused_checkpoint_makes_one_that_loads(load, tmp_path, form):
    source = smp.Unet("mobilenet_v2", encoder_weights=None, classes=8).eval()
    state, path = source.state_dict(), tmp_path / "t.pth"
    message = "is a whole pickled model" if "module" in form else "holds more than weights"
    if form == "TorchScript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about tracing
            torch.jit.trace(source, torch.zeros(1, 3, 64, 64)).save(path)
        message = "is a TorchScript archive"
    elif form == "older file":
        torch.save({"state_dict": state, "x": argparse.Namespace()}, path, _use_new_zipfile_serialization=False)
    else:
        contents = {"module": source, "module under model": {"model": source}}
        torch.save(contents.get(form, {"state_dict": state, "hparams": argparse.Namespace()}), path)
    with pytest.raises(CheckpointError, match=message) as refused:
        load()
    advice = textwrap.dedent(str(refused.value).partition("\n\n")[2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(advice, {})
    loaded = load("t_weights.pth").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.pth", None, "no checkpoint at"),
        ("t.pth", b"", "not a readable"),
        ("t.pth", b"PK\x03\x04rubbish", "not a readable"),
        ("t.pth", b"hello" * 99, "not a readable"),
        ("t.safetensors", b"\xff" * 40, r"t\.safetensors is not a readable safetensors file"),
    ],
)
def test_unreadable_checkpoints_are_named(load, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load(name)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "net.", "teacher.model."])
@pytest.mark.parametrize("form", ["t.pth", "state_dict in t.ckpt", "model in t.pth", "t.safetensors"])
def test_a_teacher_loads_in_every_form_that_people_hold_it(load, state, tmp_path, prefix, form):
    prefixed = {prefix + name: value for name, value in state.items()}
    nest, _, name = form.rpartition(" in ")
    if name == "t.safetensors":
        safetensors.torch.save_file(prefixed, tmp_path / name)
    else:
        torch.save({nest: prefixed, "epoch": 3} if nest else prefixed, tmp_path / name)
    loaded = load(name).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_scse_attention_is_recognised_from_the_tensors(load, tmp_path):
    torch.manual_seed(1)
    source = smp.Unet("mobilenet_v2", encoder_weights=None, classes=8, decoder_attention_type="scse").eval()
    torch.save(source.state_dict(), tmp_path / "t.pth")
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load()(x), source(x))


@pytest.fixture
def misfit(load, tmp_path):
    """The error for a file that holds another network than the configuration says."""

    def misfit(network):
        torch.save(network.state_dict(), tmp_path / "t.pth")
        with pytest.raises(CheckpointError) as refused:
            load()
        return str(refused.value)

    return misfit


@pytest.mark.long
@pytest.mark.parametrize(
    ("architecture", "encoder", "channels", "attention"),
    [
        ("unet", "efficientnet-b0", 8, None),
        ("unet", "resnet18", 9, "scse"),
        ("fpn", "mobilenet_v2", 8, None),
        ("unetplusplus", "resnet18", 5, "scse"),
        ("segformer", "mit_b0", 8, None),
        ("deeplabv3plus", "mobilenet_v2", 9, None),
    ],
)
def test_the_lines_that_an_error_gives_fit_the_file(load, misfit, architecture, encoder, channels, attention):
    message = misfit(create_smp_model(architecture, encoder, channels, key="teacher", attention=attention))
    with_attention = " and scSE attention" if attention else ""
    assert f"holds {architecture} with {encoder}{with_attention}, {channels} channels" in message
    lines = yaml.safe_load(message.split("\n\n")[1])["teacher"]
    if channels == 5:
        assert lines.pop("classes") == [...] or "one name for each of the file's 5 channels" in message
        lines["classes"] = ["a", "b", "c", "d", "e"]
    load(**lines)


def test_a_file_of_nine_channels_is_explained_by_openearthmaps_order(misfit):
    message = misfit(create_smp_model("unet", "mobilenet_v2", 9, key="teacher"))
    assert "classes: [Unknown, Bareland, Rangeland, Developed, Road, Tree, Water, Cropland, Building]" in message
    assert "the shipped biodiversity/ftunetformer_kd_openearthmap, whose class_map fits it" in message
    assert "architecture:" not in message
    assert "encoder:" not in message


@pytest.mark.long
def test_an_unrecognised_network_is_reported_as_such(misfit, monkeypatch):
    # Where no encoder fits, all of smp's are built, which takes ten seconds.
    monkeypatch.setattr(smp.encoders, "get_encoder_names", lambda: ["mobilenet_v2", "resnet18", "timm-efficientnet-b0"])
    message = misfit(smp.Unet("mobilenet_v2", encoder_weights=None, classes=8, decoder_channels=(128, 64, 32, 16, 8)))
    assert "holds a network with mobilenet_v2 whose decoder is not recognised, 8 channels, but teacher says" in message
    assert "of another shape: decoder." in message
    assert "`kdpipe inspect" in message
    message = misfit(torch.nn.Conv2d(3, 8, 1))
    assert "holds a network that is not recognised, but teacher says" in message
    assert "2 unexpected: weight, bias" in message


@pytest.mark.parametrize(("architecture", "options"), [("ftunetformer", {}), ("unetformer", {"encoder": "resnet18"})])
def test_students_of_the_paper_are_recognised(architecture, options):
    found = recognise(build_student(architecture, 6, **options).state_dict())
    assert (found.architecture, found.encoder, found.channels) == (architecture, options.get("encoder"), 6)


@pytest.mark.parametrize(
    ("architecture", "encoder", "message"),
    [
        ("unett", "resnet18", "did you mean unet"),
        ("unet", "resnet19", "did you mean resnet1"),
        ("unet", "tu-nothing", "teacher: "),
    ],
)
def test_unknown_networks_are_refused_with_the_nearest(architecture, encoder, message):
    with pytest.raises(ConfigError, match=message):
        create_smp_model(architecture, encoder, 3, key="teacher")


def test_an_absent_device_is_refused():
    with pytest.raises(ConfigError, match="--device nonsense"):
        resolve_device("nonsense")
