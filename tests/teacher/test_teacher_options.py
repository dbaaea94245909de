"""`teacher.options` decide what a teacher predicts, and a cache knows by which it was made."""

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from helpers.configs import ENCODER
from PIL import Image

from kdpipe.cache import SoftTargetCache
from kdpipe.configs.errors import CheckpointError, ConfigError, StaleCache
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.teacher.loading import load_teacher
from kdpipe.pipeline.training.run import train
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")
DILATED = {"encoder_output_stride": 8, "decoder_atrous_rates": [2, 4, 6]}


@pytest.fixture(scope="module")
def dilated(tmp_path_factory):
    """A DeepLabV3+ built with `DILATED` by smp itself, and its file of weights."""
    torch.manual_seed(5)
    network = smp.DeepLabV3Plus(ENCODER, encoder_weights=None, classes=8, decoder_channels=64, **DILATED)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network(torch.rand(2, 3, 96, 96))  # statistics with which every layer passes something on
        network.eval().segmentation_head[0].weight *= 4  # predictions that are neither flat nor certain
    path = tmp_path_factory.mktemp("dilated") / "deeplab.pth"
    torch.save(network.state_dict(), path)
    return network, path


@pytest.fixture
def configured(make_config, dilated):
    """A configuration of the teacher above with these options, at T 1."""

    def configured(options, **changes):
        return make_config(
            teacher__architecture="deeplabv3plus",
            teacher__encoder=ENCODER,
            teacher__checkpoint=str(dilated[1]),
            teacher__options={"decoder_channels": 64} | options,
            distill__temperature=1.0,
            **changes,
        )

    return configured


def targets(network, tile, class_map):
    """`softmax(z) @ M` of a tile, float32 `(C, H, W)`, by smp and NumPy alone."""
    pixels_HWC = np.asarray(Image.open(tile), dtype=np.float32) / 255
    height, width = pixels_HWC.shape[:2]
    padded = np.pad(pixels_HWC, ((0, -height % 32), (0, -width % 32), (0, 0)), mode="reflect")
    with torch.inference_mode():
        logits_CHW = network(torch.from_numpy(padded).permute(2, 0, 1)[None])[0, :, :height, :width].double().numpy()
    probs = np.exp(logits_CHW - logits_CHW.max(axis=0))
    return np.einsum("thw,ts->shw", probs / probs.sum(axis=0), class_map)


def test_a_cache_holds_what_smp_predicts_with_the_options_and_not_without(configured, dilated, landscape, tmp_path):
    config, plain = configured(DILATED), configured({}, cache__path=str(tmp_path / "plain.zarr"))
    fingerprints = [precompute(each, CPU).fingerprint for each in (config, plain)]
    assert len(set(fingerprints)) == 2
    cache, other = SoftTargetCache.open(config.cache.path), SoftTargetCache.open(plain.cache.path)
    assert cache.manifest.recipe.teachers[0].options == {"decoder_channels": 64} | DILATED
    tile = cache.tile_ids[0]
    expected = targets(
        dilated[0], landscape / "Train" / "images" / f"{tile.split('/')[-1]}.png", config.class_map_matrix()
    )
    assert np.abs(cache.read(tile) - expected).max() <= cache.manifest.error_bound + 1e-5
    assert np.abs(other.read(tile) - expected).max() > 0.2


@pytest.mark.long
def test_a_cache_of_other_options_is_refused_as_stale_naming_them(configured):
    config = configured(DILATED)
    precompute(config, CPU)
    report = verify(config, "parity", CPU, sample=2)  # which runs the teacher again, with its options
    assert {finding.code for finding in report.findings} <= {"class-map"}  # a random network's classes fit no labels
    assert len(report.parity) == 2
    changed = r'teacher\.options: the cache has \{.*"encoder_output_stride": 8\}, the configuration says \{"decoder_channels": 64\}'
    for refuse in (precompute, train):
        with pytest.raises(StaleCache, match=changed):
            refuse(configured({}), CPU)
    (finding,) = verify(configured({}), "quick", CPU).findings
    assert finding.code == "stale-recipe"


def test_a_cache_made_without_options_is_stale_for_a_configuration_with_them(cached, make_config):
    assert "options" not in SoftTargetCache.open(cached.cache.path).manifest.recipe.model_dump()["teachers"][0]
    with pytest.raises(
        StaleCache,
        match=r'teacher\.options: the cache has \{\}, the configuration says \{"decoder_interpolation": "bilinear"\}',
    ):
        precompute(make_config(teacher__options={"decoder_interpolation": "bilinear"}), CPU)


def test_an_unknown_option_is_refused_before_anything_is_written(configured, tmp_path):
    with pytest.raises(
        ConfigError, match="deeplabv3plus has no option output_stride; did you mean encoder_output_stride?"
    ):
        precompute(configured({"output_stride": 8}), CPU)
    assert list(tmp_path.iterdir()) == []
    teacher = configured({"output_stride": 8}).teacher
    with pytest.raises(ConfigError, match=r"teachers\.1\.options: deeplabv3plus has no option output_stride"):
        load_teacher(teacher, "teachers.1")


@pytest.mark.long
def test_options_that_weights_contradict_are_named_with_the_line_that_fits(make_config, tmp_path):
    options = {"decoder_pyramid_channels": 32}
    for name, given in (("plain.pth", {}), ("small.pth", options)):
        network = smp.create_model("fpn", "mobilenet_v2", encoder_weights=None, classes=8, **given)
        torch.save(network.state_dict(), tmp_path / name)
    plain, small = (
        make_config().teacher.model_copy(
            update={"architecture": "fpn", "checkpoint": str(tmp_path / name), "options": options}
        )
        for name in ("plain.pth", "small.pth")
    )
    load_teacher(small)
    message = (
        r"holds fpn with mobilenet_v2, 8 channels, but teacher says .* and options \{decoder_pyramid_channels: 32\}, "
    )
    with pytest.raises(CheckpointError, match=message) as refused:
        load_teacher(plain)
    assert "\n      options: {}" in str(refused.value)
    message = r"holds fpn with mobilenet_v2 and options \{decoder_pyramid_channels: 32\}, 8 channels, but"
    with pytest.raises(CheckpointError, match=message):
        load_teacher(small.model_copy(update={"classes": [*small.classes, "Other"]}))


def test_a_value_that_was_refused_leaves_nothing_behind_that_refuses_the_right_one(configured):
    with pytest.raises(
        ConfigError, match=r"cannot build deeplabv3plus with .* and options \{.*encoder_output_stride: 7\}"
    ):
        precompute(configured({"encoder_output_stride": 7}), CPU)
    config = configured({"encoder_output_stride": 8})
    assert precompute(config, CPU).computed == len(SoftTargetCache.open(config.cache.path).tile_ids)
