"""The sections `distill`, `student` and `train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from kdpipe.configs.schema.bands import Choice
from kdpipe.configs.schema.losses import (
    SOFT_LOSSES,
    USUAL_LABELLED_LOSS,
    Trust,
    Weight,
    refuse_other_soft_losses,
    refuse_other_weights,
    refuse_unknown_losses,
)
from kdpipe.configs.schema.options import SET_BY_STUDENT, Options, options_text, refuse_own
from kdpipe.configs.schema.section import Section, is_none
from kdpipe.configs.schema.teacher import OWN_MODEL, MeanStd, Precision, TeacherView

DistillMode = Literal["cached", "online", "none"]
StudentNormalize = Literal["unit", "imagenet", "pretrained"] | MeanStd

DEFAULT_BATCH_SIZE = 4  # the guide's
USUAL_THRESHOLD = 0.95  # FixMatch's, Sohn et al. 2020, arXiv 2001.07685

# By the key that names the student's network: the other keys that go with it.
KEYS_OF_STUDENT = {
    "architecture": ("encoder", "encoder_weights", "checkpoint", "replace_head", "options"),
    "model": ("checkpoint", "options"),
    "pretrained": (),
}


def _usual_normalization(given: dict[str, Any]) -> StudentNormalize:
    return "pretrained" if given.get("pretrained") else "imagenet"


class Distill(Section):
    """How the student learns from the teacher."""

    mode: DistillMode = "cached"
    """Source of the soft targets: the cache, the live teacher (for comparison), or none."""
    teacher_view: TeacherView = "tile"
    """The teacher sees the whole clean `tile`, or the same augmented `crop` as the student."""
    temperature: float = Field(2.0, ge=0.01, le=100)  # beyond, float32 overflows, or loses the loss in its rounding
    """Temperature T of both softmaxes, the teacher's and the student's."""
    alpha: float = Field(0.7, ge=0, le=1)
    """Weight of the soft targets in the loss; the labels have the rest."""
    loss: Literal["kl", "dice", "jaccard"] | Annotated[str, Field(pattern=OWN_MODEL)] | dict[str, Weight] = Field(
        "kl", exclude_if=lambda loss: loss == "kl"
    )
    """`kl`, `dice` or `jaccard`, weights of them such as `{kl: 1.0, dice: 1.0}`, or a function of your own, as `package.module:name`."""
    targets: Literal["soft", "hard"] = Field("soft", exclude_if=lambda targets: targets == "soft")
    """What is learnt: the teacher's probabilities, or its most likely class alone (`hard`, pseudo-labels), at `temperature` 1."""
    trust: Trust = Field("none", exclude_if=lambda trust: trust == "none")
    """Weighs each pixel's soft loss by the teacher's `confidence` or `entropy`, or leaves out those below a `threshold`."""
    trust_threshold: float = Field(
        USUAL_THRESHOLD, gt=0, le=1, exclude_if=lambda threshold: threshold == USUAL_THRESHOLD
    )
    """The least probability of the most likely class with `trust: threshold`."""
    class_trust: Literal["auto"] | dict[str, Annotated[float, Field(ge=0, le=1)]] | None = Field(
        None, exclude_if=is_none
    )
    """Weights of the soft loss by the teacher's class, in 0..1, such as `{Forest: 0.5}`. `auto`: its precision by the masks."""

    @field_validator("loss", mode="before")
    @classmethod
    def _known_or_own(cls, value: Any) -> Any:
        refuse_other_soft_losses(value)
        return value

    @field_validator("class_trust", mode="before")
    @classmethod
    def _auto_or_shares(cls, value: Any) -> Any:
        refuse_other_weights(value, least=0, most=1)
        return value

    @property
    def own_loss(self) -> str | None:
        """`loss` where it names a function of the user's own."""
        return self.loss if isinstance(self.loss, str) and self.loss not in SOFT_LOSSES else None

    @property
    def soft_losses(self) -> dict[str, float]:
        """The losses of the soft targets and their weights; empty with a loss of the user's own."""
        if isinstance(self.loss, dict):
            return self.loss
        return {} if self.own_loss else {self.loss: 1.0}

    @model_validator(mode="after")
    def _check(self) -> Distill:
        if self.own_loss and (self.trust != "none" or self.class_trust is not None):
            raise ValueError(
                f"trust and class_trust weigh the pixels of kl, dice and jaccard, and loss is {self.own_loss}: weigh them in it, or leave "
                "them out"
            )
        if self.trust_threshold != USUAL_THRESHOLD and self.trust != "threshold":
            raise ValueError(
                f"trust_threshold is {self.trust_threshold:g}, and trust is {self.trust}: it counts with trust: threshold alone"
            )
        return self


class Student(Section):
    """The network to train."""

    architecture: str | None = Field(None, exclude_if=is_none)
    """`ftunetformer`, `unetformer`, or an architecture of segmentation-models-pytorch (smp)."""
    model: Annotated[str, Field(pattern=OWN_MODEL)] | None = Field(None, exclude_if=is_none)
    """A function or class of your own that builds the network, as `package.module:name`, in place of `architecture`."""
    pretrained: str | None = Field(None, exclude_if=is_none)
    """A folder that transformers' `save_pretrained` wrote, or a repository of its hub, to start from in place of `architecture`."""
    encoder: str | None = None
    """An encoder of smp or timm. `ftunetformer` has its own."""
    encoder_weights: str | None = None
    """A file, or a name known to smp or timm, such as `imagenet`. Null starts from random weights."""
    checkpoint: str | None = None
    """Weights of the whole student to start from."""
    replace_head: bool = False
    """Start from a `checkpoint` with other classes, except for its head (`ftunetformer`, `unetformer`)."""
    num_classes: int | Literal["from classes"] = "from classes"
    """Leave it out. It follows from `classes.names`, and any other number is refused."""
    bands: Choice | None = Field(None, exclude_if=lambda choice: choice is None)
    """Bands that it sees, in its order, as in `teacher`. They need not be the teacher's."""
    normalize: StudentNormalize = Field(default_factory=_usual_normalization)
    """Normalisation like the `teacher`'s, or `pretrained`, the folder's own. For other bands than three, values repeat in turn."""
    options: Options = Field({}, exclude_if=lambda options: not options)
    """Further arguments of the architecture's constructor, as in `teacher`."""

    @field_validator("options")
    @classmethod
    def _refuse_own(cls, options: Options, info: ValidationInfo) -> Options:
        """What an architecture is given otherwise; a callable of the user's own may have arguments of any name."""
        return options if info.data.get("model") is not None else refuse_own(options, SET_BY_STUDENT)

    @property
    def network(self) -> str:
        """The network in words: `unet with resnet18 and options {…}`, `my_package.students:build`."""
        encoder = f" with {self.encoder}" if self.encoder else ""
        return f"{self.architecture or self.model or self.pretrained}{encoder}{options_text(self.options)}"

    @model_validator(mode="after")
    def _check(self) -> Student:
        given = [name for name in KEYS_OF_STUDENT if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "needs one of architecture, model and pretrained to name the network, "
                f"found {' and '.join(given) or 'none'}"
            )
        for name in KEYS_OF_STUDENT["architecture"]:
            if getattr(self, name) and name not in KEYS_OF_STUDENT[given[0]]:
                raise ValueError(f"{name} does not go with {given[0]}: leave it out")
        if self.normalize == "pretrained" and self.pretrained is None:
            raise ValueError("normalize is pretrained, which goes with the key pretrained alone: name the values")
        return self


class Train(Section):
    """The recipe of stage two."""

    epochs: int = Field(45, ge=1)
    """Passes over all tiles."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Ends training after this many optimizer steps, whatever `epochs` says."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = DEFAULT_BATCH_SIZE
    """Crops per batch on each device. `auto` finds the largest batch that fits."""
    effective_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Crops per optimizer step. With `batch_size: auto` the number to reach (4 if null), otherwise only checked."""
    val_batch_size: int = Field(4, ge=1)
    """Validation tiles of one size per batch. Changes no score."""
    crops_per_tile: int = Field(1, ge=1)
    """Crops of each tile per epoch."""
    unlabelled_crops_per_tile: Annotated[int, Field(ge=1)] | None = None
    """Crops of each tile without a mask per epoch. Null takes `crops_per_tile`."""
    lr: float = Field(6e-4, gt=0)
    """Learning rate of everything but the encoder."""
    backbone_lr: float = Field(6e-5, ge=0)
    """Learning rate of the encoder."""
    labelled_loss: dict[str, Weight] = Field(
        USUAL_LABELLED_LOSS, exclude_if=lambda losses: losses == USUAL_LABELLED_LOSS
    )
    """Losses of the labels and their weights, of smp: `ce`, `dice`, `focal`, `jaccard`, `lovasz`, `tversky`."""
    class_weights: Literal["auto"] | dict[str, Weight] | None = Field(None, exclude_if=is_none)
    """Weights of classes in `ce` and `focal`, such as `{Forest: 2.0}`; 1 for the others. `auto` takes them from the training masks."""
    weight_decay: float = Field(2.5e-4, ge=0)
    """Weight decay of AdamW; biases have none."""
    lookahead: bool = False
    """Wrap AdamW in Lookahead (5 steps, share 0.5)."""
    restart_epochs: int = Field(15, ge=1)
    """Epochs in the first cycle of the cosine schedule with warm restarts."""
    restart_mult: int = Field(2, ge=1)
    """Length of each cycle as a multiple of the one before."""
    crop: int = Field(512, ge=32)
    """Side of a training crop in px."""
    scales: list[Annotated[float, Field(gt=0)]] = Field([0.5, 0.75, 1.0, 1.25, 1.5], min_length=1)
    """Scales to draw from, one for each crop."""
    max_class_share: float = Field(0.75, gt=0, le=1)
    """Draw a crop again, up to ten times, while one class has more than this share of its labelled pixels. 1 never does."""
    mosaic: float = Field(0.25, ge=0, le=1)
    """Probability that a crop is a mosaic of four tiles."""
    photometric: float = Field(0.25, ge=0, le=1)
    """Probability that the colours of a crop are changed, those of `data.visible`. Other bands stay as they are."""
    colour_shift: float = Field(0.0, ge=0, le=1, exclude_if=lambda share: share == 0)
    """Probability that gamma, mean and deviation of a crop's visible bands are shifted, as in another scene. The teacher sees the tile."""
    unlabelled_colour_shift: Annotated[float, Field(ge=0, le=1)] | None = Field(None, exclude_if=is_none)
    """The same for crops of tiles without a mask. Null takes `colour_shift`."""
    cutmix: float = Field(0.0, ge=0, le=1, exclude_if=lambda share: share == 0)
    """Probability that a box of a crop shows another tile, with its labels and soft targets."""
    accumulate: int = Field(1, ge=1)
    """Batches per optimizer step."""
    average: Literal["mean", "ema"] | None = Field(None, exclude_if=is_none)
    """Average the weights of the steps: `mean` of the last quarter, or `ema`, which forgets older ones. Scores and exports are of it."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient. Null does not clip."""
    precision: Precision = "auto"
    """Computing precision. `auto` is bf16 on a GPU that supports it natively, else fp32."""
    workers: int = Field(4, ge=0)
    """Data loading processes. 0 loads in the main process. Changes no result."""
    devices: int = Field(1, ge=1)
    """GPUs of this machine, or processes on the CPU, that train together."""
    val_every_epochs: int = Field(1, ge=1)
    """Epochs between validations. The last epoch is always validated."""
    checkpoint_every_steps: int = Field(200, ge=1)
    """Steps between checkpoints. Each epoch ends with one too."""

    @field_validator("labelled_loss", mode="before")
    @classmethod
    def _known_losses(cls, losses: Any) -> Any:
        if isinstance(losses, dict):
            refuse_unknown_losses(losses)
        return losses

    @field_validator("class_weights", mode="before")
    @classmethod
    def _auto_or_weights(cls, value: Any) -> Any:
        refuse_other_weights(value)
        return value

    @field_validator("batch_size", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        if value != "auto" and (not isinstance(value, int) or value < 1):
            raise ValueError(f"expected a whole number from 1 up, or auto, found {value!r}")
        return value

    @property
    def samples_per_step(self) -> int:
        """Samples per optimizer step: `batch_size * accumulate * devices`, or what `batch_size: auto` is to reach."""
        if self.batch_size == "auto":
            return self.effective_batch_size or DEFAULT_BATCH_SIZE
        return self.batch_size * self.accumulate * self.devices

    @model_validator(mode="after")
    def _check(self) -> Train:
        if self.class_weights is not None and not {"ce", "focal"} & self.labelled_loss.keys():
            raise ValueError(
                f"class_weights count in ce and focal, and labelled_loss has {' and '.join(self.labelled_loss)} alone, which weigh all "
                "classes alike: leave class_weights out, or add one of them"
            )
        if self.batch_size == "auto" and self.accumulate != 1:
            raise ValueError(
                f"accumulate is {self.accumulate}, but batch_size: auto computes it: leave it out, and set "
                "effective_batch_size to the number of samples per optimizer step"
            )
        if self.batch_size == "auto" and self.devices > 1:
            raise ValueError(
                f"batch_size: auto measures one device, and devices is {self.devices}: set batch_size to the samples per device"
            )
        if self.effective_batch_size not in (None, self.samples_per_step):
            on_devices = f" x devices {self.devices}" if self.devices > 1 else ""
            raise ValueError(
                f"effective_batch_size is {self.effective_batch_size}, but batch_size {self.batch_size} x accumulate "
                f"{self.accumulate}{on_devices} is {self.samples_per_step}: leave it out, or set batch_size: auto"
            )
        return self
