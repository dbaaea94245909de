"""Padding, flips, turns and scales give logits in the image's own frame, against NumPy."""

import numpy as np
import torch
from torch import nn

from kdpipe.pipeline.models.views import averaged_logits, padded_logits


class Local(nn.Module):
    """One 3×3 convolution that is not symmetric: turning its input does not turn its output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect").requires_grad_(False)

    def forward(self, x):
        return self.conv(x)


def test_odd_sizes_are_mirrored_below_and_right_and_cropped_back():
    seen = []
    images = torch.arange(33 * 45, dtype=torch.float32).view(1, 1, 33, 45)
    logits = padded_logits(lambda x: seen.append(x) or x, images)
    expected = np.pad(images[0, 0].numpy(), ((0, 31), (0, 19)), mode="reflect")
    np.testing.assert_array_equal(seen[0][0, 0].numpy(), expected)
    assert torch.equal(logits, images)


def test_d4_averages_the_eight_views_in_the_images_own_frame():
    model = Local()
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    logits = []
    for mirror in (False, True):
        for turns in range(4):
            view = np.rot90(x.numpy()[..., ::-1] if mirror else x.numpy(), turns, axes=(2, 3)).copy()
            back = np.rot90(model(torch.from_numpy(view)).numpy(), -turns, axes=(2, 3))
            logits.append(back[..., ::-1] if mirror else back)
    d4, flips, plain = (averaged_logits(model, x, tta=tta, scales=[1.0]).numpy() for tta in ("d4", "flips", "none"))
    np.testing.assert_allclose(d4, np.mean(logits, axis=0), atol=1e-5)
    np.testing.assert_allclose(flips, np.mean([logits[i] for i in (0, 2, 4, 6)], axis=0), atol=1e-5)
    assert np.abs(d4 - plain).max() > 1e-2


def test_views_and_scales_of_an_odd_rectangle_are_padded_each_in_its_own_frame():
    """At two sizes: turn, mirror the border up to a multiple of 32 px, run, crop, turn back."""
    model, x = Local(), torch.randn(1, 3, 45, 70, generator=torch.Generator().manual_seed(4))
    logits = []
    for size in ((34, 52), (45, 70)):  # 0.75 × 45 = 33.75, 0.75 × 70 = 52.5, which rounds to even
        scaled = nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False).numpy()
        for turns in range(4):
            for mirror in (False, True):
                view = np.rot90(scaled[..., ::-1] if mirror else scaled, turns, axes=(2, 3))
                height, width = view.shape[2:]
                border = [(0, 0), (0, 0), (0, -height % 32), (0, -width % 32)]
                padded = torch.from_numpy(np.pad(view, border, mode="reflect"))
                back = np.rot90(model(padded).numpy()[..., :height, :width], -turns, axes=(2, 3))
                back = torch.from_numpy((back[..., ::-1] if mirror else back).copy())
                logits.append(nn.functional.interpolate(back, size=(45, 70), mode="bilinear", align_corners=False))
    found = averaged_logits(model, x, tta="d4", scales=[0.75, 1.0])
    torch.testing.assert_close(found, torch.stack(logits).mean(dim=0), atol=1e-5, rtol=0)


def test_scales_are_averaged_at_the_images_size():
    x = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    half = nn.functional.interpolate(x, size=(32, 48), mode="bilinear", align_corners=False)
    back = nn.functional.interpolate(half, size=(64, 96), mode="bilinear", align_corners=False)
    found = averaged_logits(nn.Identity(), x, tta="none", scales=[0.5, 1.0])
    torch.testing.assert_close(found, (x + back) / 2)
