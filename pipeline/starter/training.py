"""The section `train`: a starting point for tiles of the measured sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdpipe.configs.schema import Train
from kdpipe.data.survey import Root
from kdpipe.pipeline.starter.yaml import Key

GRID_PX = 32  # networks halve an image five times
USUAL_CROP, USUAL_BATCH = 512, 4  # the guide's
MAX_BATCH = 16
MAX_CROPS_PER_TILE = 16
LR = 1e-3  # of configs/dubai/linknet_kd, which trains the same student


def train_keys(roots: Sequence[Root]) -> list[Key]:
    """The keys of `train` for surveyed roots."""
    sizes = np.array([size for root in roots for size in root.sizes_HW] or [(USUAL_CROP, USUAL_CROP)])
    short = int(np.percentile(sizes.min(axis=1), 10, method="lower"))
    crop = max(GRID_PX, min(USUAL_CROP, short // GRID_PX * GRID_PX))
    area = float(np.median(sizes.prod(axis=1)))
    crops_per_tile = int(np.clip(round(area / crop**2), 1, MAX_CROPS_PER_TILE))
    samples = sum(len(root.tiles) for root in roots) * crops_per_tile
    usual = min(max(USUAL_BATCH * USUAL_CROP**2 // crop**2, USUAL_BATCH), MAX_BATCH)
    batch = min(usual, samples)
    epochs = Train().epochs
    steps = samples // batch * epochs
    small = " (smaller tiles are padded, and padding does not count)" if sizes.min() < crop else ""
    few = f", and at most the {samples} samples of an epoch" if batch < usual else ""
    keys = [
        Key("crop", crop, f"Measured: side of a training crop in px. Nine tiles in ten have at least {short} px on their shorter side; "
            f"a multiple of {GRID_PX}, at most {USUAL_CROP}{small}."),
        Key("batch_size", batch, f"Guess: crops per batch. About the pixels of {USUAL_BATCH} crops of {USUAL_CROP} px, at most "
            f"{MAX_BATCH}{few}. auto finds the largest batch that fits the device."),
        Key("crops_per_tile", crops_per_tile, "Measured: crops of each tile per epoch. As many as have the area of a median tile, "
            f"{area:.0f} px."),
        Key("lr", LR, f"Guess: for random weights. With {epochs} epochs, the default, the run has about {steps} steps."),
        Key("backbone_lr", LR, "Guess: the encoder starts from random weights too. Use a tenth with published weights."),
    ]  # fmt: skip
    return [key for key in keys if key.name != "crops_per_tile" or crops_per_tile > 1]
