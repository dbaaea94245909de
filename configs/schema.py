"""The configuration as types: closed (unknown keys are refused), frozen, and checked as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DistillMode = Literal["cached", "online", "none"]
TeacherView = Literal["tile", "crop"]
FromClasses = Literal["from classes"]

DEFAULT_BATCH_SIZE = 4  # the guide's
MAX_VIEWS = 10_000  # of a tile: four digits name them; more would cost more than the live teacher
ROW_SUM_TOLERANCE = 1e-6  # class map rows are typed by hand as decimals such as 0.7 and 0.3


class Section(BaseModel):
    """A mapping of the YAML file."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


class Classes(Section):
    """The student's classes, in the order of the indices in the masks."""

    names: list[str] = Field(min_length=2)
    """Names, in the order of the indices in the masks."""
    ignore_index: int = Field(255, ge=0, le=65535)
    """The value in the masks that means no label. Maps hold it where a scene has no data."""
    not_scored: list[str] = []
    """Names that are learnt, but left out of the mean scores."""

    @model_validator(mode="after")
    def _check(self) -> Classes:
        _refuse_repeats(self.names, "classes.names")
        if self.ignore_index < len(self.names):
            raise ValueError(
                f"ignore_index {self.ignore_index} is also the index of class {self.names[self.ignore_index]}"
            )
        unknown = [name for name in self.not_scored if name not in self.names]
        if unknown:
            raise ValueError(f"not_scored names {unknown}, which are not among names: {self.names}")
        if set(self.not_scored) == set(self.names):
            raise ValueError("not_scored names every class, which leaves nothing to score")
        return self


class FixedRange(Section):
    """A linear stretch of `low..high` (in the file's own units, one pair for all bands or one a band) to 0..255."""

    range: tuple[float, float] | list[tuple[float, float]]
    """`[low, high]`, or three such pairs, one for each of `data.bands`."""

    @model_validator(mode="after")
    def _check(self) -> FixedRange:
        for low, high in self.pairs(None):
            if not low < high:
                raise ValueError(f"a range needs low < high, found {low}, {high}")
        return self

    def pairs(self, num_bands: int | None) -> list[tuple[float, float]]:
        """One (low, high) a band; a single pair is repeated for `num_bands` bands."""
        if isinstance(self.range, list):
            return list(self.range)
        return [self.range] * (num_bands or 1)


class Percentiles(Section):
    """A linear stretch between two percentiles per band, taken once over all training and unlabelled images."""

    percentiles: tuple[float, float]
    """Two of 0..100, such as `[2, 98]`."""

    @model_validator(mode="after")
    def _check(self) -> Percentiles:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles need 0 <= low < high <= 100, found {low}, {high}")
        return self


class Data(Section):
    """Where tiles lie: every root holds a folder of images and, if labelled, one of masks, paired by stem."""

    train: list[str] = Field(min_length=1)
    """Roots of labelled tiles to train on."""
    val: list[str] = []
    """Roots of labelled tiles to validate on, and what `evaluate` scores by default; may be empty."""
    unlabelled: list[str] = []
    """Roots of tiles that train from their soft targets alone. A folder of masks there is not looked at."""
    images: str = "images"
    """Name of the folder of images in every root."""
    masks: str = "masks"
    """Name of the folder of masks in every root."""
    allow_missing_masks: bool = False
    """Whether a tile of `train` or `val` may lack its mask; otherwise that is an error."""
    bands: tuple[int, int, int] = (1, 2, 3)
    """Which three bands of the images the networks see, counted from 1."""
    stretch: FixedRange | Percentiles | None = None
    """How other than 8-bit values become 0..255; images of 8 bits are taken as they are without it."""

    @model_validator(mode="after")
    def _check(self) -> Data:
        for key in ("train", "val", "unlabelled"):
            _refuse_repeats(getattr(self, key), f"data.{key}")
        if min(self.bands) < 1:
            raise ValueError(f"bands are counted from 1, found {list(self.bands)}")
        if isinstance(self.stretch, FixedRange) and len(self.stretch.pairs(3)) != 3:
            raise ValueError(
                f"stretch.range needs one pair, or one for each of the 3 bands, found {self.stretch.range}"
            )
        return self


class MeanStd(Section):
    """Per-channel normalisation of x / 255."""

    mean: tuple[float, float, float]
    """Mean of each channel, of x / 255."""
    std: tuple[float, float, float]
    """Standard deviation of each channel, of x / 255."""

    @field_validator("std")
    @classmethod
    def _positive(cls, std: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(std) <= 0:
            raise ValueError(f"std must be positive, found {list(std)}")
        return std


Normalize = Literal["unit", "imagenet"] | MeanStd


class Teacher(Section):
    """The frozen network, and how it is asked."""

    architecture: str
    """An architecture of segmentation-models-pytorch, such as `unet`."""
    encoder: str
    """An encoder of smp or, as `tu-NAME`, of timm, such as `efficientnet-b4`."""
    checkpoint: str
    """File of weights: `.pth`, `.ckpt` or `.safetensors`."""
    classes: list[str] = Field(min_length=2)
    """One name for each channel of the file, in the file's order."""
    normalize: Normalize = "unit"
    """What the network's input is: `unit` (x / 255), `imagenet` (its mean and deviation), or a mean and a deviation."""
    precision: Precision = "auto"
    """What it computes in. `auto`: bf16 where the device is made for it and three tiles say that it keeps the targets, else fp32."""
    tta: Literal["none", "flips", "d4"] = "none"
    """Views whose logits are averaged: one, the four of two flips, or the eight of the square's symmetries."""
    scales: list[Annotated[float, Field(gt=0)]] = Field([1.0], min_length=1)
    """Scales of the image at which each view is asked."""
    window: Annotated[int, Field(ge=64, multiple_of=32)] | None = None
    """Side in px of overlapping windows for images larger than that; null asks for whole images."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Images at a time, where several have one size; null: 1 on a CPU, more on a GPU. Not part of the fingerprint; last bits may differ."""
    drop_channels: list[Annotated[int, Field(ge=0)]] = []
    """Places in `classes`, counted from 0, left out before the softmax, such as OpenEarthMap's unknown."""
    weight: float = Field(1.0, gt=0)
    """Weight of its logits among several `teachers`."""

    @model_validator(mode="after")
    def _check(self) -> Teacher:
        _refuse_repeats(self.classes, "teacher.classes")
        _refuse_repeats(self.drop_channels, "teacher.drop_channels")
        beyond = [channel for channel in self.drop_channels if channel >= len(self.classes)]
        if beyond:
            raise ValueError(
                f"drop_channels are places in classes counted from 0, found {beyond} with {len(self.classes)} classes"
            )
        if len(self.kept_classes) < 2:
            raise ValueError(f"drop_channels {self.drop_channels} leaves fewer than two of classes {self.classes}")
        return self

    @property
    def kept_classes(self) -> list[str]:
        """The classes of the channels that are not dropped, in the file's order."""
        return [name for channel, name in enumerate(self.classes) if channel not in self.drop_channels]


class Cache(Section):
    """
    The teacher's answers on disk: soft targets, or the logits from which any temperature and class map make some.

    A stored soft target is off by at most `1 / (2**bits - 1)`. `views` is how many augmented crops of each tile are recorded; only
    with `distill.teacher_view: crop`.
    """

    path: str
    """A folder, or the URL of a file system that fsspec knows, such as `s3://bucket/mine.zarr`."""
    kind: Literal["soft", "logits"] = "soft"
    """`soft`: targets of one temperature and class map. `logits`: both may change later, for 3.5 to 4 times the bytes."""
    bits: Literal[4, 6, 8, 16] = 8
    """A stored soft target is off by at most `1 / (2**bits - 1)`. Logits have 8 or 16."""
    views: Annotated[int, Field(ge=1, le=MAX_VIEWS)] | None = None
    """How many augmented crops of each tile are recorded; only with `distill.teacher_view: crop`."""

    @model_validator(mode="after")
    def _check(self) -> Cache:
        if self.kind == "logits" and self.bits < 8:
            raise ValueError(
                f"bits is {self.bits}, but logits are stored with 8 or 16: set one of these, or kind: soft"
            )
        return self


class Distill(Section):
    """
    What the student learns from, and how much of it is the teacher.

    `teacher_view` is what the teacher sees: the whole clean `tile`, or the very augmented `crop` that the student sees.
    """

    mode: DistillMode = "cached"
    """Where soft targets come from: the cache, the live teacher (to compare with), or nowhere."""
    teacher_view: TeacherView = "tile"
    """What the teacher sees: the whole clean `tile`, or the very augmented `crop` that the student sees."""
    temperature: float = Field(2.0, gt=0)
    """T of the softmax of teacher and student."""
    alpha: float = Field(0.7, ge=0, le=1)
    """Share of the teacher in the loss; the labels have the rest."""


class Student(Section):
    """The network to train."""

    architecture: str
    """`ftunetformer`, `unetformer`, or an architecture of segmentation-models-pytorch."""
    encoder: str | None = None
    """An encoder of smp or timm; `ftunetformer` has its own."""
    encoder_weights: str | None = None
    """A file, or a name that smp or timm knows, such as `imagenet`; null starts from random weights."""
    checkpoint: str | None = None
    """File of weights of the whole student to start from."""
    replace_head: bool = False
    """Whether a `checkpoint` of another number of classes gives all but its head (`ftunetformer`, `unetformer`)."""
    num_classes: int | FromClasses = "from classes"
    """Leave it out: it is the number of `classes.names`, and another one is refused."""
    normalize: Normalize = "imagenet"
    """As the teacher's."""


class Train(Section):
    """The recipe of stage two."""

    epochs: int = Field(45, ge=1)
    """How often every tile is seen."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps after which training ends, whatever `epochs` says."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = DEFAULT_BATCH_SIZE
    """Crops at a time on each device; `auto` finds the largest number that fits."""
    effective_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Crops an optimizer step sees; with `batch_size: auto` the goal (4 if null), else only checked."""
    val_batch_size: int = Field(4, ge=1)
    """Validation tiles at a time, where several have one size; changes no score."""
    crops_per_tile: int = Field(1, ge=1)
    """Crops of each tile in an epoch."""
    unlabelled_crops_per_tile: Annotated[int, Field(ge=1)] | None = None
    """The same for tiles without mask; null takes `crops_per_tile`."""
    lr: float = Field(6e-4, gt=0)
    """Learning rate of all but the encoder."""
    backbone_lr: float = Field(6e-5, ge=0)
    """Learning rate of the encoder."""
    weight_decay: float = Field(2.5e-4, ge=0)
    """AdamW's; biases have none."""
    lookahead: bool = False
    """Whether Lookahead (5 steps, share 0.5) goes around AdamW."""
    restart_epochs: int = Field(15, ge=1)
    """Epochs of the first cycle of the cosine schedule with warm restarts."""
    restart_mult: int = Field(2, ge=1)
    """How many times longer each cycle is than the one before."""
    crop: int = Field(512, ge=32)
    """Side of a training crop in px."""
    scales: list[Annotated[float, Field(gt=0)]] = Field([0.5, 0.75, 1.0, 1.25, 1.5], min_length=1)
    """Scales of which each crop draws one."""
    max_class_share: float = Field(0.75, gt=0, le=1)
    """A crop is drawn again (ten times at most) while one class has more than this share of its labelled pixels; 1 never does."""
    mosaic: float = Field(0.25, ge=0, le=1)
    """Probability that a crop is a mosaic of four tiles."""
    photometric: float = Field(0.25, ge=0, le=1)
    """Probability that the colours of a crop are changed."""
    accumulate: int = Field(1, ge=1)
    """Batches whose gradients make one optimizer step."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient; null does not clip."""
    precision: Precision = "auto"
    """What the student computes in; `auto` is bf16 where a GPU computes it natively, else fp32."""
    workers: int = Field(4, ge=0)
    """Processes that load data; 0 loads in the main process. Changes no result."""
    devices: int = Field(1, ge=1)
    """GPUs of this machine, or processes on the CPU, that train together."""
    val_every_epochs: int = Field(1, ge=1)
    """Epochs between validations; there is always one at the end."""
    checkpoint_every_steps: int = Field(200, ge=1)
    """Steps between checkpoints; there is one after every epoch too."""

    @field_validator("batch_size", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        if value != "auto" and (not isinstance(value, int) or value < 1):
            raise ValueError(f"expected a whole number from 1 up, or auto, found {value!r}")
        return value

    @property
    def samples_per_step(self) -> int:
        """How many samples an optimizer step sees: `batch_size * accumulate` of each device; `auto` keeps it while it divides it."""
        if self.batch_size == "auto":
            return self.effective_batch_size or DEFAULT_BATCH_SIZE
        return self.batch_size * self.accumulate * self.devices

    @model_validator(mode="after")
    def _check(self) -> Train:
        if self.batch_size == "auto" and self.accumulate != 1:
            raise ValueError(
                f"accumulate is {self.accumulate}, but batch_size: auto computes it: leave it out, and say in "
                "effective_batch_size how many samples an optimizer step sees"
            )
        if self.batch_size == "auto" and self.devices > 1:
            raise ValueError(
                f"batch_size: auto measures one device, and devices is {self.devices}: say how many samples each of them takes at a time"
            )
        if self.effective_batch_size not in (None, self.samples_per_step):
            on_devices = f" x devices {self.devices}" if self.devices > 1 else ""
            raise ValueError(
                f"effective_batch_size is {self.effective_batch_size}, but batch_size {self.batch_size} x accumulate "
                f"{self.accumulate}{on_devices} is {self.samples_per_step}: leave it out, or set batch_size: auto"
            )
        return self


class Config(Section):
    """One experiment."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run's folder, `model_weights/<group>/<name>`."""
    group: str = Field("default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder in which runs that belong together lie."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Of the student's random weights and of every crop that is drawn."""
    classes: Classes
    """The student's classes."""
    data: Data
    """Where tiles lie."""
    teacher: Teacher | None = None
    """The frozen network; or several under `teachers`."""
    teachers: list[Teacher] = []
    """Networks whose logits are averaged, each with the keys of `teacher`."""
    class_map: dict[str, dict[str, float]]
    """For each class of the teacher its share of each student class; every row sums to 1."""
    cache: Cache
    """The teacher's answers on disk."""
    distill: Distill = Distill()
    """What the student learns from, and how much of it is the teacher."""
    student: Student
    """The network to train."""
    train: Train = Train()
    """The recipe of stage two."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        self._check_teachers()
        answers = self.teacher_classes
        missing = [name for name in answers if name not in self.class_map]
        unknown = [name for name in self.class_map if name not in answers]
        if missing or unknown:
            raise ValueError(
                f"class_map needs one row for each class that the teacher answers in, {answers}: missing {missing}, unknown {unknown}"
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
        self._check_student()
        self._check_views()
        return self

    def _check_views(self) -> None:
        views = self.cache.views
        if self.distill.teacher_view == "tile":
            if views is not None:
                raise ValueError(
                    f"cache.views is {views}, but the teacher sees whole tiles, of which every crop is cut: leave it out, or set "
                    "distill.teacher_view: crop"
                )
            return
        if views is None:
            raise ValueError(
                "distill.teacher_view: crop needs cache.views, how many augmented crops of each tile the teacher answers, such "
                "as 8: training cycles through them"
            )
        for key in ("crops_per_tile", "unlabelled_crops_per_tile"):
            crops = getattr(self.train, key)
            if crops is not None and crops > views:
                raise ValueError(
                    f"train.{key} is {crops}, and cache.views {views}: an epoch would show the same crops more than once; "
                    "raise cache.views"
                )

    def _check_teachers(self) -> None:
        if (self.teacher is None) == (not self.teachers):
            raise ValueError("one teacher goes under the key teacher, several under teachers; found both or neither")
        if self.teacher is not None and self.teacher.weight != 1:
            raise ValueError(f"teacher.weight is for several teachers (teachers: [...]), found {self.teacher.weight:g}")
        for key, member in self.members.items():
            if set(member.kept_classes) != set(self.teacher_classes):
                raise ValueError(
                    f"{key} must answer in the same classes as the first teacher, in any order: {sorted(self.teacher_classes)}; "
                    f"found {sorted(member.kept_classes)}"
                )

    def _check_student(self) -> None:
        student, num_classes = self.student, len(self.classes.names)
        for key, teacher in self.members.items():
            same = (teacher.architecture, teacher.encoder, len(teacher.classes))
            if (
                student.checkpoint == teacher.checkpoint
                and (student.architecture, student.encoder, num_classes) != same
            ):
                raise ValueError(
                    f"student.checkpoint is {key}.checkpoint ({teacher.checkpoint}), the weights of {teacher.architecture} with "
                    f"{teacher.encoder} and {len(teacher.classes)} classes, and the student is another network: leave it out. It "
                    "learns from the teacher through the cache"
                )
        if student.num_classes not in ("from classes", num_classes):
            raise ValueError(
                f"student.num_classes is {student.num_classes}, but classes.names has {num_classes} names: leave it out. The "
                f"student answers in classes.names; the teacher's {len(self.teacher_classes)} classes are taken to them by class_map"
            )

    @property
    def members(self) -> dict[str, Teacher]:
        """The teachers whose answers are averaged, by the key they stand under: one under `teacher`, or `teachers.0` …"""
        if self.teacher is not None:
            return {"teacher": self.teacher}
        return {f"teachers.{i}": member for i, member in enumerate(self.teachers)}

    @property
    def teacher_classes(self) -> list[str]:
        """What the teacher answers in, in the order of the class map's rows: the first one's classes, without those dropped."""
        return next(iter(self.members.values())).kept_classes

    def class_map_matrix(self) -> NDArray[np.float32]:
        """
        The class map as float32 `(C_t, C_s)`: rows in the order of `teacher_classes`, columns of `classes.names`.

        Every row sums to 1, so that a distribution over teacher classes becomes one over student classes.
        """
        import numpy as np

        rows = [[self.class_map[t].get(s, 0.0) for s in self.classes.names] for t in self.teacher_classes]
        matrix = np.asarray(rows, dtype=np.float64)
        shares: NDArray[np.float32] = (matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32)
        return shares


def _refuse_repeats(values: list[Any], key: str) -> None:
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"{key} names {repeated} more than once")
