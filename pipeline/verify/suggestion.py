"""
The class map that the labels suggest: which labels lie where the teacher answers with each of its classes.

Pixels are counted by the teacher's first answer, not by its soft mass: a soft target is `softmax(z / T) @ M` already, so that
shares weighted by the same softmax would soften it twice, and T would be in the map. The count is also the one that
`verify-cache --level parity` judges the configured map by.

Not covered: telling the teacher's mistakes and the labels' own from what a class means. Shares hold both.

Shapes: T teacher classes, S student classes (labels).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from kdpipe.configs.errors import DataError
from kdpipe.configs.fill_in import FILL_IN
from kdpipe.configs.schema import Config
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.memory import fits_in_memory, sized, teacher_advice
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.subjects import WholeTile
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.teacher.frozen import open_teacher
from kdpipe.pipeline.verify.class_map import MIN_SHARE, count_answers

MIN_ENTRY = 0.05  # of a row: less is hardly more than mistakes along borders
HUNDREDTHS = 100  # rows are written to two decimals


@dataclass(frozen=True)
class Row:
    """A teacher class: labelled pixels where it answers, by student class, and its row of the map as configured and suggested."""

    teacher_class: str
    pixels: int
    counts: dict[str, int]
    configured: dict[str, float]
    suggested: dict[str, float]
    kept: bool  # too few pixels to judge by: the suggested row is the configured one
    unfilled: bool = (
        False  # the configuration has FILL_IN for it: `configured` is empty, and so is `suggested` where it is kept
    )

    @property
    def disagrees(self) -> bool:
        """Whether most labels are of another class than the one with the largest configured share."""
        if self.kept or self.unfilled:
            return False
        return self.configured.get(max(self.suggested, key=self.suggested.__getitem__), 0) < max(
            self.configured.values()
        )


@dataclass(frozen=True)
class Suggestion:
    """A row for each teacher class, in the class map's order, and what they rest on."""

    rows: list[Row]
    tiles: int
    pixels: int
    min_share: float = MIN_SHARE
    min_entry: float = MIN_ENTRY

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "tiles": self.tiles,
            "pixels": self.pixels,
            "min_share": self.min_share,
            "min_entry": self.min_entry,
            "rows": [asdict(row) | {"disagrees": row.disagrees} for row in self.rows],
        }

    def as_yaml(self) -> str:
        """The suggested map as a section of a configuration."""
        lines = ["class_map:"]
        for row in self.rows:
            shares = {name: int(share) if share == 1 else share for name, share in row.suggested.items()}
            text = yaml.safe_dump(
                {row.teacher_class: shares or FILL_IN},
                default_flow_style=None if shares else False,
                sort_keys=False,
                allow_unicode=True,
                width=10**6,
            )
            kept = "  # too few pixels to say" if row.unfilled else "  # as configured: too few pixels"
            lines.append(f"  {text.strip()}" + (kept if row.kept else ""))
        return "\n".join(lines)


def suggest_map(
    config: Config,
    device: torch.device,
    *,
    sample: int | None = None,
    unfilled: Collection[str] = (),
    progress: Progress | None = None,
) -> Suggestion:
    """
    Ask the teacher about the labelled training tiles, all or `sample` of them chosen by the seed, and count.

    `unfilled` are teacher classes whose configured row says nothing yet, as `load_open_config` returns them. Validation tiles are
    not looked at: a map fitted to them would make their scores too good. Raises `DataError` where no tile or no pixel has a label
    or a mask does not fit its image, `CheckpointError` where the teacher does not load.
    """
    progress = progress or Silent()
    tiles = list_tiles(config.data, "train", labelled_only=True)
    if not tiles:
        raise DataError(
            f"a class map is suggested from labelled tiles, and data.train has none: {', '.join(config.data.train)}; "
            f"put masks into their {config.data.masks!r} folders"
        )
    if sample is not None and sample < len(tiles):
        chosen = np.random.default_rng(config.seed).permutation(len(tiles))[:sample]
        tiles = [tiles[i] for i in sorted(chosen)]
    stretch = resolve_stretch(config.data, list_tiles(config.data, "train"))
    teacher = open_teacher(config, complete_recipe(config, stretch, None), device)
    counts_ST = np.zeros((len(config.classes.names), len(config.teacher_classes)), dtype=np.int64)
    with progress.bar("teacher", len(tiles), "tiles") as advance:
        for tile in tiles:
            whole = WholeTile(tile, config, stretch)
            image_HWC = whole.image()
            advice = teacher_advice(config, 1, device, max(image_HWC.shape[:2]))
            with fits_in_memory(f"while the teacher answered {sized('tile', 1, *image_HWC.shape[:2])}", advice):
                answers_HW = teacher.logits(image_HWC[None])[0].argmax(dim=0).cpu().numpy()
            counts_ST += count_answers(answers_HW, whole.labels(), config)
            advance()
    if not counts_ST.any():
        raise DataError(
            f"the masks of {len(tiles)} tiles hold nothing but classes.ignore_index ({config.classes.ignore_index})"
        )
    return Suggestion(suggested_rows(counts_ST, config, unfilled), tiles=len(tiles), pixels=int(counts_ST.sum()))


def suggested_rows(counts_ST: NDArray[np.int64], config: Config, unfilled: Collection[str] = ()) -> list[Row]:
    """
    The rows that pixel counts `(S, T)` of labels and teacher answers suggest.

    A row is the share of each label; shares below `MIN_ENTRY` are dropped and the others scaled up. A class that answers on
    less than `MIN_SHARE` of the pixels keeps its configured row, and has none if it is `unfilled`.
    """
    rows = []
    for name, counts_S in zip(config.teacher_classes, counts_ST.T, strict=True):
        pixels = int(counts_S.sum())
        kept = pixels == 0 or pixels < MIN_SHARE * int(counts_ST.sum())
        said = {} if name in unfilled else config.class_map[name]
        configured = {label: share for label, share in said.items() if share > 0}
        rows.append(
            Row(
                teacher_class=name,
                pixels=pixels,
                counts={label: int(n) for label, n in zip(config.classes.names, counts_S, strict=True)},
                configured=configured,
                suggested=dict(configured) if kept else _shares(counts_S, config.classes.names),
                kept=kept,
                unfilled=name in unfilled,
            )
        )
    return rows


def _shares(counts_S: NDArray[np.int64], names: list[str]) -> dict[str, float]:
    """Hundredths that sum to one, the largest first: rounded down, and the missing ones to the largest remainders."""
    total = counts_S.sum()
    # Of more than twenty labels all may be rare; the commonest stays.
    counts_S = np.where(counts_S >= min(MIN_ENTRY * total, counts_S.max()), counts_S, 0)
    exact_S = counts_S / counts_S.sum() * HUNDREDTHS
    units_S = np.floor(exact_S).astype(int)
    missing = HUNDREDTHS - units_S.sum()
    units_S[np.argsort(units_S - exact_S, kind="stable")[:missing]] += 1
    order = np.argsort(-units_S, kind="stable")
    return {names[s]: int(units_S[s]) / HUNDREDTHS for s in order if units_S[s]}
