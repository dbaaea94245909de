"""The small teacher of the tests, run by segmentation-models-pytorch alone."""

from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch


def teacher_logits(file, image_HWC):
    """Its logits of an image, float32 `(8, H, W)`."""
    teacher = smp.Unet(Path(file).stem, encoder_weights=None, classes=8).eval()
    teacher.load_state_dict(torch.load(file, weights_only=True))
    height, width = image_HWC.shape[:2]
    padded = np.pad(image_HWC, ((0, -height % 32), (0, -width % 32), (0, 0)), mode="reflect")
    with torch.no_grad():
        return teacher(torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255)[0, :, :height, :width]
