"""Networks and functions that a program passes in Python, which the configuration names as `given`."""

import copy

import numpy as np
import pytest
import torch
from helpers.commands import arguments, run_command
from helpers.foreign_networks import CLASSES, Pooled
from helpers.teacher_kinds import CPU, pixels
from torch.nn import functional as F

from kdpipe.cache import SoftTargetCache
from kdpipe.configs.errors import ConfigError, StaleCache
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.precompute import precompute
from kdpipe.pipeline.training.targets import open_fresh_cache
from kdpipe.pipeline.verify import verify


@pytest.fixture
def config_named(make_config, tmp_path):
    """A configuration whose network is passed in Python, by its name."""
    return lambda name, **overrides: make_config(
        **({"teacher": {"given": name, "classes": CLASSES}, "data__limit": 2} | overrides)
    )


@pytest.fixture
def network():
    torch.manual_seed(0)
    made = Pooled().eval()
    with torch.no_grad():
        made.head.weight *= 8
    return made


def brightness(images_NBHW):
    """A function of no weights: eight classes by brightness, in NumPy, at half of the resolution."""
    grey = F.avg_pool2d(images_NBHW, 2).mean(dim=1, keepdim=True).numpy()
    return -20 * np.abs(grey - np.linspace(0, 1, 8, dtype=np.float32)[None, :, None, None])


def softened(logits_THW, config):
    exact = np.exp(logits_THW - logits_THW.max(axis=0))
    mapped = np.einsum("thw,ts->shw", exact / exact.sum(axis=0), config.class_map_matrix())
    return np.sqrt(mapped) / np.sqrt(mapped).sum(axis=0)  # T 2


@pytest.mark.parametrize("kind", ["module", "function"])
def test_the_cache_holds_what_the_network_says(config_named, network, kind):
    teacher = network if kind == "module" else brightness
    config = config_named("mine 1")
    before = copy.deepcopy(network.state_dict())
    assert precompute(config, "cpu", teacher=teacher).computed == 2
    tile = list_tiles(config.data, "train")[0]
    image = np.asarray(pixels(tile.image))
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % 32), (0, -width % 32), (0, 0)), mode="reflect")
    x = torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        logits = network(x)["out"] if kind == "module" else torch.from_numpy(brightness(x))
    logits = F.interpolate(logits, size=padded.shape[:2], mode="bilinear", align_corners=False)
    expected = softened(logits[0, :, :height, :width].numpy(), config)
    assert (
        np.abs(SoftTargetCache.open(config.cache.path, partial=True).read(tile.id) - expected).max() <= 1 / 255 + 2e-5
    )
    report = verify(config, "parity", "cpu", teacher=teacher, sample=2)
    assert [finding for finding in report.findings if finding.code != "class-map"] == []
    assert len(report.parity) == 2
    assert precompute(config, CPU, teacher=teacher).computed == 0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.head.weight.requires_grad, "the caller's module stays as it was"


def test_name_and_weights_are_in_the_fingerprint_and_of_a_function_the_name_alone(config_named, network, tmp_path):
    precompute(config_named("mine 1"), CPU, teacher=network)
    with pytest.raises(StaleCache, match=r'teacher.given: the cache has "mine 1", the configuration says "mine 2"'):
        precompute(config_named("mine 2"), CPU, teacher=network)
    with torch.no_grad():
        network.head.bias += 1
    with pytest.raises(StaleCache, match="teacher.checkpoint_sha256"):
        precompute(config_named("mine 1"), CPU, teacher=network)
    assert [finding.code for finding in verify(config_named("mine 1"), "quick", CPU, teacher=network).findings] == [
        "stale-recipe"
    ]
    own = {"cache__path": str(tmp_path / "function.zarr")}
    precompute(config_named("brightness", **own), CPU, teacher=brightness)
    assert precompute(config_named("brightness", **own), CPU, teacher=lambda images: brightness(images)).computed == 0
    with pytest.raises(StaleCache, match="teacher.source_sha256|teacher.checkpoint_sha256"):
        precompute(config_named("brightness", **own), CPU, teacher=network)


def test_training_and_a_check_by_name_need_no_network_and_stage_one_does(config_named, network, tmp_path):
    config = config_named("mine 1")
    precompute(config, CPU, teacher=network)
    assert open_fresh_cache(config, list_tiles(config.data, "train"), None).tile_ids
    assert verify(config, "full", CPU).findings == []
    with pytest.raises(ConfigError, match=r"teacher.given: mine 1 is a network that is passed in Python, and none was"):
        verify(config, "parity", CPU)
    found = run_command(*arguments(config, "precompute-teacher", folder=tmp_path))
    assert found.returncode == 2
    assert "is a network that is passed in Python, and none was" in " ".join(found.stderr.split())


def test_views_and_windows_take_it(config_named, network, tmp_path):
    ways = {
        "views": {"distill__teacher_view": "crop", "cache__views": 1},
        "windows": {"teacher": {"given": "mine", "classes": CLASSES, "tta": "flips", "window": 64}},
    }
    for name, way in ways.items():
        config = config_named("mine", **way, cache__path=str(tmp_path / f"{name}.zarr"))
        precompute(config, CPU, teacher=network)
        report = verify(config, "parity", CPU, teacher=network, sample=1)
        assert [finding for finding in report.findings if finding.code != "class-map"] == [], name


def test_what_cannot_be_is_refused(config_named, make_config, network):
    with pytest.raises(ConfigError, match="should name exactly one teacher as given.*found 0"):
        precompute(make_config(), CPU, teacher=network)
    with pytest.raises(ConfigError, match="should be an nn.Module or a function from images to logits, found int"):
        precompute(config_named("mine"), CPU, teacher=3)
    with pytest.raises(ConfigError, match="cannot be sent to other processes"):
        precompute(config_named("mine"), CPU, teacher=network, workers=object())
    with pytest.raises(ConfigError, match=r"teacher.given should return logits of shape"):
        precompute(config_named("mine"), CPU, teacher=lambda images: images)
