"""
The class map against the labels: a check of the configured one, and a suggestion of a new one.

Both count pixels by the label and by the teacher's likeliest class, not by its probabilities. A soft target is
`softmax(z / T) @ M` already: weighting by the same softmax would soften it twice, and put T into the map. The check is the
only one that finds a wrong channel order. Not covered: telling the mistakes of teacher and labels from what a class means.

Shapes: K tiles, T teacher classes, S student classes (labels).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from kdpipe.configs.errors import DataError, count_text
from kdpipe.configs.fill_in import FILL_IN
from kdpipe.configs.schema import Config
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.evaluation.confusion import count_pairs
from kdpipe.pipeline.memory import fits_in_memory, sized, teacher_advice
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.subjects import require_predictions, whole_tiles
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.teacher.frozen import open_teacher

MIN_SHARE = 0.005  # of the labelled pixels: a rarer teacher class is not judged
MIN_GAIN = 0.02  # of mIoU, from assigning one teacher class otherwise, to count as clearly better
RESAMPLES = 200  # of the tiles, with replacement
CONFIDENCE = 0.05  # quantile of the resampled gains that must be positive as well
MIN_ENTRY = 0.05  # of a suggested row: less is hardly more than mistakes along borders
HUNDREDTHS = 100  # suggested rows have two decimals


@dataclass(frozen=True)
class TeacherClass:
    """The labels where the teacher predicts one of its classes; shares in 0..1, gain in mIoU."""

    name: str
    pixels: int
    configured: str
    configured_share: float
    fitting: str
    fitting_share: float
    gain: float
    clearly_better: bool


@dataclass(frozen=True)
class Row:
    """
    A teacher class: its pixels by label, and its row of the class map as configured and as suggested.

    `kept` rows have too few pixels to judge by: the suggested row is the configured one. `unfilled` rows are FILL_IN in the
    configuration: the configured row is empty.
    """

    teacher_class: str
    pixels: int
    counts: dict[str, int]
    configured: dict[str, float]
    suggested: dict[str, float]
    kept: bool
    unfilled: bool = False

    @property
    def disagrees(self) -> bool:
        """Whether most labels are of another class than the one with the largest configured share."""
        if self.kept or self.unfilled:
            return False
        likeliest = max(self.suggested, key=self.suggested.__getitem__)
        return self.configured.get(likeliest, 0) < max(self.configured.values())


@dataclass(frozen=True)
class Suggestion:
    """A row for each teacher class, in the class map's order, and the number of tiles and pixels behind them."""

    rows: list[Row]
    tiles: int
    pixels: int
    min_share: float = MIN_SHARE
    min_entry: float = MIN_ENTRY

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "rows": [{**asdict(row), "disagrees": row.disagrees} for row in self.rows]}

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


def check_class_map(counts_KST: NDArray[np.int64], config: Config) -> list[TeacherClass]:
    """
    The configured student class of each teacher class that is frequent enough, and the one that fits the labels best.

    `counts_KST` holds the pixels by label and predicted teacher class in each tile. Another class is clearly better if
    assigning the teacher class to it raises mIoU by `MIN_GAIN` over all tiles, and raises it at all in 95 % of the
    resamplings of the tiles. Classes with a share in the configured row are no alternatives: a split row is intended.
    """
    shares_TS = config.class_map_matrix()
    assigned_T = shares_TS.argmax(axis=1)
    counts_ST = counts_KST.sum(axis=0)
    names = config.classes.names
    rng = np.random.default_rng(config.seed)
    resampled = rng.integers(len(counts_KST), size=(RESAMPLES, len(counts_KST)))
    result = []
    for t, teacher_name in enumerate(config.teacher_classes):
        pixels = int(counts_ST[:, t].sum())
        if pixels == 0 or pixels < MIN_SHARE * counts_ST.sum():
            continue
        alternatives = [s for s in range(len(names)) if shares_TS[t, s] == 0]
        gains = {s: _gain(counts_ST, assigned_T, t, s) for s in alternatives}
        best = max(gains, key=lambda s: gains[s]) if gains else int(assigned_T[t])
        gain = gains.get(best, 0.0)
        clearly = False
        if gain >= MIN_GAIN:
            sampled = [_gain(counts_KST[rows].sum(axis=0), assigned_T, t, best) for rows in resampled]
            clearly = bool(np.quantile(sampled, CONFIDENCE) > 0)
        fitting = best if gain > 0 else int(assigned_T[t])
        configured_share = float((counts_ST[:, t] * (shares_TS[t] > 0)).sum() / pixels)
        result.append(
            TeacherClass(
                name=teacher_name,
                pixels=pixels,
                configured=", ".join(names[s] for s in np.flatnonzero(shares_TS[t])),
                configured_share=configured_share,
                fitting=names[fitting],
                fitting_share=float(counts_ST[fitting, t] / pixels),
                gain=max(gain, 0.0),
                clearly_better=clearly,
            )
        )
    return result


def suggest_map(
    config: Config,
    device: torch.device,
    *,
    sample: int | None = None,
    unfilled: Collection[str] = (),
    progress: Progress | None = None,
) -> Suggestion:
    """
    The map that the labelled training tiles suggest: all of them, or `sample` chosen by the seed.

    `unfilled` names teacher classes without a configured row, as `load_open_config` returns them. Validation tiles are left
    out: a map fitted to them would flatter their scores. Raises `DataError` where no tile or no pixel has a label or a mask
    does not fit its image, `CheckpointError` where the teacher does not load.
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
    wholes = whole_tiles(config, tiles, stretch)
    require_predictions(config, wholes)
    teacher = open_teacher(config, complete_recipe(config, stretch, None), device)
    counts_ST = np.zeros((len(config.classes.names), len(config.teacher_classes)), dtype=np.int64)
    with progress.bar("teacher", len(tiles), "tiles") as advance:
        for whole in wholes:
            image_HWC = whole.image()
            advice = teacher_advice(config, 1, device, max(image_HWC.shape[:2]))
            with fits_in_memory(f"while the teacher predicted {sized('tile', 1, *image_HWC.shape[:2])}", advice):
                predicted_HW = teacher.logits(whole.seen(image_HWC)[None])[0].argmax(dim=0).cpu().numpy()
            counts_ST += count_teacher_classes(predicted_HW, whole.labels(), config)
            advance()
    if not counts_ST.any():
        raise DataError(
            f"the masks of {count_text(len(tiles), 'tiles')} hold nothing but classes.ignore_index ({config.classes.ignore_index})"
        )
    return Suggestion(suggested_rows(counts_ST, config, unfilled), tiles=len(tiles), pixels=int(counts_ST.sum()))


def suggested_rows(counts_ST: NDArray[np.int64], config: Config, unfilled: Collection[str] = ()) -> list[Row]:
    """
    The rows that pixel counts `(S, T)` of labels and predicted teacher classes suggest.

    A row holds the share of each label; shares below `MIN_ENTRY` are dropped and the others scaled up. A class predicted on
    less than `MIN_SHARE` of the pixels keeps its configured row, which is empty for one of `unfilled`.
    """
    rows = []
    for name, counts_S in zip(config.teacher_classes, counts_ST.T, strict=True):
        pixels = int(counts_S.sum())
        kept = pixels == 0 or pixels < MIN_SHARE * int(counts_ST.sum())
        stated = {} if name in unfilled else config.class_map[name]
        configured = {label: share for label, share in stated.items() if share > 0}
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


def count_teacher_classes(
    predicted_HW: NDArray[np.integer[Any]], labels_HW: NDArray[np.integer[Any]], config: Config
) -> NDArray[np.int64]:
    """Pixels of a labelled tile by label and by predicted teacher class, an index of `teacher_classes`: int64 `(S, T)`."""
    num_labels, num_predictions = len(config.classes.names), len(config.teacher_classes)
    return count_pairs(labels_HW, predicted_HW, num_labels, num_predictions, config.classes.ignore_index)


def _gain(counts_ST: NDArray[np.int64], assigned_T: NDArray[np.intp], t: int, s: int) -> float:
    """The rise of mIoU if teacher class `t` stands for student class `s`."""
    changed_T = assigned_T.copy()
    changed_T[t] = s
    return _miou(counts_ST, changed_T) - _miou(counts_ST, assigned_T)


def _miou(counts_ST: NDArray[np.int64], assigned_T: NDArray[np.intp]) -> float:
    """
    The mIoU over all classes that occur in the labels, with those in `not_scored`: they can be confused too.

    It is asked for each pair of a teacher's and a student's class, 22 500 times for 150 of both: so without a confusion matrix.
    """
    labelled_S, predicted_T = counts_ST.sum(axis=1), counts_ST.sum(axis=0)
    hits_S = np.bincount(assigned_T, counts_ST[assigned_T, np.arange(len(assigned_T))], minlength=len(counts_ST))
    predicted_S = np.bincount(assigned_T, predicted_T, minlength=len(counts_ST))
    iou_S = hits_S / np.maximum(labelled_S + predicted_S - hits_S, 1)
    return float(iou_S[labelled_S > 0].mean())


def _shares(counts_S: NDArray[np.int64], names: list[str]) -> dict[str, float]:
    """Shares in hundredths that sum to one, the largest first; the largest remainders are rounded up."""
    total = counts_S.sum()
    # With more than twenty labels all may be rare; the most frequent one stays.
    counts_S = np.where(counts_S >= min(MIN_ENTRY * total, counts_S.max()), counts_S, 0)
    exact_S = counts_S / counts_S.sum() * HUNDREDTHS
    units_S = np.floor(exact_S).astype(int)
    missing = HUNDREDTHS - units_S.sum()
    units_S[np.argsort(units_S - exact_S, kind="stable")[:missing]] += 1
    order = np.argsort(-units_S, kind="stable")
    return {names[s]: int(units_S[s]) / HUNDREDTHS for s in order if units_S[s]}
