"""The gate between the stages: checks that the cache is complete, fresh and intact, and compares a sample with the teacher."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.cache.documents import partial_text, read_manifest
from kdpipe.cache.images import Source
from kdpipe.cache.integrity import Finding, check_full, check_quick
from kdpipe.cache.manifest import Manifest
from kdpipe.cache.reader import SoftTargetCache
from kdpipe.cache.recipe import differences
from kdpipe.cache.storage.base import Storage, open_storage
from kdpipe.configs.errors import CorruptCache, IncompleteCache
from kdpipe.configs.schema import Config
from kdpipe.data.rasters import Stretch
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import Tile, list_tiles, without_limit
from kdpipe.pipeline.devices import resolve_device
from kdpipe.pipeline.evaluation.confusion import Scores, count_pairs, scores
from kdpipe.pipeline.memory import fits_in_memory, sized, teacher_advice
from kdpipe.pipeline.precompute.expected_recipe import configured_softening, expected_fields
from kdpipe.pipeline.precompute.subjects import Subject, require_predictions, subject_noun, subjects
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.teacher.frozen import open_teacher
from kdpipe.pipeline.teacher.given import GivenTeacher, handed
from kdpipe.pipeline.verify.class_map import TeacherClass, check_class_map, count_teacher_classes
from kdpipe.pipeline.verify.parity import PRECISION_SLACK, Measure, TileParity, compare, middle_window
from kdpipe.pipeline.verify.reference import ReferenceReport, compare_with_reference
from kdpipe.pipeline.versions import library_note, other_libraries

Level = Literal["quick", "full", "parity"]
DEFAULT_SAMPLE = 12  # tiles on which the teacher is run again


class _Labelled(Protocol):
    @property
    def mask(self) -> Path | None: ...


T = TypeVar("T", bound=_Labelled)


@dataclass
class Report:
    """
    The result of a check; without findings the cache passes.

    With `limit`, `tiles` are those that were looked at, some of the `configured` ones, and nothing is known of the others.
    """

    cache: str
    level: Level
    noun: str = "tiles"
    tiles: int = 0
    fingerprint: str | None = None
    error_bound: float | None = None
    other_libraries: dict[str, tuple[str, str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    parity: list[TileParity] = field(default_factory=list)
    labels: Scores | None = None
    label_tiles: int = 0
    confusion: list[list[int]] | None = None
    teacher_classes: list[TeacherClass] = field(default_factory=list)
    cache_checked: bool = True
    reference: ReferenceReport | None = None
    limit: int | None = None
    configured: int = 0

    @property
    def passes(self) -> bool:
        """Whether there are no findings."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        content = {key: value for key, value in asdict(self).items() if key != "noun"}
        return content | {
            "passes": self.passes,
            "parity": [tile.as_dict() for tile in self.parity],
            "reference": self.reference.as_dict() if self.reference else None,
        }


@dataclass(frozen=True)
class Compared:
    """A tile on which parity ran the teacher again: cached and live targets, float32 `(C, H, W)`, and their comparison."""

    subject: Subject
    cached_CHW: NDArray[np.float32]
    live_CHW: NDArray[np.float32]
    parity: TileParity


def verify(
    config: Config,
    level: Level = "full",
    device: torch.device | str | None = None,
    *,
    sample: int = DEFAULT_SAMPLE,
    student: str | os.PathLike[str] | None = None,
    on_parity: Callable[[Compared], None] | None = None,
    reference: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    teacher: GivenTeacher | None = None,
) -> Report:
    """
    Check a cache against its configuration; the report's findings say what is wrong.

    Level `quick` reads names, sizes and times, `full` reads every byte. `parity` also runs the teacher again on `sample`
    tiles chosen by the seed, compares loss and gradient of a student (the checkpoint `student`, or a fresh one), and
    compares the class map with the labels; `on_parity` is called with each tile of the sample. With `reference`, a folder of
    scores that the teacher's owner saved, the teacher is compared with them too, and a missing cache is no finding. `device` and `teacher`
    are those of `precompute`; without `teacher`, the cache of a network that was passed in Python is checked by its name alone. Raises
    `DataError` or `ConfigError` where the data cannot be listed or the scores do not fit, `CheckpointError` for a missing
    teacher at level parity or with a reference.
    """
    device = device if isinstance(device, torch.device) else resolve_device(device)
    with handed(config, teacher):
        return _verify(config, level, device, sample, student, on_parity, reference, progress or Silent())


def _verify(
    config: Config, level: Level, device: torch.device, sample: int, student: str | os.PathLike[str] | None,
    on_parity: Callable[[Compared], None] | None, reference: str | os.PathLike[str] | None, progress: Progress,
) -> Report:  # fmt: skip
    tiles = list_tiles(config.data, "train")
    stretch = resolve_stretch(config.data, tiles)
    storage = open_storage(config.cache.path)
    report = Report(cache=storage.url, level=level, noun=subject_noun(config), limit=config.data.limit)
    if reference is not None and not storage.children(""):
        report.cache_checked = False
    else:
        checkpoint = None if student is None else os.fspath(student)
        _check_cache(config, storage, tiles, stretch, device, sample, checkpoint, report, progress, on_parity)
    if reference is not None:
        report.reference = compare_with_reference(config, Path(reference), stretch, device, progress)
        report.findings += report.reference.findings
    return report


def _check_cache(
    config: Config, storage: Storage, tiles: list[Tile], stretch: Stretch, device: torch.device, sample: int,
    student: str | None, report: Report, progress: Progress, on_parity: Callable[[Compared], None] | None,
) -> None:  # fmt: skip
    """The checks of the report's level, which fill the report."""
    expected = subjects(config, tiles, stretch)
    report.tiles = report.configured = len(expected)
    if report.limit is not None:
        report.configured = len(subjects(config, list_tiles(without_limit(config.data), "train"), stretch))
    images = {subject.id: subject.source for subject in expected}
    try:
        manifest = read_manifest(storage)
    except (IncompleteCache, CorruptCache) as err:
        code = "incomplete" if isinstance(err, IncompleteCache) else "damaged-manifest"
        report.findings.append(Finding(code, None, str(err)))
        return
    report.fingerprint = manifest.fingerprint
    report.error_bound = manifest.probability_bound(config.distill.temperature, len(config.classes.names))
    report.other_libraries = other_libraries(manifest.libraries)
    note = library_note(manifest.libraries)
    if note:
        progress.say(note)
    report.findings += [
        Finding("stale-recipe", None, line)
        for line in differences(manifest.recipe, expected_fields(config, stretch, manifest.recipe, tiles))
    ]
    if manifest.partial_of is not None and report.limit is None:
        advice = "run `kdpipe precompute-teacher` without --limit, or verify with the same --limit"
        report.findings.append(
            Finding("incomplete", None, f"a trial computed the cache: {partial_text(manifest)}; {advice}")
        )
    report.findings += _check_files(storage, manifest, images, report, progress)
    if report.level == "parity" and not report.findings:
        cache = SoftTargetCache(storage, manifest, configured_softening(config))
        _check_parity(
            config, cache, expected, device, sample, student, report, progress, on_parity or (lambda compared: None)
        )
        _check_labels(config, cache, expected, report, progress)
    elif report.level == "parity":
        progress.say("parity was skipped because the cache is damaged or stale: fix these findings first")


def _check_files(
    storage: Storage, manifest: Manifest, images: Mapping[str, Source], report: Report, progress: Progress
) -> list[Finding]:
    of_trial = report.limit is not None
    if report.level == "quick":
        return check_quick(storage, manifest, images, only_these=of_trial)
    held = sum(record.id in images for record in manifest.tiles) if of_trial else len(manifest.tiles)
    with progress.bar("every byte", held, report.noun) as advance:
        return check_full(storage, manifest, images, advance, only_these=of_trial)


def _check_parity(
    config: Config, cache: SoftTargetCache, tiles: list[Subject], device: torch.device,
    sample: int, checkpoint: str | None, report: Report, progress: Progress, on_parity: Callable[[Compared], None],
) -> None:  # fmt: skip
    """Run the teacher again on a sample; fills the report's `parity` and `teacher_classes`."""
    from kdpipe.pipeline.models import student as students  # slow to import, and not needed below parity

    manifest = cache.manifest
    teacher = open_teacher(config, manifest.recipe, device)
    torch.manual_seed(config.seed)
    config = students.with_own_normalization(config)
    student, weights = students.untrained_student(config), checkpoint or config.student.checkpoint
    if weights is not None:
        students.load_student_weights(student, weights, replace_head=config.student.replace_head)
    student.to(device).eval()
    precision = max((member.precision for member in manifest.recipe.teachers), key=PRECISION_SLACK.__getitem__)
    bound = manifest.probability_bound(config.distill.temperature, len(config.classes.names))
    counts = []
    chosen = sampled_tiles(tiles, sample, config.seed)
    require_predictions(config, chosen)
    with progress.bar("parity", len(chosen), report.noun) as advance:
        for tile in chosen:
            image_HWC = tile.image()
            size = sized("tile", 1, *image_HWC.shape[:2])
            advice = teacher_advice(config, 1, device, max(image_HWC.shape[:2]))
            with fits_in_memory(f"while {size} was compared with the teacher", advice):
                logits_NTHW = teacher.logits(tile.seen(image_HWC)[None])
                live_CHW = teacher.targets_of(logits_NTHW)[0]
                probs_CHW = teacher.probabilities_of(logits_NTHW)[0]
                lost = cache.entropy_error(tile.id, middle_window(*image_HWC.shape[:2]))
                cached_CHW = cache.read(tile.id)
                result = compare(
                    tile.id, cached_CHW, live_CHW, probs_CHW, image_HWC, student, config, bound, lost, precision, device
                )
            report.parity.append(result)
            on_parity(Compared(tile, cached_CHW, live_CHW, result))
            if tile.mask is not None:
                predicted_HW = logits_NTHW[0].argmax(dim=0).cpu().numpy()
                counts.append(count_teacher_classes(predicted_HW, tile.labels(), config))
            advance()
    report.findings += [
        _parity_finding(row.tile, name, m)
        for row in report.parity
        for name, m in row.measures().items()
        if not m.passes
    ]
    if counts:
        report.teacher_classes = check_class_map(np.stack(counts), config)
        report.findings += [_class_map_finding(row) for row in report.teacher_classes if row.clearly_better]


def _parity_finding(tile: str, name: str, found: Measure) -> Finding:
    bound = f"at {'least' if found.at_least else 'most'} {found.tolerance:.4g}"
    return Finding("parity", tile, f"{name} is {found.value:.4g}, which should be {bound}")


def _class_map_finding(row: TeacherClass) -> Finding:
    return Finding(
        "class-map", None,
        f"where the teacher predicts {row.name}, {100 * row.fitting_share:.0f} % of the labels say {row.fitting} and "
        f"{100 * row.configured_share:.0f} % {row.configured}: mapping it to {row.fitting} raises mIoU by "
        f"{100 * row.gain:.1f} points. Is the order of teacher.classes that of the checkpoint's channels?",
    )  # fmt: skip


def _check_labels(
    config: Config, cache: SoftTargetCache, tiles: list[Subject], report: Report, progress: Progress
) -> None:
    """Score the likeliest class of the cached targets against the masks of all labelled tiles; fills the report."""
    labelled = [tile for tile in tiles if tile.mask is not None]
    if not labelled:
        progress.say("no tile has labels: the class map cannot be checked")
        return
    num_classes = len(config.classes.names)
    total = np.zeros((num_classes, num_classes), dtype=np.int64)
    with progress.bar("labels", len(labelled), report.noun) as advance:
        for tile in labelled:
            predicted_HW = cache.read(tile.id).argmax(axis=0)
            total += count_pairs(tile.labels(), predicted_HW, num_classes, num_classes, config.classes.ignore_index)
            advance()
    report.label_tiles = len(labelled)
    report.confusion = total.tolist()
    report.labels = scores(total, config.classes.names, config.classes.not_scored)


def sampled_tiles(tiles: Sequence[T], sample: int, seed: int) -> list[T]:
    """A seeded sample that takes labelled and unlabelled tiles in turn, so that the class map can be checked."""
    order = [tiles[i] for i in np.random.default_rng(seed).permutation(len(tiles))]
    labelled = [tile for tile in order if tile.mask is not None]
    unlabelled = [tile for tile in order if tile.mask is None]
    turns = max(len(labelled), len(unlabelled))
    mixed = [group[turn] for turn in range(turns) for group in (labelled, unlabelled) if turn < len(group)]
    return mixed[:sample]
