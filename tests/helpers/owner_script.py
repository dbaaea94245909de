"""The inference script of a teacher's owner, by hand: Pillow, NumPy, torch and segmentation-models-pytorch, nothing of kdpipe."""

from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
from PIL import Image

IMAGENET_MEAN, IMAGENET_STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def network(weights):
    """The small U-Net of the tests with its weights, in eval mode."""
    net = smp.Unet(Path(weights).stem, encoder_weights=None, classes=8)
    net.load_state_dict(torch.load(weights, weights_only=True))
    return net.eval()


def pixels(path):
    """0..255, float32 `(H, W, 3)`."""
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)


def logits(net, inputs_HWC, pad="reflect"):
    """Logits, float32 `(8, H, W)`, of an input that is padded on the right and below to a multiple of 32 px."""
    height, width = inputs_HWC.shape[:2]
    padded = np.pad(inputs_HWC, ((0, -height % 32), (0, -width % 32), (0, 0)), mode=pad)
    with torch.no_grad():
        scores = net(torch.from_numpy(np.ascontiguousarray(padded)).permute(2, 0, 1)[None])
    return scores[0, :, :height, :width].float().numpy()


def softmax(scores):
    return torch.softmax(torch.from_numpy(np.ascontiguousarray(scores)), dim=0).numpy()
