"""What a teacher cannot predict is told before stage one writes anything, with the keys that help."""

from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from helpers.doubles import Lines
from PIL import Image

from kdpipe.cache import SoftTargetCache
from kdpipe.configs.errors import CheckpointError, ConfigError, KdpipeError
from kdpipe.pipeline.precompute.run import precompute

CPU = torch.device("cpu")
VIT, SIDE = "tu-vit_tiny_patch16_224", 224
SMALL = {"decoder_intermediate_channels": [8, 8, 8, 8], "decoder_fusion_channels": 8}


@pytest.fixture
def teacher_of(make_config, tmp_path):
    """The configuration of a network as the teacher of tiles of given sizes."""

    def teacher_of(network, sizes, **keys):
        torch.save(network.state_dict(), tmp_path / "t.pth")
        for number, (height, width) in enumerate(sizes):
            folder = tmp_path / "tiles" / "images"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"t{number}.png")
        teacher = {
            "architecture": "unet",
            "encoder": "resnet18",
            "checkpoint": str(tmp_path / "t.pth"),
            "classes": ["a", "b"],
        }
        return make_config(
            teacher=teacher | keys,
            class_map={"a": {"Forest": 1}, "b": {"Cropland": 1}},
            data={"train": [str(tmp_path / "tiles")], "val": [], "allow_missing_masks": True},
        )

    return teacher_of


def refused(config, error, message):
    """Stage one ends with the error, and has written nothing."""
    with pytest.raises(error, match=message):
        precompute(config, CPU)
    assert not Path(config.cache.path).exists()


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return smp.DPT(VIT, encoder_weights=None, classes=2, **SMALL).eval()


def dpt(**keys):
    return {"architecture": "dpt", "encoder": VIT, "options": SMALL, **keys}


def test_an_encoder_of_one_size_asks_for_its_window(teacher_of, vit):
    config = teacher_of(vit, [(200, 190), (230, 256)], **dpt())
    message = rf"teacher: dpt with {VIT} takes images of 224 x 224 px only, and tiles/t1 has 230 x 256 px: set teacher.window: 224$"
    refused(config, ConfigError, message)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"window": 256}, "set teacher.window: 224$"),
        ({"window": 224, "scales": [1.0, 1.5]}, "set teacher.scales of at most 1, as larger ones enlarge the windows$"),
    ],
)
def test_windows_and_scales_beyond_the_one_size_are_refused(teacher_of, vit, keys, message):
    refused(teacher_of(vit, [(230, 256)], **dpt(**keys)), ConfigError, message)


def test_an_encoder_of_one_size_predicts_tiles_of_all_sizes_in_its_windows(teacher_of, vit):
    config = teacher_of(vit, [(SIDE, SIDE), (60, 90), (230, 256)], **dpt(window=SIDE))
    precompute(config, CPU)
    cache = SoftTargetCache.open(config.cache.path)
    small = np.pad(image(config, 1), ((0, SIDE - 60), (0, SIDE - 90), (0, 0)), mode="reflect")
    for tile, pixels, (height, width) in (("t0", image(config, 0), (SIDE, SIDE)), ("t1", small, (60, 90))):
        with torch.no_grad():
            logits = vit(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255)[0, :, :height, :width]
        expected = torch.softmax(logits / config.distill.temperature, dim=0).numpy()
        found = cache.read(f"tiles/{tile}")[[1, 3]]  # Forest and Cropland
        np.testing.assert_allclose(found, expected, atol=1 / 255)
    assert cache.read("tiles/t2").shape == (6, 230, 256)


def image(config, number):
    return np.asarray(Image.open(f"{config.data.train[0]}/images/t{number}.png"))


@pytest.mark.long
def test_a_tile_that_is_too_small_for_the_network_is_named_with_what_it_needs(teacher_of):
    network = smp.PAN("resnet18", encoder_weights=None, classes=2).eval()
    config = teacher_of(network, [(140, 150), (60, 90)], architecture="pan")
    message = (
        "teacher: pan with resnet18 halves its images until nothing is left, so that it needs larger ones, found 1 of 64 x 96 px "
        r"\(at least 128 px on each side\), for tiles/t1 of 60 x 90 px"
    )
    refused(config, ConfigError, message)


def test_finite_weights_that_overflow_are_refused_before_anything_is_written(teacher_of):
    network = smp.Unet("resnet18", encoder_weights=None, classes=2).eval()
    with torch.no_grad():
        network.segmentation_head[0].weight.fill_(3e38)
    refused(teacher_of(network, [(64, 64)]), KdpipeError, "logits that are not finite, in precision fp32; no precision")


def test_weights_that_are_not_numbers_are_refused_before_anything_is_written(teacher_of):
    network = smp.Unet("resnet18", encoder_weights=None, classes=2).eval()
    with torch.no_grad():
        network.encoder.conv1.weight[0, 0, 0, 0] = torch.nan
    message = r"NaN or infinite, .*: encoder.conv1.weight \(1 of 9408\)\. Its training diverged"
    refused(teacher_of(network, [(64, 64)]), CheckpointError, message)


@pytest.mark.long
def test_stage_one_says_which_weights_it_takes(teacher_of, tmp_path):
    network = smp.Unet("resnet18", encoder_weights=None, classes=2).eval()
    config = teacher_of(network, [(64, 64)])
    state = network.state_dict()
    torch.save({"model": state, "model_ema": {k: v * 2 for k, v in state.items()}}, tmp_path / "t.pth")
    lines = Lines()
    precompute(config, CPU, lines)
    assert any("teacher.weights: ema takes the averaged ones" in line for line in lines.said)
