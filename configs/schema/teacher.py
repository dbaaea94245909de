"""The sections `teacher` and `cache`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from kdpipe.configs.schema.bands import Choice
from kdpipe.configs.schema.options import SET_BY_TEACHER, Options, refuse_own
from kdpipe.configs.schema.section import Section, refuse_repeats

Precision = Literal["auto", "fp32", "bf16", "fp16"]
TeacherView = Literal["tile", "crop"]

MAX_VIEWS = 10_000  # per tile: four digits name them, and more would cost more than the live teacher


class MeanStd(Section):
    """Normalisation of x / 255, per channel."""

    mean: tuple[float, ...] = Field(min_length=1)
    """Mean of x / 255, for each band that the network sees."""
    std: tuple[float, ...] = Field(min_length=1)
    """Standard deviation of x / 255, for each band that the network sees."""

    @model_validator(mode="after")
    def _check(self) -> MeanStd:
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, found {list(self.std)}")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean and std need as many values, found {list(self.mean)} and {list(self.std)}")
        return self


Normalize = Literal["unit", "imagenet"] | MeanStd


class Teacher(Section):
    """The frozen network, and how it is run."""

    architecture: str
    """An architecture of segmentation-models-pytorch (smp), such as `unet`."""
    encoder: str
    """An encoder of smp, such as `efficientnet-b4`, or of timm, as `tu-NAME`."""
    checkpoint: str
    """File of weights: `.pth`, `.ckpt` or `.safetensors`."""
    weights: Literal["raw", "ema"] | None = Field(None, exclude_if=lambda weights: weights is None)
    """The weights of a file that holds `raw` and averaged ones (`ema`). Null takes the raw ones, or the only ones."""
    classes: list[str] = Field(min_length=2)
    """One name for each output channel, in the checkpoint's order. A sigmoid's one channel has two: first that of 1 - σ."""
    bands: Choice | None = Field(None, exclude_if=lambda choice: choice is None)
    """Bands that it sees, in its order, among `data.bands`: by their numbers in the files, or by `data.band_names`. Null takes them all."""
    normalize: Normalize = "unit"
    """Input normalisation: `unit` (x / 255), `imagenet` (ImageNet's mean and deviation), or a mean and a deviation for each band."""
    precision: Precision = "auto"
    """Computing precision. `auto` is bf16 if the device is fast at it and the targets of three tiles survive it, else fp32."""
    tta: Literal["none", "flips", "d4"] = "none"
    """Test-time augmentation, averaged over logits: 1 view, the 4 of both flips, or the 8 symmetries of the square."""
    scales: list[Annotated[float, Field(gt=0)]] = Field([1.0], min_length=1)
    """Scales of the image at which each view is predicted."""
    window: Annotated[int, Field(ge=64, multiple_of=32)] | None = None
    """Side in px of the overlapping windows that larger images are cut into. Null predicts whole images."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Images of one size per batch. Null is 1 on a CPU and more on a GPU. Not part of the fingerprint; last bits may differ."""
    drop_channels: list[Annotated[int, Field(ge=0)]] = Field([])
    """Channels to drop before the softmax, counted from 0, such as OpenEarthMap's unknown."""
    weight: float = Field(1.0, ge=1e-6, le=1e6)  # whose sums and shares are finite numbers above zero
    """Weight of its logits among several `teachers`."""
    options: Options = Field({}, exclude_if=lambda options: not options)
    """Further arguments of the architecture's constructor, such as `{encoder_output_stride: 8}`. A checkpoint does not show all."""

    @field_validator("options")
    @classmethod
    def _refuse_own(cls, options: Options) -> Options:
        return refuse_own(options, SET_BY_TEACHER)

    @model_validator(mode="after")
    def _check(self) -> Teacher:
        refuse_repeats(self.classes, "teacher.classes")
        refuse_repeats(self.drop_channels, "teacher.drop_channels")
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
        """The classes of the channels that are not dropped, in the checkpoint's order."""
        return [name for channel, name in enumerate(self.classes) if channel not in self.drop_channels]


class Cache(Section):
    """The cache of the teacher's predictions, as soft targets or as logits."""

    path: str
    """A folder, or a URL that fsspec can open, such as `s3://bucket/mine.zarr`."""
    kind: Literal["soft", "logits"] = "soft"
    """`soft` stores targets for one temperature and class map. `logits` lets both change later, for 3.5 to 4 times the bytes."""
    bits: Literal[4, 6, 8, 16] = 8
    """Bits per value. The error of a stored soft target is at most `1 / (2**bits - 1)`. Logits need 8 or 16."""
    views: Annotated[int, Field(ge=1, le=MAX_VIEWS)] | None = None
    """Recorded augmented crops per tile. Required with `distill.teacher_view: crop`, refused otherwise."""

    @model_validator(mode="after")
    def _check(self) -> Cache:
        if self.kind == "logits" and self.bits < 8:
            raise ValueError(
                f"bits is {self.bits}, but logits are stored with 8 or 16: set one of these, or kind: soft"
            )
        return self
