"""
Recorded views: a fixed number of augmented crops of each tile, which can be replayed at any time and in any order.

The teacher predicts each view once (`distill.teacher_view: crop`), and training cycles through them, so that the student sees
exactly the pixels that the teacher saw. View `number` of a tile depends on the tile's id, on `number`, on the configured
augmentation and, if it is a mosaic, on the list of tiles. It does not depend on `seed`: runs with several seeds share the
predictions, each in its own order.
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
from kdpipe.data.dataset import TrainSample, TrainTiles, filled
from kdpipe.data.geometry import Plan
from kdpipe.data.rasters import Stretch
from kdpipe.data.tiles import Tile, list_tiles, without_limit


class ViewTargets(Protocol):
    """A source of the soft targets of recorded views: the cache, or a teacher."""

    def read_view(
        self, view_id: str, image_BHW: NDArray[np.uint8], inside_HW: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], float]:
        """
        The soft target of a view, float32 `(C, H, W)`, and the exact target's entropy minus this one's, in nats.

        `image_BHW` are the view's pixels; entropies are means over the pixels `inside_HW`.
        """
        ...


class RecordedViews(TrainTiles):
    """
    Training samples as in `TrainTiles`, from recorded views instead of crops that are new in every epoch.

    The views of a tile are taken in turn: with one crop per tile, epoch `e` shows view `e % cache.views` of each tile.

    Args:
        tiles, config, stretch, sizes, samples: see `TrainTiles`; `cache.views` is used too. `sizes` are those of `among` if it is given.
        view_targets: soft targets by view; None leaves `target` out of the samples.
        among: the tiles that mosaics show, where `tiles` are some of them (see `tiles_of_mosaics`); None: `tiles` alone.
    """

    def __init__(
        self,
        tiles: Sequence[Tile],
        config: Config,
        stretch: Stretch = None,
        view_targets: ViewTargets | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        among: Sequence[Tile] | None = None,
        samples: int = 0,
    ) -> None:
        super().__init__(tiles if among is None else among, config, stretch, sizes=sizes)
        assert config.cache.views is not None  # the configuration has been checked
        self.per_tile = config.cache.views
        self._view_targets = view_targets
        shown = {tile.id for tile in tiles}
        self._shown = [number for number, tile in enumerate(self.tiles) if tile.id in shown]
        self._drawn = filled([number for number in self._drawn if self.tiles[number].id in shown], samples)
        self._crops_of = [0] * len(self.tiles)  # crops of each tile per epoch
        self._turns = []  # for each sample of an epoch, the number of this crop among those of its tile
        for tile in self._drawn:
            self._turns.append(self._crops_of[tile])
            self._crops_of[tile] += 1

    def __getitem__(self, k: int) -> TrainSample:
        """Sample `k`."""
        view = self.shown(k)
        sample = self.render(view.plan())
        if self._view_targets is not None:
            target_CHW, entropy_error = self._view_targets.read_view(view.id, sample["image"], sample["inside"])
            sample["target"] = np.where(sample["inside"], target_CHW, np.float32(0))
            sample["entropy_error"] = np.float32(entropy_error)
        return sample

    def plan(self, k: int) -> Plan:
        """The plan of sample `k`."""
        return self.shown(k).plan()

    def shown(self, k: int) -> RecordedView:
        """The view that sample `k` shows."""
        if k < 0:
            raise IndexError(f"samples are counted from 0 over all epochs, found {k}")
        epoch, i = divmod(k, len(self))
        tile = self._drawn[i]
        return RecordedView(self, tile, (epoch * self._crops_of[tile] + self._turns[i]) % self.per_tile)

    def all_views(self) -> list[RecordedView]:
        """All views, grouped by tile, so that each tile is decoded once."""
        return [RecordedView(self, tile, number) for tile in self._shown for number in range(self.per_tile)]

    def sources(self, view: RecordedView) -> list[int]:
        """The numbers of the tiles that a view shows, its own first; reads no file."""
        return source_tiles(self._stream(view), view.tile, len(self.tiles), self._config.train)

    def plan_of(self, view: RecordedView) -> Plan:
        """The plan of a view; reads the masks of its tiles if `train.max_class_share` is below 1."""
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
        """The files that determine a view: the images of its tiles, and their masks if `train.max_class_share` is below 1."""
        tiles = [self.tiles[number] for number in self.sources(view)]
        masks = [tile.mask for tile in tiles if tile.mask is not None] if self._config.train.max_class_share < 1 else []
        return [*(tile.image for tile in tiles), *masks]

    def _stream(self, view: RecordedView) -> np.random.Generator:
        """The random stream of a view, seeded by the tile's id, so that adding or removing other tiles does not change it."""
        digest = hashlib.sha256(self.tiles[view.tile].id.encode()).digest()
        return np.random.default_rng([view.number, *np.frombuffer(digest[:16], dtype="<u4").tolist()])


def tiles_of_mosaics(config: Config, *, labelled_only: bool = False) -> list[Tile] | None:
    """All tiles to train on, where `data.limit` chooses some of them: the views of these are then those of the whole set. Else None."""
    return None if config.data.limit is None else list_tiles(without_limit(config.data), "train", labelled_only)


@dataclass(frozen=True)
class RecordedView:
    """View `number` of tile number `tile` of `views`."""

    views: RecordedViews
    tile: int
    number: int

    @property
    def id(self) -> str:
        """
        The view's name in the cache: `Train/t1_001/view-0003`, and for a mosaic `-` and 8 digits of a digest of the other tiles' ids.

        A mosaic that shows other tiles, because one was added or removed, is thus another view, which the cache lacks.
        """
        own, *others = (self.views.tiles[number].id for number in self.views.sources(self))
        suffix = f"-{hashlib.sha256('/'.join(others).encode()).hexdigest()[:8]}" if others else ""
        return f"{own}/view-{self.number:04d}{suffix}"

    @property
    def mask(self) -> Path | None:
        """The mask of the view's own tile."""
        return self.views.tiles[self.tile].mask

    @property
    def files(self) -> list[Path]:
        """See `RecordedViews.files_of`."""
        return self.views.files_of(self)

    def plan(self) -> Plan:
        """See `RecordedViews.plan_of`."""
        return self.views.plan_of(self)

    def pixels(self) -> NDArray[np.uint8]:
        """The image, uint8 `(B, H, W)` with H and W `train.crop`; raises as reading a sample does."""
        return self.views.render(self.plan())["image"]

    def labels(self) -> NDArray[np.int64]:
        """The labels, int64 `(H, W)`, `ignore_index` where there are none."""
        return self.views.render(self.plan())["mask"]

    def __str__(self) -> str:
        return f"view {self.number} of {self.views.tiles[self.tile].image}"
