"""The sections `teacher` and `cache`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from kdpipe.configs.schema.bands import Choice
from kdpipe.configs.schema.options import SET_BY_TEACHER, Options, refuse_own
from kdpipe.configs.schema.section import Section, is_none, refuse_repeats
from kdpipe.configs.urls import refuse_address

Precision = Literal["auto", "fp32", "bf16", "fp16"]
TeacherView = Literal["tile", "crop"]

OWN_MODEL = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"  # package.module:name
# By the key that names a network: the keys that it needs, and those that it may have.
KEYS_OF_KIND: dict[str, tuple[list[str], list[str]]] = {
    "architecture": (["encoder", "checkpoint"], ["options", "weights"]),
    "model": (["checkpoint"], ["options", "weights"]),
    "pretrained": ([], []),
    "file": ([], []),
    "predictions": (["are"], []),
    "given": ([], []),
}
Kind = Literal["smp", "model", "pretrained", "file", "predictions", "given"]
FOREIGN: tuple[Kind, ...] = ("model", "pretrained", "file", "predictions", "given")
Are = Literal["logits", "probabilities", "classes"]
# Keys that say how a network is run, which predictions were made without.
OF_A_RUN = ("bands", "normalize", "precision", "tta", "scales", "window")

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

    architecture: str | None = Field(None, exclude_if=is_none)
    """An architecture of segmentation-models-pytorch (smp), such as `unet`. Needs `encoder` and `checkpoint`."""
    encoder: str | None = Field(None, exclude_if=is_none)
    """An encoder of smp, such as `efficientnet-b4`, or of timm, as `tu-NAME`."""
    checkpoint: str | None = Field(None, exclude_if=is_none)
    """File of weights: `.pth`, `.ckpt` or `.safetensors`."""
    model: Annotated[str, Field(pattern=OWN_MODEL)] | None = Field(None, exclude_if=is_none)
    """A function or class of your own that builds the network, as `package.module:name`, in place of `architecture`. Needs `checkpoint`."""
    pretrained: str | None = Field(None, exclude_if=is_none)
    """A folder that transformers' `save_pretrained` wrote, or a repository of its hub. It brings its own normalisation."""
    file: str | None = Field(None, exclude_if=is_none)
    """A whole exported network, `.onnx` or `.pt2` (torch.export)."""
    predictions: str | Annotated[list[str], Field(min_length=1)] | None = Field(None, exclude_if=is_none)
    """Predictions that another program made: a folder with a file for each tile, a large GeoTIFF to cut from, or several. Needs `are`."""
    are: Are | None = Field(None, exclude_if=is_none)
    """What `predictions` hold: `logits`, `probabilities`, or `classes`, the index of one class for each pixel."""
    given: Annotated[str, Field(min_length=1)] | None = Field(None, exclude_if=is_none)
    """Your name and version of a network that is passed in Python, as `precompute(config, teacher=network)`."""
    weights: Literal["raw", "ema"] | None = Field(None, exclude_if=is_none)
    """The weights of a file that holds `raw` and averaged ones (`ema`). Null takes the raw ones, or the only ones."""
    classes: list[str] = Field(min_length=2)
    """One name for each output channel, in the checkpoint's order. A sigmoid's one channel has two: first that of 1 - σ."""
    bands: Choice | None = Field(None, exclude_if=is_none)
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
    def _refuse_own(cls, options: Options, info: ValidationInfo) -> Options:
        """What an architecture is given otherwise; a callable of the user's own may have arguments of any name."""
        return options if info.data.get("model") is not None else refuse_own(options, SET_BY_TEACHER)

    @property
    def kind(self) -> Kind:
        """Which of the keys names the network; `smp` for `architecture`."""
        for name in FOREIGN:
            if getattr(self, name) is not None:
                return name
        return "smp"

    @property
    def origin(self) -> str:
        """Where its weights come from, for messages."""
        return self.checkpoint or self.pretrained or self.file or self.given or ", ".join(self.places)

    @property
    def places(self) -> list[str]:
        """The folders and files of `predictions`; empty for a network."""
        if self.predictions is None:
            return []
        return [self.predictions] if isinstance(self.predictions, str) else list(self.predictions)

    def _check_kind(self) -> None:
        given = [name for name in KEYS_OF_KIND if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "needs one of architecture (with encoder), model, pretrained, file, predictions and given to name the network, "
                f"found {' and '.join(given) or 'none'}"
            )
        needed, taken = KEYS_OF_KIND[given[0]]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing: {given[0]} needs it")
        for name in ("encoder", "checkpoint", "options", "weights", "are"):
            if getattr(self, name) and name not in needed + taken:
                raise ValueError(f"{name} does not go with {given[0]}: leave it out")
        if self.pretrained is not None and self.normalize != "unit":
            raise ValueError(
                f"normalize is {self.normalize}, but {self.pretrained} brings a normalisation of its own: leave it out"
            )
        if self.predictions is not None:
            self._check_predictions()

    def _check_predictions(self) -> None:
        refuse_repeats(self.places, "teacher.predictions")
        for name in OF_A_RUN:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is {value}, but predictions were made already, by a program that chose it: leave it out"
                )

    @model_validator(mode="after")
    def _check(self) -> Teacher:
        self._check_kind()
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
    """Bits per value. A stored probability is off by at most `1 / (2**bits - 1)`; 8 move at most 2 % of a pixel's. Logits need 8 or 16."""
    views: Annotated[int, Field(ge=1, le=MAX_VIEWS)] | None = None
    """Recorded augmented crops per tile. Required with `distill.teacher_view: crop`, refused otherwise."""

    @field_validator("path")
    @classmethod
    def _check_path(cls, path: str) -> str:
        refuse_address(path)
        return path

    @model_validator(mode="after")
    def _check(self) -> Cache:
        if self.kind == "logits" and self.bits < 8:
            raise ValueError(
                f"bits is {self.bits}, but logits are stored with 8 or 16: set one of these, or kind: soft"
            )
        return self
