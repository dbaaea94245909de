"""The whole configuration, and the checks that span sections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from kdpipe.configs.errors import count_text
from kdpipe.configs.schema.bands import text_of
from kdpipe.configs.schema.data import Classes, Data
from kdpipe.configs.schema.labels import MaskCodes, codes_of
from kdpipe.configs.schema.losses import refuse_unknown_classes
from kdpipe.configs.schema.section import Section
from kdpipe.configs.schema.student import Distill, Student, Train
from kdpipe.configs.schema.teacher import Cache, MeanStd, Teacher

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROW_SUM_TOLERANCE = 1e-6  # rows of the class map are typed by hand, as decimals such as 0.7 and 0.3


class Config(Section):
    """One experiment."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is `model_weights/<group>/<name>`."""
    group: str = Field("default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of runs that belong together."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the student's random weights and of all crops."""
    classes: Classes
    """The student's classes."""
    data: Data
    """Roots of tiles."""
    teacher: Teacher | None = None
    """The frozen network. Several go under `teachers`."""
    teachers: list[Teacher] = Field([])
    """Networks whose logits are averaged, each with the keys of `teacher`."""
    class_map: dict[str, dict[str, float]]
    """For each teacher class, its shares in the student's classes. Every row sums to 1."""
    cache: Cache
    """The cache of the teacher's predictions."""
    distill: Distill = Distill()
    """How the student learns from the teacher."""
    student: Student
    """The network to train."""
    train: Train = Train()
    """The recipe of stage two."""

    @property
    def members(self) -> dict[str, Teacher]:
        """The teachers whose logits are averaged, by their key: `teacher`, or `teachers.0`, `teachers.1`, …"""
        if self.teacher is not None:
            return {"teacher": self.teacher}
        return {f"teachers.{i}": member for i, member in enumerate(self.teachers)}

    @property
    def has_predictions(self) -> bool:
        """Whether the teacher is not a network, but predictions that another program made."""
        return any(member.predictions is not None for member in self.members.values())

    @property
    def teacher_classes(self) -> list[str]:
        """The first teacher's classes without those dropped: the rows of the class map, in their order."""
        return next(iter(self.members.values())).kept_classes

    @property
    def teachers_places(self) -> tuple[int, ...]:
        """
        Where the bands that teachers see lie in an image that was read, counted from 0.

        In the order of the network where all teachers see the same, else by their numbers in the files.
        """
        seen = {self.data.places(member.bands) for member in self.members.values()}
        if len(seen) == 1:
            return seen.pop()
        return tuple(sorted(set().union(*seen), key=lambda place: (self.data.bands[place], place)))

    def class_map_matrix(self) -> NDArray[np.float32]:
        """
        The class map, float32 `(C_t, C_s)`: rows in the order of `teacher_classes`, columns of `classes.names`.

        Every row sums to 1, so that a distribution over teacher classes becomes one over student classes.
        """
        import numpy as np

        rows = [[self.class_map[t].get(s, 0.0) for s in self.classes.names] for t in self.teacher_classes]
        matrix = np.asarray(rows, dtype=np.float64)
        shares: NDArray[np.float32] = (matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32)
        return shares

    @model_validator(mode="after")
    def _check(self) -> Config:
        self._check_teachers()
        self._check_class_map()
        self._check_student()
        self._check_bands()
        self._check_mask_codes()
        self._check_views()
        for key, weights in (
            ("train.class_weights", self.train.class_weights),
            ("distill.class_trust", self.distill.class_trust),
        ):
            if isinstance(weights, dict):
                refuse_unknown_classes(key, weights, self.classes.names)
        return self

    def _check_teachers(self) -> None:
        if (self.teacher is None) == (not self.teachers):
            raise ValueError("one teacher goes under the key teacher, several under teachers; found both or neither")
        if self.teacher is not None and self.teacher.weight != 1:
            raise ValueError(f"teacher.weight is for several teachers (teachers: [...]), found {self.teacher.weight:g}")
        for key, member in self.members.items():
            if set(member.kept_classes) != set(self.teacher_classes):
                raise ValueError(
                    f"{key} must predict the same classes as the first teacher, in any order: {sorted(self.teacher_classes)}; "
                    f"found {sorted(member.kept_classes)}"
                )

        self._check_predictions()

    def _check_predictions(self) -> None:
        key = next((key for key, member in self.members.items() if member.predictions is not None), None)
        if key is None:
            return
        if len(self.members) > 1:
            raise ValueError(
                f"{key}.predictions stand alone, as they are not computed beside the logits of other teachers: average them in the "
                "program that makes them, and set teacher"
            )
        if self.distill.teacher_view == "crop":
            raise ValueError(
                f"distill.teacher_view: crop needs a network, which predicts crops in changed colours; {key}.predictions are of whole "
                "tiles: leave it out. Crops, scales and flips of training are applied to them too"
            )
        if self.distill.mode == "online":
            raise ValueError(
                f"distill.mode: online asks a network at each step, and {key}.predictions were made already: set mode: cached, which "
                "trains from the same values"
            )

    def _check_class_map(self) -> None:
        predicted = self.teacher_classes
        missing = [name for name in predicted if name not in self.class_map]
        unknown = [name for name in self.class_map if name not in predicted]
        if missing or unknown:
            raise ValueError(
                f"class_map needs one row for each class that the teacher predicts, {predicted}: missing {missing}, unknown {unknown}"
            )
        for teacher_class, row in self.class_map.items():
            strangers = [name for name in row if name not in self.classes.names]
            if strangers:
                raise ValueError(
                    f"class_map.{teacher_class} names {strangers}, not among classes.names {self.classes.names}"
                )
            if any(share < 0 for share in row.values()):
                raise ValueError(f"class_map.{teacher_class} has a negative share: {row}")
            total = sum(row.values())
            if abs(total - 1) > ROW_SUM_TOLERANCE:
                raise ValueError(f"class_map.{teacher_class} must sum to 1, found {total:g}: {row}")

    def _check_student(self) -> None:
        student, num_classes = self.student, len(self.classes.names)
        for key, teacher in self.members.items():
            same = (teacher.architecture, teacher.encoder, teacher.model, len(teacher.classes))
            if (
                student.checkpoint is not None
                and student.checkpoint == teacher.checkpoint
                and (student.architecture, student.encoder, student.model, num_classes) != same
            ):
                network = teacher.model or f"{teacher.architecture} with {teacher.encoder}"
                raise ValueError(
                    f"student.checkpoint is {key}.checkpoint ({teacher.checkpoint}), the weights of {network} "
                    f"and {len(teacher.classes)} classes, and the student is another network: leave it out. It "
                    "learns from the teacher through the cache"
                )
        if student.num_classes not in ("from classes", num_classes):
            raise ValueError(
                f"student.num_classes is {student.num_classes}, but classes.names has {num_classes} names: leave it out. The "
                f"student predicts classes.names; class_map maps the teacher's {len(self.teacher_classes)} classes to them"
            )

    def _check_bands(self) -> None:
        networks: dict[str, Teacher | Student] = {**self.members, "student": self.student}
        for key, network in networks.items():
            try:
                numbers = self.data.numbers(network.bands)
            except ValueError as err:
                raise ValueError(f"{key}.bands {err}") from err
            count, normalize = len(numbers), network.normalize
            seen = f"it sees {count_text(count, 'bands')}: {text_of(numbers, self.data.band_names)}"
            if isinstance(normalize, MeanStd) and len(normalize.mean) != count:
                raise ValueError(f"{key}.normalize has {len(normalize.mean)} means and deviations, and {seen}")
            if normalize == "imagenet" and count != 3 and isinstance(network, Teacher):
                raise ValueError(
                    f"{key}.normalize: imagenet has the mean and deviation of red, green and blue, and {seen}. Give the values that it "
                    "was trained with, as {mean: [...], std: [...]} of x / 255, or unit"
                )

    def _check_mask_codes(self) -> None:
        try:
            self.mask_codes  # noqa: B018
        except ValueError as err:
            raise ValueError(f"data.{err}") from err

    @property
    def mask_codes(self) -> MaskCodes:
        """What colours and values of the masks stand for."""
        return codes_of(self.data.colours, self.data.remap, self.classes.names, self.classes.ignore_index)

    def _check_views(self) -> None:
        views = self.cache.views
        if self.distill.teacher_view == "tile":
            if views is not None:
                raise ValueError(
                    f"cache.views is {views}, but the teacher sees whole tiles, which all crops are cut from: leave it out, or set "
                    "distill.teacher_view: crop"
                )
            return
        if views is None:
            raise ValueError(
                "distill.teacher_view: crop needs cache.views, the number of augmented crops of each tile that the teacher predicts, "
                "such as 8: training cycles through them"
            )
        for key in ("colour_shift", "unlabelled_colour_shift", "cutmix"):
            if getattr(self.train, key):
                raise ValueError(
                    f"train.{key} changes crops after the teacher saw the tile, and with distill.teacher_view: crop it sees the same crops "
                    "as the student: leave one of them out"
                )
        for key in ("crops_per_tile", "unlabelled_crops_per_tile"):
            crops = getattr(self.train, key)
            if crops is not None and crops > views:
                raise ValueError(
                    f"train.{key} is {crops}, and cache.views {views}: an epoch would show the same crops more than once; "
                    "raise cache.views"
                )
