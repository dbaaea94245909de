"""The recipe of stage two for tiles of some sizes: a place to begin, with the reason for each number."""

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
LR = 1e-3  # of configs/dubai/linknet_kd, whose student is the one written


def train_keys(roots: Sequence[Root]) -> list[Key]:
    """The section `train` for surveyed roots."""
    sizes = np.array([size for root in roots for size in root.sizes_HW] or [(USUAL_CROP, USUAL_CROP)])
    tiles = sum(len(root.tiles) for root in roots)
    short = int(np.percentile(sizes.min(axis=1), 10, method="lower"))
    crop = max(GRID_PX, min(USUAL_CROP, short // GRID_PX * GRID_PX))
    area = float(np.median(sizes.prod(axis=1)))
    crops_per_tile = int(np.clip(round(area / crop**2), 1, MAX_CROPS_PER_TILE))
    samples = tiles * crops_per_tile
    usual = min(max(USUAL_BATCH * USUAL_CROP**2 // crop**2, USUAL_BATCH), MAX_BATCH)
    batch = min(usual, samples)
    steps = samples // batch * Train().epochs
    small = " (smaller tiles are padded, and padding does not count)" if sizes.min() < crop else ""
    few = f"; no more than the {samples} samples of an epoch" if batch < usual else ""
    keys = [
        Key("crop", crop, f"Side of a training crop, px. Measured: nine tiles in ten have at least {short} px on their shorter side; "
            f"a multiple of {GRID_PX}, at most {USUAL_CROP}{small}."),
        Key("batch_size", batch, f"Crops in a step. Guess: about as many pixels as {USUAL_BATCH} crops of {USUAL_CROP} px, at most "
            f"{MAX_BATCH}{few}. auto measures how many fit on the device."),
    ]  # fmt: skip
    if crops_per_tile > 1:
        keys.append(
            Key("crops_per_tile", crops_per_tile, "Of each tile in an epoch. Measured: so many crops have the area of a tile, "
                f"{area:.0f} px in the middle of all.")
        )  # fmt: skip
    return [
        *keys,
        Key(
            "lr",
            LR,
            f"Guess: for random weights; with {Train().epochs} epochs, the default, the run has about {steps} steps.",
        ),
        Key(
            "backbone_lr",
            LR,
            "Guess: of the encoder, whose random weights learn as the rest does. A tenth with published weights.",
        ),
    ]
