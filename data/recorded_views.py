"""
Recorded views: a fixed number of augmented crops of every tile, each of which can be replayed at any time, in any order.

A teacher answers each of them once (`distill.teacher_view: crop`), and training cycles through them: its student sees the very
pixels that the teacher saw. What view `number` of a tile shows depends on the tile's id, on `number` and on what the
configuration says of augmentation; and, where it is a mosaic, on the list of tiles. It does not depend on `seed`: runs of
several seeds learn from the same answers, each in an order of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kdpipe.configs import Config
from kdpipe.data.augment import sample_plan, source_tiles
from kdpipe.data.dataset import TrainSample, TrainTiles
from kdpipe.data.geometry import Plan
from kdpipe.data.rasters import Stretch
from kdpipe.data.tiles import Tile


class ViewTargets(Protocol):
    """Where the soft targets of recorded views come from: the cache, or a teacher."""

    def answer(
        self, view_id: str, image_3HW: NDArray[np.uint8], inside_HW: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], float]:
        """
        The soft target of a view, float32 `(C, H, W)`, and the exact target's entropy minus its own, in nats.

        The view's pixels are `image_3HW`; the entropy is the mean over the pixels `inside_HW`.
        """
        ...


class RecordedViews(TrainTiles):
    """
    The samples of `TrainTiles`, with the recorded views in the place of crops that are new in every epoch.

    The views of a tile are taken in turn: with one crop per tile, epoch `e` has view `e % cache.views` of each.

    Args:
        tiles, config, stretch, sizes: as of `TrainTiles`; of the config `cache.views` is used too.
        answers: soft targets by view; None leaves `target` out of the samples.
    """

    def __init__(
        self,
        tiles: Sequence[Tile],
        config: Config,
        stretch: Stretch = None,
        answers: ViewTargets | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(tiles, config, stretch, sizes=sizes)
        assert config.cache.views is not None  # the configuration has been checked
        self.per_tile = config.cache.views
        self._answers = answers
        crops_of = [0] * len(
            tiles
        )  # which crop of its tile each sample of an epoch is, and then how many each tile has
        self._turns = []
        for tile in self._drawn:
            self._turns.append(crops_of[tile])
            crops_of[tile] += 1
        self._crops_of = crops_of

    def __getitem__(self, k: int) -> TrainSample:
        """Sample `k`."""
        view = self.shown(k)
        sample = self.render(view.plan())
        if self._answers is not None:
            target_CHW, entropy_error = self._answers.answer(view.id, sample["image"], sample["inside"])
            sample["target"] = np.where(sample["inside"], target_CHW, np.float32(0))
            sample["entropy_error"] = np.float32(entropy_error)
        return sample

    def plan(self, k: int) -> Plan:
        """How sample `k` is made."""
        return self.shown(k).plan()

    def shown(self, k: int) -> RecordedView:
        """The view that sample `k` shows."""
        if k < 0:
            raise IndexError(f"samples are counted from 0 over all epochs, found {k}")
        epoch, i = divmod(k, len(self))
        tile = self._drawn[i]
        return RecordedView(self, tile, (epoch * self._crops_of[tile] + self._turns[i]) % self.per_tile)

    def all_views(self) -> list[RecordedView]:
        """Every view, those of a tile together, so that it is decoded once for all of them."""
        return [RecordedView(self, tile, number) for tile in range(len(self.tiles)) for number in range(self.per_tile)]

    def sources(self, view: RecordedView) -> list[int]:
        """The numbers of the tiles that a view shows, its own first; found without reading any file."""
        return source_tiles(self._stream(view), view.tile, len(self.tiles), self._config.train)

    def plan_of(self, view: RecordedView) -> Plan:
        """How a view is made; reads the masks of its tiles where `train.max_class_share` is below 1."""
        return sample_plan(
            self._stream(view),
            view.tile,
            len(self.tiles),
            self._config.train,
            self._config.classes.ignore_index,
            size_of=self._size,
            mask_of=self._mask,
        )

    def files_of(self, view: RecordedView) -> list[Path]:
        """The files that decide what a view shows: its tiles' images, and masks where `train.max_class_share` asks for them."""
        tiles = [self.tiles[number] for number in self.sources(view)]
        masks = [tile.mask for tile in tiles if tile.mask is not None] if self._config.train.max_class_share < 1 else []
        return [*(tile.image for tile in tiles), *masks]

    def _stream(self, view: RecordedView) -> np.random.Generator:
        """By the tile's id and not its place in the list, so that tiles which come or go leave the others' views alone."""
        digest = hashlib.sha256(self.tiles[view.tile].id.encode()).digest()
        return np.random.default_rng([view.number, *np.frombuffer(digest[:16], dtype="<u4").tolist()])


@dataclass(frozen=True)
class RecordedView:
    """View `number` of tile number `tile` of `views`."""

    views: RecordedViews
    tile: int
    number: int

    @property
    def id(self) -> str:
        """
        Its name in the cache: `Train/t1_001/view-0003`, with 8 more digits where it is a mosaic.

        These are of the other tiles' ids: a mosaic that shows other tiles since one came or went is another view, which the
        cache does not have.
        """
        own, *others = (self.views.tiles[number].id for number in self.views.sources(self))
        suffix = f"-{hashlib.sha256('/'.join(others).encode()).hexdigest()[:8]}" if others else ""
        return f"{own}/view-{self.number:04d}{suffix}"

    @property
    def mask(self) -> Path | None:
        """The file of labels of its own tile."""
        return self.views.tiles[self.tile].mask

    @property
    def files(self) -> list[Path]:
        """See `RecordedViews.files_of`."""
        return self.views.files_of(self)

    def plan(self) -> Plan:
        """See `RecordedViews.plan_of`."""
        return self.views.plan_of(self)

    def pixels(self) -> NDArray[np.uint8]:
        """What it shows, uint8 `(3, H, W)`, H and W `train.crop`; raises what reading a sample does."""
        return self.views.render(self.plan())["image"]

    def labels(self) -> NDArray[np.int64]:
        """Its labels, `ignore_index` where there are none: int64 `(H, W)`."""
        return self.views.render(self.plan())["mask"]

    def __str__(self) -> str:
        return f"view {self.number} of {self.views.tiles[self.tile].image}"
