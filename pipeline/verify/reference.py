"""
The teacher compared with its owner's own script: scores that the script saved of a few tiles, and what explains a difference.

Each teacher is compared alone, over all of its channels, before the class map and at temperature 1. It is run as stage one runs it,
but in float32: what a lower `precision` changes is for parity to say. Scores of a script without the configured views and windows
are compared with one view of the whole tile. Not covered: the names of the channels, which no scores tell.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdpipe.cache.encoding.logits import Softening
from kdpipe.cache.integrity import Finding
from kdpipe.configs.errors import DataError, count_text, summarise
from kdpipe.configs.schema import Config, Teacher
from kdpipe.data.rasters import Stretch, image_size, read_image
from kdpipe.data.tiles import Tile, limited, list_tiles, without_limit
from kdpipe.pipeline.memory import fits_in_memory, sized, teacher_advice
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.subjects import PredictedTile, require_predictions, whole_tiles
from kdpipe.pipeline.progress import Progress
from kdpipe.pipeline.teacher.frozen import FrozenTeacher
from kdpipe.pipeline.teacher.loading import load_teacher
from kdpipe.pipeline.verify.explain import ROUNDS, Explanation, explain
from kdpipe.pipeline.verify.parity import PRECISION_SLACK, Measure
from kdpipe.pipeline.verify.reference_files import match_files, read_scores
from kdpipe.pipeline.verify.script_runs import Difference, Runner, Target, difference
from kdpipe.pipeline.verify.scripts import remedies

LARGEST_EXPLAINED_PX = 2**22  # a tile that is predicted some hundred times must not be larger than this
ROUNDING_SLACK = PRECISION_SLACK["fp16"]  # TF32 keeps as many bits as float16
MEAN_OF_ROUNDING = 0.1  # of the largest difference: rounding leaves a mean that is small beside it


@dataclass(frozen=True)
class TileReference:
    """
    A tile compared with its saved scores: the differences of probabilities over all channels, and the pixels of equal class.

    `kind` and `computed_in` say what the scores are (see `Scores`).
    """

    teacher: str
    tile: str
    file: str
    kind: str
    computed_in: str | None
    max_abs: Measure
    mean_abs: float
    argmax_agreement: float


@dataclass(frozen=True)
class Cause:
    """What explains the differences of some tiles; `complete` says whether it leaves no more than is allowed."""

    teacher: str
    tiles: list[str]
    script: list[str]
    remedies: list[str]
    before: float
    after: float
    complete: bool
    only_precision: bool

    def text(self) -> str:
        """One sentence: what the script does, what to do about it, and what becomes of the largest difference."""
        falls = (
            f"the largest |Δp| falls from {_figure(self.before)} to {_figure(self.after)} on {_tiles_text(self.tiles)}"
        )
        what, todo = " and ".join(self.script), " and ".join(self.remedies)
        if self.complete:
            return f"the script {what}: {todo}; then {falls}"
        return f"what comes nearest, and does not explain all, is that the script {what}: {todo}; then {falls}"


@dataclass
class ReferenceReport:
    """The comparison of teachers with saved scores; `findings` are empty where all agree."""

    folder: str
    tiles: list[TileReference] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the findings are among the verification's own."""
        content = {key: value for key, value in asdict(self).items() if key != "findings"}
        tiles = [{**asdict(row), "passes": row.max_abs.passes} for row in self.tiles]
        return content | {"tiles": tiles, "passes": not self.findings}


def compare_with_reference(
    config: Config, folder: Path, stretch: Stretch, device: torch.device, progress: Progress
) -> ReferenceReport:
    """
    Compare the configured teacher with scores in `folder`, in files named as the tiles; several teachers with those in `0`, `1`, …

    Raises `DataError` where no file is named as a tile or one does not hold a tile's scores, `CheckpointError` for a teacher that
    does not load.
    """
    report = ReferenceReport(str(folder))
    data = without_limit(config.data)  # which limits the files instead
    tiles = list_tiles(data, "train") + (list_tiles(data, "val") if data.val else [])
    members = list(config.members.items())
    folders = {key: folder / str(number) if len(members) > 1 else folder for number, (key, _) in enumerate(members)}
    present = {key: place for key, place in folders.items() if place.is_dir()}
    if not present:
        raise DataError(
            f"with several teachers, the scores of each lie in a folder of their own, named by its number: {folder / '0'} for "
            f"teachers.0; found none in {folder}"
        )
    for key, member in members:
        if key in present:
            _compare_teacher(config, key, member, present[key], tiles, stretch, device, report, progress)
        else:
            report.notes.append(f"{key} was not compared: there is no folder {folders[key]}")
    return report


def _compare_teacher(
    config: Config, key: str, member: Teacher, folder: Path, tiles: Sequence[Tile], stretch: Stretch, device: torch.device,
    report: ReferenceReport, progress: Progress,
) -> None:  # fmt: skip
    matched, strangers = match_files(folder, tiles)
    matched = limited(matched, config.data.limit)
    if strangers:
        report.notes.append(f"not compared, as named after no tile: {summarise(str(path) for path in strangers)}")
    targets = [Target(tile, read_scores(path, member.classes, *image_size(tile.image))) for tile, path in matched]
    if member.predictions is not None:
        _compare_predictions(config, key, targets, stretch, report, progress)
        return
    model = load_teacher(member, key, in_channels=len(config.data.places(member.bands)))
    # In the memory layout that scripts use: in half precision another one gives other numbers.
    runner = Runner(copy.deepcopy(model).to(device), key, member, config, stretch, device)
    teacher = _whole_teacher(config, member, model, stretch, device)
    found: list[tuple[Target, Difference]] = []
    with progress.bar(f"reference, {key}", len(targets), "tiles") as advance:
        for target in targets:
            image_HWB = read_image(target.tile.image, config.data.bands, stretch, config.data.alpha)
            size = sized("tile", 1, *image_HWB.shape[:2])
            advice = teacher_advice(config, 1, device, max(image_HWB.shape[:2]))
            with fits_in_memory(f"while {size} was compared with its reference", advice):
                probs_CHW = torch.softmax(teacher.logits(image_HWB[None])[0], dim=0).cpu()
            found.append((target, difference(probs_CHW, target.saved("softmax"))))
            advance()
    found = _without_views(found, runner, key, member, report)
    failing = [(target, result) for target, result in found if not result.largest <= _allowed(target)]
    causes = _causes(failing, runner, member, report, progress) if failing else []
    excused = _excused(failing, causes, member) if member.precision in PRECISION_SLACK else {}
    causes = [cause for cause in causes if not set(cause.tiles) <= set(excused)]
    rows = [_row(key, target, result, excused.get(target.tile.id, _allowed(target))) for target, result in found]
    report.tiles += rows
    report.causes += causes
    report.findings += _findings(key, rows, causes)


def _compare_predictions(
    config: Config, key: str, targets: Sequence[Target], stretch: Stretch, report: ReferenceReport, progress: Progress
) -> None:
    """Compare stored predictions, which no search could explain, as there is no network to run otherwise; gaps are left out."""
    wholes = whole_tiles(config, [target.tile for target in targets], stretch)
    require_predictions(config, wholes)
    rows = []
    with progress.bar(f"reference, {key}", len(targets), "tiles") as advance:
        for target, whole in zip(targets, wholes, strict=True):
            assert isinstance(whole, PredictedTile)
            stored = whole.prediction.read()
            logits_CHW = torch.from_numpy(whole.prediction.logits(stored).transpose(2, 0, 1))
            saved_CHW = target.saved("softmax")
            probs_CHW = torch.where(torch.from_numpy(stored.known_HW), torch.softmax(logits_CHW, dim=0), saved_CHW)
            rows.append(_row(key, target, difference(probs_CHW, saved_CHW), _allowed(target)))
            advance()
    report.tiles += rows
    failing = [row for row in rows if not row.max_abs.passes]
    if failing:
        largest = max(row.max_abs.value for row in failing)
        report.findings.append(
            Finding(
                "reference",
                None,
                f"the largest |Δp| is {_figure(largest)} on {_tiles_text([row.tile for row in failing])}: {key}.predictions and the scores "
                f"are not of one network. Were both saved in one order of channels, and does {key}.are say what the predictions hold?",
            )
        )


def _row(key: str, target: Target, result: Difference, allowed: float) -> TileReference:
    scores = target.scores
    return TileReference(
        teacher=key,
        tile=target.tile.id,
        file=str(scores.path),
        kind=scores.kind,
        computed_in=scores.computed_in,
        max_abs=Measure(result.largest, allowed),
        mean_abs=result.mean,
        argmax_agreement=result.agreement,
    )


def _whole_teacher(
    config: Config, member: Teacher, model: nn.Module, stretch: Stretch, device: torch.device
) -> FrozenTeacher:
    """One teacher as stage one runs it, but alone, in float32, and with the channels that it drops there."""
    alone = member.model_copy(update={"drop_channels": [], "precision": "fp32", "weight": 1.0})
    class_map = {name: {config.classes.names[0]: 1.0} for name in member.classes}  # takes no part in logits
    config = config.model_copy(update={"teacher": alone, "teachers": [], "class_map": class_map})
    softening = Softening(1.0, config.class_map_matrix())
    places = [config.data.places(alone.bands)]
    return FrozenTeacher([model], complete_recipe(config, stretch, None), softening, device, places)


def _allowed(target: Target) -> float:
    return PRECISION_SLACK["fp32"] + target.scores.rounding


def _without_views(
    found: list[tuple[Target, Difference]], runner: Runner, key: str, member: Teacher, report: ReferenceReport
) -> list[tuple[Target, Difference]]:
    """The differences; those of tiles that one view of the whole tile explains are what is left with that."""
    names = [
        name
        for name, default in (("tta", "none"), ("scales", [1.0]), ("window", None))
        if getattr(member, name) != default
    ]
    if not names:
        return found
    result, plain = [], []
    for target, configured in found:
        fails = not configured.largest <= _allowed(target) and target.pixels <= LARGEST_EXPLAINED_PX
        alone = runner.difference(runner.base, target) if fails else configured
        if alone.largest < configured.largest and alone.largest <= _allowed(target):
            plain.append(target.tile.id)
            result.append((target, alone))
        else:
            result.append((target, configured))
    if plain:
        keys = ", ".join(f"{key}.{name}" for name in names)
        report.notes.append(
            f"the scores of {_tiles_text(plain)} are compared with one view of the whole tile: they are without {keys}"
        )
    return result


def _causes(
    failing: Sequence[tuple[Target, Difference]],
    runner: Runner,
    member: Teacher,
    report: ReferenceReport,
    progress: Progress,
) -> list[Cause]:
    """What explains the differences of the failing tiles."""
    small = [pair for pair in failing if pair[0].pixels <= LARGEST_EXPLAINED_PX]
    if len(small) < len(failing):
        report.notes.append(
            f"no explanation is sought on tiles of more than {LARGEST_EXPLAINED_PX / 1e6:.1f} million px: compare smaller ones"
        )
    before = {target.tile.id: result.largest for target, result in small}
    within = PRECISION_SLACK.get(member.precision, 0.0)
    rounded = all(r.largest <= within or _is_rounding(r.largest, r.mean, t.scores.computed_in) for t, r in small)
    rounds = 1 if rounded else ROUNDS  # what precision may explain is not worth a long search
    return [_cause(found, runner, before) for found in explain(runner, small, _allowed, progress, rounds)]


def _cause(found: Explanation, runner: Runner, before: dict[str, float]) -> Cause:
    key, tiles = found.given.key, list(found.after)
    said, todo = remedies(found.script, runner.base, found.given)
    if not said:
        said = ["fits the network as it was loaded, and not kdpipe's faster copy of it (with folded batch norms)"]
        todo = ["report this as a fault of kdpipe"]
    after = max(result.largest for result in found.after.values())
    only_precision = found.script.changes(runner.base) == ["precision"]
    return Cause(key, tiles, said, todo, max(before[tile] for tile in tiles), after, found.complete, only_precision)


def _excused(
    failing: Sequence[tuple[Target, Difference]], causes: Sequence[Cause], member: Teacher
) -> dict[str, float]:
    """The tolerances of tiles whose difference is within the configured precision, unless something else explains it."""
    slack = {t.tile.id: PRECISION_SLACK[member.precision] + t.scores.rounding for t, _ in failing}
    otherwise = {tile for cause in causes if cause.complete and not cause.only_precision for tile in cause.tiles}
    return {
        t.tile.id: slack[t.tile.id] for t, r in failing if r.largest <= slack[t.tile.id] and t.tile.id not in otherwise
    }


def _findings(key: str, rows: Sequence[TileReference], causes: Sequence[Cause]) -> Iterator[Finding]:
    """One finding for each cause, and one for the failing tiles that none explains."""
    for cause in causes:
        yield Finding("reference", None, cause.text())
    explained = {tile for cause in causes for tile in cause.tiles}
    rest = [row for row in rows if not row.max_abs.passes and row.tile not in explained]
    if rest:
        yield Finding("reference", None, _unexplained_text(key, rest))


def _is_rounding(largest: float, mean: float, computed_in: str | None) -> bool:
    """Whether a difference is as small, and its mean as small beside it, as arithmetic in lower precision leaves it."""
    slack = PRECISION_SLACK[computed_in] if computed_in else ROUNDING_SLACK
    return largest <= slack and mean <= MEAN_OF_ROUNDING * largest


def _unexplained_text(key: str, rows: Sequence[TileReference]) -> str:
    largest = max(row.max_abs.value for row in rows)
    text = f"the largest |Δp| is {_figure(largest)} on {_tiles_text([row.tile for row in rows])}"
    if not all(_is_rounding(row.max_abs.value, row.mean_abs, row.computed_in) for row in rows):
        return (
            f"{text}, and nothing that was tried explains it. Are {key}.checkpoint and the script's weights the same file, and its "
            "network built with the same options? data.bands and data.stretch say what kdpipe feeds it"
        )
    precision = rows[0].computed_in
    if precision and all(row.computed_in == precision for row in rows):
        return (
            f"{text}, and all scores are numbers of {precision}: the script computes in half precision ({precision}): compute in float32 "
            f"in it, or set {key}.precision: {precision}"
        )
    return (
        f"{text}, as arithmetic in lower precision leaves it: run the script on a CPU, or on a GPU without autocast and with "
        "torch.backends.cudnn.allow_tf32 = False"
    )


def _figure(value: float) -> str:
    return f"{value:.2g}"


def _tiles_text(tiles: Sequence[str]) -> str:
    return tiles[0] if len(tiles) == 1 else count_text(len(tiles), "tiles")
