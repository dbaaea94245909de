"""
Random augmentation: the views that make up a training sample, and the change of its colours.

The recipe is GeoSeg's (https://github.com/WangLibo1995/GeoSeg, `SmartCropV1` and the mosaic of its data sets): a random scale, a
crop that no single class fills, a mosaic of four at times, flips and quarter turns. Two changes are for students of a teacher that
sees the tile as it is, so that its targets stay right: CutMix and a shift of colours.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kdpipe.configs import schema
from kdpipe.data.geometry import Plan, Resampler, View, scaled_size

# Spread of a shift of colours, in shares of the range of a band: that of all bands together, and of each on its own.
GAMMA, GAMMA_OF_BAND = 0.4, 0.15  # natural logarithms of the exponent
CONTRAST, CONTRAST_OF_BAND = 0.3, 0.1  # of the factor
BRIGHTNESS, BRIGHTNESS_OF_BAND = 0.12, 0.06
BOX_SHARES = (0.1, 0.5)  # of the crop, which a box of CutMix covers

CROP_TRIES = 10  # the search must end on a tile of one class; SmartCropV1 gives up after 11

SizeOf = Callable[[int], tuple[int, int]]
"""Maps a tile number to its `(H, W)` in px."""
MaskOf = Callable[[int], NDArray[np.int32] | None]
"""Maps a tile number to its labels, int32 `(H, W)`, or None for a tile without a mask."""


def sample_plan(
    rng: np.random.Generator,
    tile: int,
    num_tiles: int,
    train: schema.Train,
    ignore_index: int,
    size_of: SizeOf,
    mask_of: MaskOf,
) -> Plan:
    """
    A plan for one sample of `train.crop` px around tile number `tile` of `num_tiles`.

    With probability `train.mosaic` it shows this tile and three drawn from all tiles, one per quadrant, each with its own scale; the
    quadrants meet at a point that is uniform in crop/4..3*crop/4 on both axes. Positions are uniform. They are drawn again, up to
    `CROP_TRIES` draws in all, while one class covers more than `train.max_class_share` of the sample's labelled pixels or fewer than
    two classes occur; the last draw stays. The first draw stays if `max_class_share` is 1 or no tile of the sample has a mask.
    Flips have probability 1/2 each, quarter turns 1/4 each.

    Only masks of the sample's own tiles are read, and none if `max_class_share` is 1.
    """
    frames = _frames(rng, tile, num_tiles, train)
    scales = [float(rng.choice(train.scales)) for _ in frames]
    for _ in range(CROP_TRIES):
        views = tuple(_place(rng, frame, scale, size_of) for frame, scale in zip(frames, scales, strict=True))
        if train.max_class_share == 1 or is_varied(views, train.max_class_share, ignore_index, mask_of):
            break
    return Plan(
        crop=train.crop,
        views=views,
        flip_h=bool(rng.random() < 0.5),
        flip_v=bool(rng.random() < 0.5),
        rot90=int(rng.integers(4)),
        photometric_seed=int(rng.integers(2**32)) if rng.random() < train.photometric else None,
    )


def with_mixing(
    rng: np.random.Generator, plan: Plan, num_tiles: int, train: schema.Train, size_of: SizeOf, *, has_labels: bool
) -> Plan:
    """
    The plan with a box of another tile at times (`train.cutmix`), and a shift of colours (`train.colour_shift`).

    The box has the proportions of the crop and covers `BOX_SHARES` of it, at a uniform position, with a scale of its own (CutMix, Yun et
    al. 2019, arXiv 1905.04899). Draws no number for what is switched off.
    """
    shift = train.colour_shift if has_labels or train.unlabelled_colour_shift is None else train.unlabelled_colour_shift
    if train.cutmix and rng.random() < train.cutmix:
        side = max(1, round(plan.crop * float(rng.uniform(*BOX_SHARES)) ** 0.5))
        top, left = rng.integers(plan.crop - side, size=2, endpoint=True).tolist()
        frame = (int(rng.integers(num_tiles)), top, left, side, side)
        plan = replace(plan, views=(*plan.views, _place(rng, frame, float(rng.choice(train.scales)), size_of)))
    if shift and rng.random() < shift:
        plan = replace(plan, shift_seed=int(rng.integers(2**32)))
    return plan


def source_tiles(rng: np.random.Generator, tile: int, num_tiles: int, train: schema.Train) -> list[int]:
    """The numbers of the tiles that `sample_plan` shows for the same arguments: `tile`, and three more in a mosaic."""
    return [frame[0] for frame in _frames(rng, tile, num_tiles, train)]


def views_per_sample(train: schema.Train) -> float:
    """Average number of views in a sample; a mosaic has four, and a box of CutMix is one more."""
    return 1 + 3 * train.mosaic + train.cutmix


def is_varied(views: tuple[View, ...], max_class_share: float, ignore_index: int, mask_of: MaskOf) -> bool:
    """
    Whether at least two classes occur in the labelled pixels of all views, none with more than `max_class_share` of them.

    True if no tile of the views has a mask.
    """
    counts = np.zeros(ignore_index + 1, dtype=np.int64)
    any_mask = False
    for view in views:
        labels = mask_of(view.tile)
        if labels is None:
            continue
        any_mask = True
        resampler = Resampler(view, *labels.shape)
        y, x, h, w = resampler.window
        view_labels = resampler.mask(labels[y : y + h, x : x + w], ignore_index)
        counts += np.bincount(view_labels.ravel(), minlength=len(counts))
    counts[ignore_index] = 0
    if not any_mask:
        return True
    return int(np.count_nonzero(counts)) >= 2 and bool(counts.max() <= max_class_share * counts.sum())


def change_colours(image_HWC: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """
    The image, uint8 `(H, W, 3)`, with random brightness, contrast and tint, and perhaps blur or noise, seeded by `seed`.

    A grey image, uint8 `(H, W, 1)`, gets no tint.

    The transforms are built on each call (1 ms), because albumentations keeps its generators in them and threads would share them.
    """
    # Without it, the import looks for a newer version on the network, and warns if it cannot.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    # Ranges below albumentations' defaults (0.2; 20, 30, 20; 0.2-0.44), because colour identifies land cover.
    tint = albumentations.HueSaturationValue(hue_shift_limit=8, sat_shift_limit=15, val_shift_limit=8, p=1)
    change = albumentations.Compose(
        [
            albumentations.RandomBrightnessContrast(brightness_limit=0.15, contrast_limit=0.15, p=1),
            *([tint] if image_HWC.shape[-1] == 3 else []),
            albumentations.OneOf(
                [
                    albumentations.GaussianBlur(blur_limit=(3, 5), p=1),
                    albumentations.GaussNoise(std_range=(0.01, 0.03), p=1),
                    albumentations.NoOp(p=1),
                ],
                p=1,
            ),
        ]
    )
    change.set_random_seed(seed)
    image: NDArray[np.uint8] = change(image=image_HWC)["image"]
    return image


def shift_colours(image_HWB: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """
    The image, uint8 `(H, W, B)`, with another gamma, mean and deviation in each band, as another scene or sensor would have them.

    A band `x` in 0..1 becomes `mean + b + a (x^γ - mean)` with the mean of `x^γ` over the image; a, b and γ are partly common to all bands.
    """
    rng = np.random.default_rng(seed)
    bands = image_HWB.shape[-1]

    def drawn(common: float, own: float) -> NDArray[np.float64]:
        of_all = rng.uniform(-common, common)
        return np.asarray(rng.uniform(-own, own, bands)) + of_all

    gamma_B = np.exp(drawn(GAMMA, GAMMA_OF_BAND))
    contrast_B = np.exp(drawn(CONTRAST, CONTRAST_OF_BAND))
    brightness_B = drawn(BRIGHTNESS, BRIGHTNESS_OF_BAND)
    shifted = np.empty_like(image_HWB)
    for band in range(bands):
        curve = (np.arange(256) / 255) ** gamma_B[band]
        counts = np.bincount(image_HWB[..., band].ravel(), minlength=256)
        mean = (curve * counts).sum() / counts.sum()
        curve = mean + brightness_B[band] + contrast_B[band] * (curve - mean)
        table = np.rint(255 * curve.clip(0, 1)).astype(np.uint8)
        shifted[..., band] = table[image_HWB[..., band]]
    return shifted


_Frame = tuple[int, int, int, int, int]
"""A tile number and its place in the sample: `(tile, top, left, height, width)`."""


def _frames(rng: np.random.Generator, tile: int, num_tiles: int, train: schema.Train) -> list[_Frame]:
    if rng.random() < train.mosaic:
        return _quadrants(rng, tile, num_tiles, train)
    return [(tile, 0, 0, train.crop, train.crop)]


def _quadrants(rng: np.random.Generator, tile: int, num_tiles: int, train: schema.Train) -> list[_Frame]:
    tiles = [tile, *rng.integers(num_tiles, size=3).tolist()]
    quarter = train.crop // 4
    row, column = rng.integers(quarter, train.crop - quarter, size=2, endpoint=True).tolist()
    spans = [(0, 0), (0, column), (row, 0), (row, column)]
    return [
        (number, top, left, train.crop - row if top else row, train.crop - column if left else column)
        for number, (top, left) in zip(tiles, spans, strict=True)
    ]


def _place(rng: np.random.Generator, frame: _Frame, scale: float, size_of: SizeOf) -> View:
    tile, out_top, out_left, height, width = frame
    scaled_height, scaled_width = scaled_size(*size_of(tile), scale)
    top = int(rng.integers(max(0, scaled_height - height), endpoint=True))
    left = int(rng.integers(max(0, scaled_width - width), endpoint=True))
    return View(tile, scale, top, left, height, width, out_top, out_left)
