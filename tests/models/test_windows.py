"""Blended windows of a teacher give the logits of the whole image, in bounded memory."""

import pytest
import torch
from torch import nn

from kdpipe.pipeline.models import windows
from kdpipe.pipeline.models.windows import blended_bands, blended_logits


def rand(*size, seed):
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(64, 200), (150, 64), (201, 133), (97, 65), (40, 300)])
def test_windows_of_a_local_network_blend_to_the_whole_image(size):
    """A network that sees one pixel predicts the same in every window, so any seam is the blending's fault."""
    x, model = rand(*size, seed=2), nn.Conv2d(3, 2, 1).requires_grad_(False)
    torch.testing.assert_close(blended_logits(model, x, 64), model(x))


@pytest.mark.parametrize("size", [(200, 330), (321, 96)])
def test_windows_start_on_the_networks_own_grid(size):
    """A network that averages squares of 32 px: windows that start elsewhere would average others."""

    def model(part):
        bottom, right = (-side % 32 for side in part.shape[-2:])
        means = nn.functional.avg_pool2d(nn.functional.pad(part, (0, right, 0, bottom), mode="replicate"), 32)
        return nn.functional.interpolate(means, scale_factor=32)[..., : part.shape[-2], : part.shape[-1]]

    x = rand(*size, seed=3)
    torch.testing.assert_close(blended_logits(model, x, 96), model(x))


def test_no_window_is_larger_than_configured():
    """The window bounds the device's memory on a scene; a scene's smaller side may be below it."""
    seen = set()

    def model(part):
        seen.add(tuple(part.shape[-2:]))
        return part.float()

    scene = torch.randint(0, 256, (1, 3, 300, 50), dtype=torch.uint8)
    torch.testing.assert_close(blended_logits(model, scene, 64), scene.float())
    assert seen == {(64, 50), (44, 50)}, "the last one ends with the image"
    blended_logits(model, scene[..., :40], 300)
    assert seen == {(64, 50), (44, 50), (300, 40)}


def test_a_wide_scene_comes_in_few_rows_at_a_time_that_keep_nothing_else_in_memory(monkeypatch):
    monkeypatch.setattr(windows, "PIECE_PX", 7 * 200)
    x, model = rand(133, 200, seed=3), nn.Conv2d(3, 2, 1).requires_grad_(False)
    bands = list(blended_bands(model, lambda top, bottom: x[..., top:bottom, :], 133, 200, 64))
    assert max(band.shape[-2] for band in bands) == 7
    assert all(band.untyped_storage().nbytes() == band.nbytes for band in bands)
    torch.testing.assert_close(torch.cat(bands, dim=-2), model(x))


def test_a_band_is_yielded_before_the_windows_below_it_run():
    """Memory does not grow with the height of a scene."""
    tops = []

    def model(part):
        tops.append(part.storage_offset() // 64)
        return part.float()

    scene = torch.randint(0, 256, (1, 1, 640, 64), dtype=torch.uint8)
    rows = 0
    for band in blended_bands(model, lambda top, bottom: scene[..., top:bottom, :], 640, 64, 128):
        rows += band.shape[-2]
        assert tops[-1] + 1 <= rows <= tops[-1] + 128
    assert rows == 640
    assert len(tops) > 5
