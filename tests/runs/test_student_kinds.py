"""Students from a module of one's own and from transformers, at every use of a run; a module in a checkpoint is not imported unasked."""

import json
import shutil
import socket
import sys

import numpy as np
import onnxruntime
import pytest
import rasterio
import torch
from helpers.commands import run_command
from helpers.configs import tiny_config
from helpers.doubles import Lines
from helpers.foreign_networks import names, save_transformers, task_tokens
from helpers.own_students import CODE, KINDS, owners_network, owners_probabilities, student_of
from helpers.runs import assert_same_weights, weights
from PIL import Image

from kdpipe.configs import dump_config
from kdpipe.configs.errors import CheckpointError
from kdpipe.pipeline.evaluation.evaluate import student_model
from kdpipe.pipeline.models.external.transformers_student import described_student
from kdpipe.pipeline.runs.checkpoint import load_trained
from kdpipe.pipeline.runs.trust import trusting_code
from kdpipe.pipeline.training.run import train, with_mode

CPU = torch.device("cpu")
BEST = "model_weights/tests/tiny-none/best.ckpt"
RUN = "model_weights/tests/tiny-none"


@pytest.fixture(scope="module")
def runs(landscape, teacher_file, tmp_path_factory):
    """The folder, the config and what was said of a run of each kind, trained once."""
    made = {}

    def run(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            config = tiny_config(landscape, teacher_file, folder, student=student_of(kind, folder), train__max_steps=4)
            progress = Lines()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                train(with_mode(config, "none"), CPU, progress=progress)
            made[kind] = folder, config, progress.said
        return made[kind]

    return run


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def ran(runs, kind, monkeypatch):
    """The config of a finished run, in its folder."""
    folder, config, _ = runs(kind)
    monkeypatch.chdir(folder)
    return config


def images(landscape):
    return sorted((landscape / "Val" / "images").iterdir())


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_student_scores_and_maps_as_its_own_library_computes(ran, kind, landscape, tmp_path):
    own = owners_network(kind, torch.load(BEST, weights_only=True)["state_dict"])
    image = np.array(Image.open(images(landscape)[0]).convert("RGB"))
    expected = owners_probabilities(own, image)
    with trusting_code():
        found = student_model(BEST, CPU, tta=None, window=None).predict(image)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    options = ["--trust-code", "--probabilities", "--out", tmp_path / "maps"]
    done = run_command("predict", "--checkpoint", BEST, images(landscape)[0], *options)
    assert done.returncode == 0, done.stderr
    with rasterio.open(tmp_path / "maps" / f"{images(landscape)[0].stem}.probabilities.tif") as stored:
        np.testing.assert_allclose(stored.read() / 254, expected, atol=0.5 / 254 + 1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_oneformer_is_trained_and_predicts_as_its_own_library_without_its_folder(
    landscape, teacher_file, tmp_path, monkeypatch
):
    import transformers as tf

    monkeypatch.chdir(tmp_path)
    folder = save_transformers("oneformer", tmp_path / "oneformer")
    tokens = task_tokens("oneformer", folder, 1)
    own = tf.OneFormerForUniversalSegmentation(tf.AutoConfig.from_pretrained(folder, **names(6))).eval()
    config = tiny_config(landscape, teacher_file, tmp_path, student={"pretrained": str(folder)}, train__max_steps=2)
    train(with_mode(config, "none"), CPU)
    shutil.rmtree(folder)
    prefix = "student.network.network."
    state = torch.load(BEST, weights_only=True)["state_dict"]
    own.load_state_dict({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})

    def logits(inputs):
        output = own(inputs, **tokens)
        classes, masks = output.class_queries_logits.softmax(-1)[..., :-1], output.masks_queries_logits.sigmoid()
        return torch.einsum("nqc,nqhw->nchw", classes, masks).log()

    image = np.array(Image.open(images(landscape)[0]).convert("RGB"))
    found = student_model(BEST, CPU, tta=None, window=None).predict(image)
    np.testing.assert_allclose(found, owners_probabilities(logits, image), atol=1e-5)


def test_the_onnx_file_enlarges_its_logits_itself(ran, kind, landscape, tmp_path):
    done = run_command("export", "--checkpoint", BEST, "--format", "onnx", "--out", tmp_path / "s.onnx", "--trust-code")
    assert done.returncode == 0, done.stderr
    image = np.asarray(Image.open(images(landscape)[1]).convert("RGB"))
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx")
    about = json.loads(session.get_modelmeta().custom_metadata_map["kdpipe"])
    inputs = ((image / 255 - about["mean"]) / about["std"]).astype(np.float32).transpose(2, 0, 1)[None]
    (logits,) = session.run(["logits"], {"images": inputs})
    own = owners_network(kind, torch.load(BEST, weights_only=True)["state_dict"])
    found = torch.from_numpy(logits)[0].softmax(dim=0).numpy()
    np.testing.assert_allclose(found, owners_probabilities(own, image), atol=1e-4)


@pytest.mark.long
def test_a_run_goes_on_to_the_same_weights_without_the_files_that_it_began_from(runs, kind, make_config, tmp_path):
    folder, config, _ = runs(kind)
    student = student_of(kind, tmp_path)
    changed = {"student": config.student.model_dump() | student}
    train(with_mode(make_config(**changed, train__max_steps=2), "none"), CPU)
    if kind != "model":
        shutil.rmtree(student["pretrained"])
    train(with_mode(make_config(**changed, train__max_steps=4), "none"), CPU, resume=True)
    whole = torch.load(folder / RUN / "last.ckpt", weights_only=True)["state_dict"]
    assert_same_weights(weights("tiny-none"), whole)


def test_what_became_of_the_weights_is_said_once(runs):
    assert [line for line in runs("segformer")[2] if "head" in line] == [
        f"student.pretrained {runs('segformer')[0] / 'segformer'} is for 8 classes, and classes.names has 6: its head starts anew"
    ]
    assert [line for line in runs("model")[2] if "no attribute encoder" in line] == [
        "student: helpers.foreign_networks:Pooled and options {num_classes: 6} has no attribute encoder or backbone, so that all of it "
        "learns at train.lr (0.001), and train.backbone_lr is not used"
    ]
    for kind in KINDS:
        assert sum("are enlarged bilinearly" in line for line in runs(kind)[2]) == 1


def test_a_run_of_transformers_is_read_offline_from_its_checkpoint_alone(runs, tmp_path, monkeypatch):
    folder, _, _ = runs("segformer")
    shutil.copy(folder / BEST, tmp_path / "alone.ckpt")
    content = torch.load(tmp_path / "alone.ckpt", weights_only=True)
    content["kdpipe"]["config"] = content["kdpipe"]["config"].replace(str(folder / "segformer"), "stranger/net")
    torch.save(content, tmp_path / "alone.ckpt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *arguments: pytest.fail("the network was asked"))
    image = torch.rand(1, 3, 64, 96)
    own = owners_network("segformer", content["state_dict"])
    with torch.inference_mode():
        expected = torch.nn.functional.interpolate(own(image), size=(64, 96), mode="bilinear", align_corners=False)
        torch.testing.assert_close(load_trained(tmp_path / "alone.ckpt").student(image), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModelForSemanticSegmentation": "stranger/net--modeling.Net"}}, "has the key auto_map"),
        ({"model_type": "upernet", "backbone": "stranger/net"}, "has the key backbone"),
        ({"model_type": "dpt", "backbone_config": {"use_pretrained_backbone": True}}, "has the key use_pretrained_backbone"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "has the key quantization_config"),
        ({"hidden_sizes": [2**30] * 4}, "has the size 1073741824"),
        ({"model_type": "bert", "num_attention_heads": 12, "hidden_sizes": None, "depths": None}, "no semantic segmentation for .* bert"),
        ({"model_type": "no such type"}, "cannot build the network"),
        ({"hidden_sizes": "x"}, "cannot build the network"),
    ],
)  # fmt: skip
def test_a_description_that_would_fetch_or_run_something_is_refused(runs, change, message, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *arguments: pytest.fail("the network was asked"))
    whole = torch.load(runs("segformer")[0] / BEST, weights_only=True)["kdpipe"]["transformers"]
    assert described_student(whole, "x.ckpt").network.config.num_labels == 6
    with pytest.raises(CheckpointError, match=message):
        described_student(json.dumps(json.loads(whole) | change), "x.ckpt")
    for damaged in ("", "[]", "{}", "{", "[" * 100_000):
        with pytest.raises(CheckpointError, match="x.ckpt should hold the configuration"):
            described_student(damaged, "x.ckpt")


def test_a_kernel_of_the_hub_is_not_asked_for(runs):
    whole = json.loads(torch.load(runs("segformer")[0] / BEST, weights_only=True)["kdpipe"]["transformers"])
    for name in ("attn_implementation", "_attn_implementation"):
        network = described_student(json.dumps(whole | {name: "stranger/kernel"}), "x.ckpt").network
        assert "/" not in str(network.config._attn_implementation)


@pytest.fixture(scope="module")
def stranger(landscape, teacher_file, tmp_path_factory):
    """The folder of a run of a module that lies in the folder, and leaves a file `imported` when it is imported."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "strangers.py").write_text(CODE)
    student = {"model": "strangers:build", "options": {"num_classes": 6}}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, steps in (("tiny", 2), ("other", 2)):
            config = tiny_config(
                landscape,
                teacher_file,
                folder,
                name=name,
                student=student,
                train__max_steps=steps,
                train__lr=1e-3 * len(name),
            )
            train(with_mode(config, "none"), CPU)
    sys.modules.pop("strangers")
    (folder / "imported").unlink()
    return folder


COMMANDS = {
    "evaluate": [BEST],
    "predict": ["--checkpoint", BEST, "--out", "maps", "{image}"],
    "export": ["--checkpoint", BEST, "--format", "onnx", "--overwrite"],
    "report": [RUN, "--tiles", "1"],
    "compare": [RUN, "model_weights/tests/other-none", "--tiles", "1"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_module_in_a_checkpoint_is_imported_only_where_it_is_trusted(stranger, landscape, command, monkeypatch):
    monkeypatch.chdir(stranger)
    monkeypatch.delitem(sys.modules, "strangers", raising=False)
    (stranger / "imported").unlink(missing_ok=True)
    arguments = [each.format(image=images(landscape)[0]) for each in COMMANDS[command]]
    done = run_command(command, *arguments)
    assert done.returncode == 2
    assert "needs the network strangers:build" in done.stderr
    assert "add --trust-code" in done.stderr
    assert not (stranger / "imported").exists()
    assert "strangers" not in sys.modules
    done = run_command(command, *arguments, "--trust-code")
    assert done.returncode == 0, done.stderr
    assert (stranger / "imported").exists()
    with pytest.raises(CheckpointError, match="add --trust-code"):  # the consent ended with the command
        load_trained(BEST)


def test_the_users_own_config_is_consent(stranger, landscape, teacher_file, tmp_path, monkeypatch):
    """`--resume` has it, and refuses a checkpoint of another module before anything is imported."""
    shutil.copytree(stranger, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    done = run_command("train-student", "-c", f"{RUN}/config.yaml", "--resume", "--set", "train.max_steps=3")
    assert done.returncode == 0, done.stderr
    content = torch.load(f"{RUN}/last.ckpt", weights_only=True)
    content["kdpipe"]["config"] = content["kdpipe"]["config"].replace("strangers:build", "os:getcwd")
    torch.save(content, f"{RUN}/last.ckpt")
    done = run_command("train-student", "-c", f"{RUN}/config.yaml", "--resume", "--set", "train.max_steps=4")
    assert "student.model: was 'os:getcwd', is 'strangers:build'" in done.stderr


def test_a_changed_module_is_said(stranger, tmp_path, monkeypatch):
    shutil.copytree(stranger, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "copy"), *sys.path])
    monkeypatch.delitem(sys.modules, "strangers", raising=False)
    said = []
    with trusting_code():
        load_trained(BEST, said.append)
        assert said == []
        (tmp_path / "copy" / "strangers.py").write_text(CODE + "# changed\n")
        load_trained(BEST, said.append)
    assert [line.partition(",")[0] for line in said] == [f"warning: {tmp_path / 'copy' / 'strangers.py'}"]


def test_the_report_asks_before_it_imports_the_teachers_module(runs, landscape, teacher_file, tmp_path, monkeypatch):
    folder, _, _ = runs("segformer")
    shutil.copytree(folder / "model_weights", tmp_path / "model_weights")
    monkeypatch.chdir(tmp_path)
    content = torch.load(BEST, weights_only=True)
    config = content["kdpipe"]["config"]
    first = config.index("  architecture: unet")
    last = config.index("  checkpoint:", first)
    content["kdpipe"]["config"] = config[:first] + "  model: strangers:build\n" + config[last:]
    torch.save(content, BEST)
    done = run_command("report", RUN, "--teacher", "--tiles", "1")
    assert (done.returncode, "needs the network strangers:build" in done.stderr) == (2, True), done.stderr


def test_a_dry_run_times_a_step_of_it(ran, kind, tmp_path):
    (tmp_path / "c.yaml").write_text(dump_config(ran))
    done = run_command("precompute-teacher", "-c", tmp_path / "c.yaml", "--dry-run", "--json", tmp_path / "d.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "d.json").read_text())["worth"]["step_seconds"] > 0


def test_inspect_names_the_network(ran, kind, tmp_path):
    done = run_command("inspect", BEST)
    named = "helpers.foreign_networks:Pooled" if kind == "model" else str(ran.student.pretrained)
    assert done.returncode == 0, done.stderr
    assert named in done.stdout.replace("\n", "")


def test_a_network_that_cannot_be_exported_is_one_paragraph(landscape, teacher_file, tmp_path, monkeypatch):
    """torch prints thousands of lines of the graph, here of a pooling to a fixed size."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config(landscape, teacher_file, tmp_path, student=student_of("upernet", tmp_path), train__max_steps=1)
    train(with_mode(config, "none"), CPU)
    done = run_command("export", "--checkpoint", f"{RUN}/last.ckpt", "--format", "onnx")
    assert done.returncode == 1
    assert "cannot be written as onnx" in done.stderr
    assert "Add --size PX, for a graph of one size of image" in done.stderr
    assert len(done.stdout) + len(done.stderr) < 1500
