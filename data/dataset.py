"""
Training samples and validation tiles as map-style datasets of NumPy arrays, without torch.

A training sample depends on (seed, epoch, index) alone, not on the worker that makes it or on earlier samples. Both
datasets are picklable, hold no open file and can be read from several threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from kdpipe.configs import Config
from kdpipe.configs.errors import DataError
from kdpipe.data.augment import change_colours, sample_plan, shift_colours, with_mixing
from kdpipe.data.declared.tile import require_same_size
from kdpipe.data.geometry import Plan, Resampler, Window, orient
from kdpipe.data.lru import Recent
from kdpipe.data.rasters import Stretch, image_size, read_image_with_data, read_mask
from kdpipe.data.tiles import Tile

# Decoded tiles kept per process: about 70 labelled tiles of 1024 px. Cropping a JPEG means decoding all of it, which took half of a
# small student's step.
KEPT_BYTES = 512 * 2**20


class TargetSource(Protocol):
    """A source of soft targets: the cache, or a teacher."""

    def read(self, tile_id: str, window: Window) -> NDArray[np.float32]:
        """The soft target in a window `(top, left, h, w)` of a tile, float32 `(C, h, w)`; sums to 1 over axis 0, or 0 without one."""
        ...

    def entropy_error(self, tile_id: str, window: Window) -> float:
        """Mean over a window of the exact target's entropy minus the stored one's, in nats; 0 if targets are exact."""
        ...


class TrainSample(TypedDict):
    """A crop; h and w are `train.crop`."""

    image: NDArray[np.uint8]  # (B, h, w), all of `data.bands`
    mask: NDArray[np.int64]  # (h, w), ignore_index outside and in tiles without mask
    inside: NDArray[np.bool_]  # (h, w), False over padding and where the image holds no data, or the tile no target
    target: NotRequired[NDArray[np.float32]]  # (C, h, w), sums to 1 inside, 0 outside
    entropy_error: NotRequired[np.float32]  # mean over the pixels inside, nats; with target


class ValSample(TypedDict):
    """A whole tile of H x W px."""

    image: NDArray[np.uint8]  # (B, H, W)
    mask: NDArray[np.int64]  # (H, W), ignore_index in tiles without mask and where the image holds no data
    tile: int


class TrainTiles:
    """
    Augmented crops of training tiles: `train.crops_per_tile` of each tile per epoch, or `train.unlabelled_crops_per_tile` (if set)
    of a tile without a mask.

    Sample `k` is number `k % len(self)` of epoch `k // len(self)`, so indices beyond the length belong to later epochs.

    Args:
        tiles: from `list_tiles`.
        config: `train`, `classes`, `seed` and the keys of `data` that say how images are read are used.
        stretch: from `resolve_stretch`.
        targets: soft targets, read by window; None leaves `target` out of the samples.
        sizes: the tiles' `(H, W)`; None reads them from the files' headers as needed.
        samples: of an epoch, at least; tiles take further turns to reach it.

    Reading a sample raises `DataError` if a file is unusable, or if image and mask differ in size.
    """

    def __init__(
        self,
        tiles: Sequence[Tile],
        config: Config,
        stretch: Stretch = None,
        targets: TargetSource | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        samples: int = 0,
    ) -> None:
        if not tiles:
            raise DataError("there is no tile to train on: data.train and data.unlabelled hold no usable tile")
        self.tiles = list(tiles)
        self.targets = targets
        self._config = config
        self.stretch = stretch
        self._sizes = dict(enumerate(sizes)) if sizes is not None else {}
        self._recent = Recent(KEPT_BYTES)
        self._drawn = filled(_drawn_tiles(self.tiles, config), samples)

    def __len__(self) -> int:
        return len(self._drawn)

    @property
    def drawn_tiles(self) -> list[Tile]:
        """The tiles that samples are drawn of, in the order of the first samples of an epoch, which has one of each first."""
        return [self.tiles[number] for number in dict.fromkeys(self._drawn)]

    def __getitem__(self, k: int) -> TrainSample:
        """Sample `k`."""
        return self.render(self.plan(k))

    def plan(self, k: int) -> Plan:
        """The plan of sample `k`: the same in every process and on every machine."""
        if k < 0:
            raise IndexError(f"samples are counted from 0 over all epochs, found {k}")
        epoch, i = divmod(k, len(self))
        rng, tile, train = np.random.default_rng([self._config.seed, epoch, i]), self._drawn[i], self._config.train
        plan = sample_plan(
            rng,
            tile,
            len(self.tiles),
            train,
            self._config.classes.ignore_index,
            size_of=self._size,
            mask_of=self._mask,
        )
        has_labels = self.tiles[tile].mask is not None
        return with_mixing(rng, plan, len(self.tiles), train, self._size, has_labels=has_labels)

    def render(self, plan: Plan) -> TrainSample:
        """The sample made by `plan`."""
        crop, ignore_index = plan.crop, self._config.classes.ignore_index
        image = np.zeros((crop, crop, len(self._config.data.bands)), dtype=np.uint8)
        mask = np.full((crop, crop), ignore_index, dtype=np.int32)
        inside = np.zeros((crop, crop), dtype=np.bool_)
        without_target = np.zeros((crop, crop), dtype=np.bool_)
        target: NDArray[np.float32] | None = None
        whole = True
        lost: list[tuple[int, float]] = []  # entropy that the target of each view lost
        shown_in = np.zeros((crop, crop), dtype=np.int8)  # the number of the view that a pixel shows
        for number, view in enumerate(plan.views):
            resampler = Resampler(view, *self._size(view.tile))
            y, x, h, w = resampler.window
            source = np.s_[y : y + h, x : x + w]
            place = np.s_[view.out_top : view.out_top + view.height, view.out_left : view.out_left + view.width]
            pixels, data = self._image(view.tile)
            image[place] = resampler.image(pixels[source])
            inside[place] = resampler.inside(None if data is None else data[source])
            whole &= data is None
            labels = self._mask(view.tile)
            mask[place] = ignore_index if labels is None else resampler.mask(labels[source], ignore_index)
            shown_in[place], without_target[place] = number, False
            if self.targets is not None:
                tile_id, window = self.tiles[view.tile].id, resampler.window
                probs_CHW = self.targets.read(tile_id, window=window)
                has_target_HW = probs_CHW.max(axis=0) != 0  # NaN is a damaged target, which the loss shows
                if not has_target_HW.all():  # labels teach there all the same
                    without_target[place] = ~resampler.inside(has_target_HW)
                probs = resampler.target(probs_CHW)
                if target is None:
                    target = np.zeros((probs.shape[0], crop, crop), dtype=np.float32)
                target[:, *place] = probs
                lost.append((number, self.targets.entropy_error(tile_id, window=window)))
        if not whole:  # labels and targets of pixels without data mean nothing
            mask[~inside] = ignore_index
            if target is not None:
                target[:, ~inside] = 0
        if target is not None and without_target.any():
            inside &= ~without_target
            target[:, without_target] = 0
        taught = inside.sum()
        entropy_error = sum(int((inside & (shown_in == number)).sum()) * error for number, error in lost)
        image = recoloured(orient(image, plan), self._config.data.visible_places, plan)
        sample = TrainSample(
            image=np.ascontiguousarray(image.transpose(2, 0, 1)),
            mask=orient(mask, plan).astype(np.int64),
            inside=orient(inside, plan),
        )
        if target is not None:
            sample["target"] = np.stack([orient(probs_HW, plan) for probs_HW in target])
            sample["entropy_error"] = np.float32(entropy_error / max(1, taught))
        return sample

    def _size(self, tile: int) -> tuple[int, int]:
        if tile not in self._sizes:
            self._sizes[tile] = image_size(self.tiles[tile].image)
        return self._sizes[tile]

    def _image(self, tile: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        """See `read_image_with_data`."""
        image, data = self._recent.get_all(
            ("image", tile), lambda: _read_image(self.tiles[tile], self._config, self.stretch, self._size(tile))
        )
        assert image is not None
        return image, data

    def _mask(self, tile: int) -> NDArray[np.int32] | None:
        if self.tiles[tile].mask is None:
            return None
        return self._recent.get(
            ("mask", tile),
            lambda: read_labels(self.tiles[tile], self._config, self._size(tile), self._image(tile)[1]),
        )


class ValTiles:
    """
    Whole tiles, one per sample, unaltered.

    Tiles differ in size: batch them with `batches_of_equal_size(dataset.sizes(), n)`. Reading raises `DataError` if a file
    is unusable, or if image and mask differ in size.
    """

    def __init__(self, tiles: Sequence[Tile], config: Config, stretch: Stretch = None) -> None:
        self.tiles = list(tiles)
        self._config = config
        self._stretch = stretch

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, i: int) -> ValSample:
        """Tile number `i`."""
        tile = self.tiles[i]
        image, data = _read_image(tile, self._config, self._stretch, None)
        height, width, _ = image.shape
        if tile.mask is None:
            labels = np.full((height, width), self._config.classes.ignore_index, dtype=np.int32)
        else:
            labels = read_labels(tile, self._config, (height, width), data)
        return ValSample(image=np.ascontiguousarray(image.transpose(2, 0, 1)), mask=labels.astype(np.int64), tile=i)

    def sizes(self) -> list[tuple[int, int]]:
        """The tiles' `(H, W)` in px, from the files' headers."""
        return [image_size(tile.image) for tile in self.tiles]


def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of the `n` samples of an epoch: a permutation of 0..n-1, int64 `(n,)`."""
    # [seed, epoch] would be the stream of sample 0, because NumPy pads the entropy with zeros.
    return np.random.default_rng([seed, epoch, 0, 1]).permutation(n)


class EpochSampler:
    """
    The sample numbers of one epoch after the other, for the argument `sampler` of a torch `DataLoader` over `TrainTiles`.

    Each pass yields the epoch after the last one, in the order of `epoch_order`; `set_epoch`, which trainers call, says which one comes
    next. The numbers say their epoch, so that its crops come from any worker, also one that lives through all epochs.

    Args:
        samples: the length of the data set.
        seed: of the order. That of the crops is `config.seed`.
        rank: number of this process among `ranks` that train together. Each yields its own part of every epoch, as long as the others';
            samples beyond that are dropped.
        ranks: number of processes.
    """

    def __init__(self, samples: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        if not 0 <= rank < ranks:
            raise ValueError(f"expected a rank from 0 to {ranks - 1} (ranks - 1), found {rank}")
        self._samples, self._seed, self._rank, self._ranks = samples, seed, rank, ranks
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass yield the samples of an epoch, counted from 0."""
        if epoch < 0:
            raise ValueError(f"epochs are counted from 0, found {epoch}")
        self._epoch = epoch

    def __len__(self) -> int:
        return self._samples // self._ranks

    def __iter__(self) -> Iterator[int]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        numbers = epoch_order(self._samples, self._seed, epoch) + epoch * self._samples
        return iter(numbers[self._rank :: self._ranks][: len(self)].tolist())


def batches_of_equal_size(sizes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """
    The indices of `sizes` in batches of at most `batch_size`, each of one `(H, W)`.

    Indices rise within a batch, and batches by their first index.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, size in enumerate(sizes):
        by_size.setdefault((size[0], size[1]), []).append(i)
    batches = [
        group[start : start + batch_size] for group in by_size.values() for start in range(0, len(group), batch_size)
    ]
    return sorted(batches)


def recoloured(image_HWB: NDArray[np.uint8], visible: Sequence[int], plan: Plan) -> NDArray[np.uint8]:
    """The image with the changes of a plan in its visible bands, those at the places `visible`; the others are unchanged."""
    for seed, change in ((plan.photometric_seed, change_colours), (plan.shift_seed, shift_colours)):
        if seed is None:
            continue
        if tuple(visible) == tuple(range(image_HWB.shape[-1])):
            image_HWB = change(image_HWB, seed)
        else:
            changed = change(np.ascontiguousarray(image_HWB[..., list(visible)]), seed)
            image_HWB = image_HWB.copy()
            image_HWB[..., list(visible)] = changed
    return image_HWB


def _drawn_tiles(tiles: Sequence[Tile], config: Config) -> list[int]:
    """The tile number of each sample of an epoch: all tiles in turn, repeated until each has had its number of crops."""
    labelled, unlabelled = config.train.crops_per_tile, config.train.unlabelled_crops_per_tile
    crops = [labelled if unlabelled is None or tile.mask is not None else unlabelled for tile in tiles]
    return [number for turn in range(max(crops)) for number, count in enumerate(crops) if turn < count]


def filled(drawn: list[int], samples: int) -> list[int]:
    """The tiles of an epoch, with further turns of all of them until there are `samples`."""
    return drawn if len(drawn) >= samples else (drawn * (samples // len(drawn) + 1))[:samples]


def read_labels(
    tile: Tile, config: Config, size: tuple[int, int], data_HW: NDArray[np.bool_] | None
) -> NDArray[np.int32]:
    """
    The labels of a tile with a mask, int32 `(H, W)`: `ignore_index` where its image, of `size`, holds no data (None: it does everywhere).

    Raises `DataError` as `read_mask` does, and if the mask has another size than the image.
    """
    classes = config.classes
    assert tile.mask is not None
    labels = read_mask(tile.mask, len(classes.names), classes.ignore_index, config.mask_codes)
    require_same_size(tile.image, size, tile.mask, (labels.shape[0], labels.shape[1]))
    if data_HW is not None:
        labels[~data_HW] = classes.ignore_index
    return labels


def _read_image(
    tile: Tile, config: Config, stretch: Stretch, size: tuple[int, int] | None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    image, data = read_image_with_data(tile.image, config.data.bands, stretch, config.data.alpha)
    if size is not None and image.shape[:2] != tuple(size):
        raise DataError(
            f"{tile.image} is {_by(image)} px, but its header said {size[0]} x {size[1]} earlier in this run: the file has changed"
        )
    return image, data


def _by(array: NDArray[Any]) -> str:
    return f"{array.shape[0]} x {array.shape[1]}"
