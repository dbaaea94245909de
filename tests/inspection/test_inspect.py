"""`kdpipe inspect` describes a file of weights, and names what it does not recognise."""

import hashlib
import json

import pytest
import segmentation_models_pytorch as smp
import torch
from click.testing import CliRunner
from helpers.configs import ENCODER

from kdpipe.configs.errors import CheckpointError
from kdpipe.pipeline.commands.main import cli
from kdpipe.pipeline.inspection.checkpoint import inspect_checkpoint
from kdpipe.pipeline.runs.checkpoint import load_trained
from kdpipe.pipeline.training.run import train

CPU = torch.device("cpu")


def inspected(*arguments):
    done = CliRunner().invoke(cli, ["inspect", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_a_teachers_file_is_described_with_its_nest_prefix_and_numbers(tmp_path):
    network = smp.Unet("resnet18", encoder_weights=None, classes=9, decoder_attention_type="scse")
    state = {f"teacher.model.{name}": value.half() if value.is_floating_point() else value
             for name, value in network.state_dict().items()}  # fmt: skip
    path = tmp_path / "t.ckpt"
    torch.save({"epoch": 3, "state_dict": state}, path)
    found = inspect_checkpoint(str(path))
    assert str(found.network) == "unet with resnet18 and scSE attention, 9 channels"
    assert (found.nest, found.prefix, found.other_keys) == ("state_dict", "teacher.model.", ["epoch"])
    assert found.student is None
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.size_bytes == len(path.read_bytes())
    integers = sum(not value.is_floating_point() for value in state.values())
    assert found.dtypes == {"float16": len(state) - integers, "int64": integers}
    learnt = sum(parameter.numel() for parameter in network.parameters())
    statistics = sum(buffer.numel() for buffer in network.buffers() if buffer.is_floating_point())
    assert found.parameters == learnt + statistics


def test_the_table_and_the_json_say_the_same(teacher_file, tmp_path):
    output = inspected(teacher_file, "--json", tmp_path / "out" / "t.json")
    content = json.loads((tmp_path / "out" / "t.json").read_text())
    assert content["network"] == {
        "architecture": "unet",
        "encoder": "mobilenet_v2",
        "attention": None,
        "channels": 8,
        "in_channels": 3,
        "options": {},
    }
    lines = dict(line.split(None, 1) for line in output.splitlines()[1:])
    assert lines["architecture"].strip() == "unet"
    assert lines["encoder"].strip() == "mobilenet_v2"
    assert lines["what"].strip() == "weights of a network"
    assert lines["sha256"].strip() == content["sha256"]


@pytest.mark.long
def test_a_students_checkpoint_is_described_with_its_run(cached, make_config):
    config = make_config(train__max_steps=1, student__encoder="tu-mobilenetv3_small_050", data__val=[])
    fingerprint = train(config, CPU).fingerprint
    path = "model_weights/tests/tiny/last.ckpt"
    found = inspect_checkpoint(path)
    assert str(found.network) == "unet with tu-mobilenetv3_small_050, 6 channels"
    assert (found.student.name, found.student.mode, found.student.steps) == ("tests/tiny", "cached", 1)
    assert found.student.fingerprint == fingerprint
    assert found.prefix == "student."
    output = inspected(path)
    assert "a student's checkpoint of kdpipe train-student" in output
    assert "tests/tiny, mode cached, after step 1" in output
    assert fingerprint in output


@pytest.mark.long
def test_options_that_no_tensor_shows_are_named_for_a_file_and_recorded_with_a_student(cached, make_config, tmp_path):
    network = smp.create_model("deeplabv3plus", "resnet18", encoder_weights=None, classes=3, encoder_output_stride=8)
    torch.save(network.state_dict(), tmp_path / "t.pth")
    assert "the defaults fit; its tensors do not show encoder_output_stride, decoder_atrous_rates" in inspected(
        tmp_path / "t.pth"
    )
    options = {"encoder_output_stride": 8, "decoder_channels": 24}
    student = {"architecture": "deeplabv3plus", "encoder": ENCODER, "options": options}
    train(make_config(student=student, train__max_steps=1, data__val=[]), CPU)
    path = "model_weights/tests/tiny/last.ckpt"
    found = inspect_checkpoint(path)
    assert found.student.options == options
    assert str(found.network) == f"deeplabv3plus with {ENCODER} and options {{decoder_channels: 24}}, 6 channels"
    assert "{decoder_channels: 24, encoder_output_stride: 8}" in inspected(path)
    own = smp.create_model("deeplabv3plus", ENCODER, encoder_weights=None, classes=6, **options).eval()
    state = torch.load(path, weights_only=True)["state_dict"]
    own.load_state_dict({name.removeprefix("student."): value for name, value in state.items()})
    images = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        assert torch.equal(load_trained(path).student(images), own(images))


def test_an_unknown_network_is_reported_as_not_recognised(tmp_path, monkeypatch):
    monkeypatch.setattr(smp.encoders, "get_encoder_names", lambda: ["resnet18"])
    torch.save({"encoder.conv.weight": torch.zeros(4, 3, 3, 3), "head.bias": torch.zeros(4)}, tmp_path / "odd.pth")
    output = inspected(tmp_path / "odd.pth")
    assert "architecture  not recognised" in output
    assert "encoder       not recognised" in output
    assert "channels      not recognised" in output


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.pth", "no checkpoint at /.*/absent.pth"),
        ("words.pth", "words.pth is not a readable checkpoint: damaged, or not a file that torch.save wrote"),
        ("optimizer.pth", "should be a bare state dict of tensors, found the keys lr"),
    ],
)
def test_other_files_are_refused_with_exit_code_2(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.pth").write_text("not weights")
    torch.save({"lr": 0.1}, tmp_path / "optimizer.pth")
    with pytest.raises(CheckpointError, match=message) as refused:
        inspect_checkpoint(path)
    assert refused.value.exit_code == 2
