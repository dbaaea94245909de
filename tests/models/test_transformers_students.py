"""Students that start from a folder of transformers: their head, bands and normalisation, and the part that is their encoder."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.foreign_networks import Pooled, library_network, task_tokens
from scipy.special import logsumexp
from torch import nn

from kdpipe.configs.errors import CheckpointError, ConfigError
from kdpipe.pipeline.models.external.encoder import encoder_of
from kdpipe.pipeline.models.external.outputs import AtImageSize
from kdpipe.pipeline.models.external.own_module import load_own_weights
from kdpipe.pipeline.models.external.transformers_student import (
    described_student,
    log_scores,
    own_normalization,
    pretrained_student,
    untrained_pretrained,
)
from kdpipe.pipeline.models.student import initial_student
from kdpipe.pipeline.prediction.export import exporting

EIGHT = [f"c{i}" for i in range(8)]  # the classes of the folders


@pytest.mark.parametrize("kind", ["segformer", "upernet", "dpt", "beit"])
def test_with_the_files_classes_it_is_the_files_network(kind, folders):
    said = []
    student = pretrained_student(str(folders(kind)), EIGHT, 3, said.append).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(student(images), library_network(kind, folders(kind))(images).logits)
    assert said == []


@pytest.mark.parametrize("kind", ["mask2former", "oneformer"])
def test_classes_scored_by_masks_are_logarithms_of_the_librarys_scores(kind, folders):
    student = pretrained_student(str(folders(kind)), EIGHT, 3, print).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        output = library_network(kind, folders(kind))(images, **task_tokens(kind, folders(kind), 2))
        classes, masks = output.class_queries_logits.softmax(-1), output.masks_queries_logits.sigmoid()
        scores = sum(classes[:, q, :8, None, None] * masks[:, q, None] for q in range(masks.shape[1]))
        torch.testing.assert_close(student(images).exp(), scores, rtol=1e-4, atol=1e-7)


class _LogScores(nn.Module):
    def forward(self, shares, masks):
        return log_scores(shares, masks)


def test_scores_that_underflow_keep_their_logarithms_in_torch_and_onnx(tmp_path):
    """Masks of -150 to 150, where float32's sigmoid is 0 at -104 in torch, and earlier in onnxruntime."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(2, 5, 3, generator=generator) + 0.01
    masks = torch.rand(2, 5, 8, 8, generator=generator) * 300 - 150
    masks[:, :, :4] = -masks[:, :, :4].abs()  # no query claims these pixels
    logs = -np.logaddexp(0, -masks.double().numpy())[:, :, None] + np.log(shares.double().numpy())[..., None, None]
    expected = logsumexp(logs, axis=1)
    assert (expected < -80).any()
    np.testing.assert_allclose(log_scores(shares, masks), expected, rtol=1e-5, atol=1e-5)
    file = tmp_path / "scores.onnx"
    with exporting("onnx", "scores"):
        torch.onnx.export(_LogScores(), (shares, masks), file, input_names=["shares", "masks"], dynamo=False)
    (found,) = onnxruntime.InferenceSession(file).run(None, {"shares": shares.numpy(), "masks": masks.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["segformer", "upernet", "dpt", "beit", "mask2former", "oneformer"])
def test_another_number_of_classes_has_a_new_head_alone(kind, folders):
    said = []
    student = pretrained_student(str(folders(kind)), ["a", "b", "c"], 3, said.append)
    own, kept = student.network.state_dict(), library_network(kind, folders(kind)).state_dict()
    other = {name for name in own if not torch.equal(own[name], kept[name].to(own[name].dtype))}
    assert all(own[name].shape[0] in (3, 4) for name in other)
    heads = ("classifier", "head.head", "class_predictor", "class_embed", "criterion")
    assert all(any(part in name for part in heads) for name in other)
    assert said == [
        f"student.pretrained {folders(kind)} is for 8 classes, and classes.names has 3: its head starts anew"
    ]
    with torch.inference_mode():
        assert student(torch.randn(2, 3, 64, 64)).shape[1] == 3


@pytest.mark.parametrize("kind", ["segformer", "mask2former", "oneformer"])
def test_the_same_classes_in_another_order_move_the_channels(kind, folders):
    said, order = [], [3, 0, 1, 2, 7, 6, 5, 4]
    student = pretrained_student(str(folders(kind)), [EIGHT[i] for i in order], 3, said.append).eval()
    own = pretrained_student(str(folders(kind)), EIGHT, 3, print).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(student(images), own(images)[:, order], rtol=1e-5, atol=1e-5)
    assert said == [
        f"student.pretrained {folders(kind)} has the classes of classes.names in another order: the channels of its head change places"
    ]


@pytest.mark.parametrize("kind", ["segformer", "upernet", "mask2former", "oneformer"])
def test_other_bands_have_repeated_and_scaled_filters(kind, folders):
    said = []
    student = pretrained_student(str(folders(kind)), EIGHT, 4, said.append).eval()
    own = pretrained_student(str(folders(kind)), EIGHT, 3, print).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        # Where the fourth band repeats the first, each of the two has 3/4 of its filter, and green and blue too.
        four = torch.cat([images / 1.5, images[:, :1] / 1.5], dim=1)
        four[:, 1:3] *= 2
        torch.testing.assert_close(student(four), own(images), rtol=1e-4, atol=1e-5)
    assert len(said) == 1
    assert "they are repeated in turn (red, green, blue, red) and scaled by 3/4, as timm does" in said[0]


def test_an_encoder_alone_has_a_new_decoder_and_less_is_refused(folders, tmp_path):
    import transformers as tf
    from safetensors.torch import load_file, save_file

    config = json.loads((folders("segformer") / "config.json").read_text())
    tf.SegformerForImageClassification(tf.SegformerConfig(**config)).save_pretrained(tmp_path)
    said = []
    student = pretrained_student(str(tmp_path), EIGHT, 3, said.append)
    assert [line.partition(" of ")[0] for line in said] == [f"student.pretrained {tmp_path} has no weights"]
    encoder = tf.SegformerForImageClassification.from_pretrained(tmp_path).segformer
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, student.network.segformer.state_dict()[name])
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state[next(name for name in state if "patch_embeddings" in name)]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks weights of the encoder that its config.json describes: segformer"):
        pretrained_student(str(tmp_path), EIGHT, 3, print)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "part"),
    [("segformer", "segformer"), ("upernet", "backbone"), ("dpt", "dpt"), ("beit", "beit"),
     ("mask2former", "model.pixel_level_module.encoder"), ("oneformer", "model.pixel_level_module.encoder")],
)  # fmt: skip
def test_the_encoder_is_the_backbone_or_the_base_model(kind, part, folders):
    network = untrained_pretrained(str(folders(kind)), EIGHT, 3)
    wrapped = AtImageSize(network, 8, "student.pretrained", print)
    assert encoder_of(wrapped) is network.network.get_submodule(part)


def test_the_encoder_of_other_networks_is_what_is_called_so():
    class Named(nn.Module):
        def __init__(self, name):
            super().__init__()
            setattr(self, name, nn.Conv2d(3, 4, 1))
            self.head = nn.Conv2d(4, 2, 1)

    for name in ("encoder", "backbone"):
        network = Named(name)
        assert encoder_of(AtImageSize(network, 2, "k", print)) is getattr(network, name)
    assert encoder_of(Named("trunk")) is None
    assert encoder_of(AtImageSize(Pooled(), 8, "k", print)) is None


@pytest.mark.parametrize(
    ("changes", "mean", "std"),
    [
        ({}, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ({"rescale_factor": 1 / 127.5}, [0.2425, 0.228, 0.203], [0.1145, 0.112, 0.1125]),
        ({"do_rescale": False, "image_mean": [120, 110, 100], "image_std": [51, 51, 51]}, [120 / 255, 110 / 255, 100 / 255], [0.2] * 3),
        ({"do_normalize": False}, [0, 0, 0], [1, 1, 1]),
    ],
)  # fmt: skip
def test_normalisation_is_what_the_files_processor_does(changes, mean, std, folders, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(json.loads((folders("segformer") / "preprocessor_config.json").read_text()) | changes)
    )
    found = own_normalization(str(tmp_path), 3)
    assert found.mean == pytest.approx(mean)
    assert found.std == pytest.approx(std)
    assert own_normalization(str(tmp_path), 5).mean == pytest.approx([*mean, *mean[:2]])


def test_a_folder_without_a_processor_says_what_to_do(folders, tmp_path, make_config):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"found none \(KeyError\).*or set student.normalize"):
        own_normalization(str(tmp_path), 3)
    pretrained = str(folders("segformer"))
    assert make_config(student={"pretrained": pretrained}).student.normalize == "pretrained"
    assert make_config(student={"pretrained": pretrained, "normalize": "unit"}).student.normalize == "unit"
    assert make_config().student.normalize == "imagenet"


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({}, "needs one of architecture, model and pretrained to name the network, found none"),
        ({"architecture": "unet", "encoder": "resnet18", "model": "a:b"}, "found architecture and model"),
        ({"pretrained": "folder", "encoder": "resnet18"}, "encoder does not go with pretrained: leave it out"),
        ({"model": "a:b", "replace_head": True}, "replace_head does not go with model"),
        ({"model": "no colon"}, "student.model"),
        ({"architecture": "unet", "encoder": "resnet18", "normalize": "pretrained"}, "normalize is pretrained, which goes with"),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_together_are_refused(make_config, student, message):
    with pytest.raises(ConfigError, match=message):
        make_config(student=student)


def test_oneformers_task_is_saved_with_its_weights_and_needs_the_folders_tokenizer(folders, tmp_path):
    student = untrained_pretrained(str(folders("oneformer")), EIGHT, 3).eval()
    again = described_student(student.description, "a file").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert not torch.equal(again(images), student(images))
        again.load_state_dict(student.state_dict())
        assert torch.equal(again(images), student(images))
    (tmp_path / "config.json").write_bytes((folders("oneformer") / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="OneFormer is told its task by a text, and transformers cannot read the"):
        untrained_pretrained(str(tmp_path), EIGHT, 3)


def test_weights_of_ones_own_module_have_any_prefix(tmp_path, make_config):
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Pooled(6)

    for prefix, network in (("", Pooled(6)), ("student.network.", Pooled(6)), ("module.", Held()), ("", Held())):
        expected = {
            name: torch.randn_like(value) for name, value in network.state_dict().items() if value.is_floating_point()
        }
        counters = {name: value for name, value in network.state_dict().items() if name not in expected}
        torch.save(
            {"state_dict": {prefix + name: value for name, value in (expected | counters).items()}}, tmp_path / "w.ckpt"
        )
        load_own_weights(network, tmp_path / "w.ckpt")
        assert all(torch.equal(network.state_dict()[name], value) for name, value in expected.items())
    config = make_config(
        student={"model": "helpers.foreign_networks:Pooled", "options": {"num_classes": 6}, "checkpoint": "w.ckpt"}
    )
    with pytest.raises(
        CheckpointError, match="w.ckpt does not fit the model"
    ):  # the last file is of the network that holds it
        torch.save({"stem.weight": torch.zeros(1)}, tmp_path / "w.ckpt")
        initial_student(config)
