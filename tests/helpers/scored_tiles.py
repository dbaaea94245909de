"""Tiles to score: a model that predicts what the image says, and IoU in a few lines of NumPy."""

import numpy as np
from PIL import Image

from kdpipe.pipeline.evaluation.evaluate import Model, Network


def stub(config, predicted=None, probability=0.9):
    """A model that predicts each pixel's red value, or `predicted(image)`, with one probability."""

    def predict(image_HWC):
        chosen = image_HWC[..., 0] if predicted is None else predicted(image_HWC)
        hot = np.eye(len(config.classes.names))[chosen].transpose(2, 0, 1)
        rest = (1 - probability) / (len(config.classes.names) - 1)
        return (hot * (probability - rest) + rest).astype(np.float32)

    return Model("a stub", [Network("none", None, "none", [1.0])], predict, config, None, list(config.data.train))


def write_tile(root, stem, predicted, labels):
    """A tile whose image holds the stub's predictions in red, and its mask, if there is one."""
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    image = np.repeat(np.asarray(predicted, np.uint8)[..., None], 3, axis=2)
    Image.fromarray(image).save(root / "images" / f"{stem}.png")
    if labels is not None:
        Image.fromarray(np.asarray(labels, np.uint8)).save(root / "masks" / f"{stem}.png")


def random_tile(seed, height=40, width=53, classes=6):
    rng = np.random.default_rng(seed)
    return rng.integers(classes, size=(height, width)), rng.choice([*range(classes), 255], size=(height, width))


def numpy_iou(predicted, masks, num_classes=6):
    """IoU by class over tiles; NaN where a class is neither predicted nor labelled."""
    predicted = np.concatenate([a[m != 255] for a, m in zip(predicted, masks, strict=True)])
    labels = np.concatenate([m[m != 255] for m in masks])
    with np.errstate(invalid="ignore"):
        return np.array([
            np.sum((predicted == c) & (labels == c)) / np.float64(np.sum((predicted == c) | (labels == c)))
            for c in range(num_classes)
        ])  # fmt: skip
