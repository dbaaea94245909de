"""A student's checkpoint: its weights, all that a resumed run needs, and what it was trained from."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from torch import Tensor, nn

from kdpipe.configs import dump_config, parse_config
from kdpipe.configs.errors import CheckpointError, ConfigError, StaleCache, count_text, summarise
from kdpipe.configs.files import write_atomically
from kdpipe.configs.load import parse_mapping
from kdpipe.configs.schema import Config, MeanStd
from kdpipe.data.declared.scene import count_of
from kdpipe.pipeline.models.container import readable
from kdpipe.pipeline.models.external.own_module import find_source
from kdpipe.pipeline.models.student import STUDENT_PREFIX, untrained_student
from kdpipe.pipeline.models.weights import load_strictly, read_checkpoint
from kdpipe.pipeline.runs.layout import BEST
from kdpipe.pipeline.runs.record import OwnLoss
from kdpipe.pipeline.runs.resumable import changed_keys
from kdpipe.pipeline.runs.trust import require_trust

FORMAT = 1
MAX_MISSING = 2**24  # numbers beyond twice those stored, of a network that is built only to say what does not fit


@dataclass(frozen=True)
class Position:
    """
    How far a run has come: batches and optimizer steps done, the best validation mIoU with its step, and times over all resumes.

    `seconds` is the time spent in steps, waiting for data included, `wall_seconds` that of the whole run, validation and set-up
    included. `seconds_per_step` is the median step since the last start, warm-up left out. `history` holds each validation as
    `record.Validation` reads it.
    """

    batches: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(ge=0)] = 0
    best_miou: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    wall_seconds: float = 0.0
    seconds_per_step: float | None = None
    history: tuple[dict[str, Any], ...] = ()


def _increasing(ends: tuple[float, float]) -> tuple[float, float]:
    if not ends[0] < ends[1]:
        raise ValueError(f"a stretch needs low < high, found {ends[0]:g}, {ends[1]:g}")
    return ends


Ends = Annotated[tuple[FiniteFloat, FiniteFloat], AfterValidator(_increasing)]
"""The values of a band that become 0 and 255."""


class Record(BaseModel):
    """What a checkpoint says of the run that saved it: `config` is its whole configuration, in YAML."""

    model_config = ConfigDict(frozen=True)

    config: str
    mode: str
    fingerprint: str | None
    stretch: list[Ends] | None
    image_colours: list[str] | None = None
    colours: list[str] | None = None  # of `data.bands` alone, in a checkpoint of an earlier version
    class_weights: dict[str, FiniteFloat] | None = None
    class_trust: dict[str, FiniteFloat] | None = None
    own_loss: OwnLoss | None = None
    transformers: str | None = None  # the network of `student.pretrained`: `TransformersStudent.description`
    source_sha256: str | None = None  # of the file that defines `student.model`


@dataclass(frozen=True)
class Averaged:
    """Averaged weights of a student by name, of `steps` steps from number `first` on, with the statistics of its batch norms."""

    state: Mapping[str, Tensor]
    steps: int
    first: int


class Averaging(BaseModel):
    """What a checkpoint says of its averaged weights."""

    model_config = ConfigDict(frozen=True)

    n_averaged: Annotated[int, Field(ge=1)]
    first: Annotated[int, Field(ge=1)]


class Header(BaseModel):
    """
    A student's checkpoint without the state of its optimizer, whose form torch decides.

    `state_dict` is what the student predicts with. Where that is an average, `current_model_state` is what training goes on from, as
    Lightning's `WeightAveraging` names it.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    format: Literal[1]
    kdpipe: Record
    position: Position
    state_dict: dict[str, Tensor]
    current_model_state: dict[str, Tensor] | None = None
    averaging_state: Averaging | None = None

    @property
    def student(self) -> dict[str, Tensor]:
        """The tensors that the student predicts with, by their names in the network."""
        return _own_names(self.state_dict)

    @property
    def trained(self) -> dict[str, Tensor]:
        """The tensors that training goes on from."""
        return self.student if self.current_model_state is None else _own_names(self.current_model_state)

    @property
    def averaged(self) -> Averaged | None:
        """The averaged weights, where there are any."""
        found = self.averaging_state
        return Averaged(self.student, found.n_averaged, found.first) if found else None


def _own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(STUDENT_PREFIX): value for name, value in state.items()}


def is_of_a_student(content: Mapping[str, Any]) -> bool:
    """Whether the content of a checkpoint is one that `save` wrote, damaged or not."""
    found = content.get("format")
    return isinstance(found, int) and found == FORMAT and "kdpipe" in content


def header_of(content: Mapping[str, Any], path: str | Path) -> Header:
    """The validated content of a student's checkpoint; raises `CheckpointError` that names what is missing or of another kind."""
    try:
        return TypeAdapter(Header).validate_python(content)
    except (ValidationError, RecursionError) as err:
        errors = err.errors(include_url=False) if isinstance(err, ValidationError) else []
        found = summarise(
            [f"{'.'.join(map(str, each['loc']))}: {each['msg'].removeprefix('Value error, ')}" for each in errors], 3
        )
        raise CheckpointError(
            f"{path} is not a whole checkpoint of `kdpipe train-student` ({found or 'nested too deeply'}): it is damaged, or was changed "
            "after it was saved. Take another one of the run, or train it again"
        ) from err


def config_in(header: Header, path: str | Path) -> dict[str, Any]:
    """The resolved configuration in a checkpoint, as plain values; raises `ConfigError` where it is not readable YAML."""
    return parse_mapping(header.kdpipe.config, f"the configuration in {path}")


def save(
    path: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    precision_state: Mapping[str, Any],
    position: Position,
    record: Mapping[str, Any],
    averaged: Averaged | None = None,
) -> None:
    """Write a checkpoint, whole or not at all; `record` describes the run: config, mode, fingerprint, stretch, colours, libraries."""
    trained = _prefixed(student.state_dict())
    averages = {}
    if averaged is not None:
        averages = {
            "state_dict": _prefixed(averaged.state),
            "current_model_state": trained,
            "averaging_state": {"n_averaged": averaged.steps, "first": averaged.first},
        }
    content = {
        "format": FORMAT,
        "kdpipe": dict(record),
        "position": asdict(position),
        "state_dict": trained,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "precision": dict(precision_state),
        **averages,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        torch.save(content, file)


def _prefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {STUDENT_PREFIX + name: value for name, value in state.items()}


def network_record(student: nn.Module, config: Config) -> dict[str, str]:
    """What a checkpoint says of a student whose network is not kdpipe's or smp's, beside the configuration."""
    network = getattr(student, "network", None)
    if config.student.pretrained is not None and network is not None:
        return {"transformers": network.description}
    source = find_source(config.student.model) if config.student.model is not None else None
    return {"source_sha256": source.sha256} if source is not None else {}


def source_note(record: Record, config: Config, path: str | Path) -> str:
    """A sentence where the file that defines `student.model` is not the one that a checkpoint was trained with; empty otherwise."""
    source = find_source(config.student.model) if config.student.model is not None else None
    if source is None or record.source_sha256 in (None, source.sha256):
        return ""
    return (
        f"warning: {source.path}, which defines student.model {config.student.model}, has changed since {path} was saved: the network may "
        "compute something else from its weights"
    )


@dataclass(frozen=True)
class Recorded:
    """What a run to resume was begun with: its resolved configuration as plain values, and what else its checkpoint says."""

    config: dict[str, Any]
    record: Record

    def with_its_normalization(self, config: Config) -> Config:
        """The configuration with the run's numbers in place of `student.normalize: pretrained`."""
        if config.student.normalize != "pretrained":
            return config
        found = TypeAdapter(MeanStd).validate_python(self.config["student"]["normalize"])
        return config.model_copy(update={"student": config.student.model_copy(update={"normalize": found})})


def recorded(path: Path) -> Recorded:
    """What a run to resume was begun with; `CheckpointError` where the file is not a whole checkpoint."""
    header = header_of(_content(path), path)
    return Recorded(config_in(header, path), header.kdpipe)


def restore(
    path: Path,
    config: Config,
    fingerprint: str | None,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> tuple[Position, dict[str, Any], Averaged | None]:
    """
    Load a checkpoint into a student, its optimizer and scheduler; returns the position, the precision plugin's state and the average.

    Raises `ConfigError` where the configuration differs in more than `RESUMABLE_KEYS`, `StaleCache` where the cache has another
    fingerprint, `CheckpointError` where the file is not a whole checkpoint of `train-student`.
    """
    content = _content(path)
    header = header_of(content, path)
    changed = changed_keys(config_in(header, path), yaml.safe_load(dump_config(config)))
    if changed:
        raise ConfigError(
            f"{path} was trained with another configuration, which --resume cannot go on with: {summarise(changed)}; "
            "set it back, or start a new run under another name"
        )
    if header.kdpipe.fingerprint != fingerprint:
        raise StaleCache(
            f"{path} was trained from the cache with fingerprint {header.kdpipe.fingerprint}, the cache now has {fingerprint}; "
            "restore that cache, or start a new run under another name"
        )
    load_strictly(student, header.trained, origin=str(path))
    with readable(path, "cannot be resumed from, as the state of its optimizer is damaged"):
        optimizer.load_state_dict(content["optimizer"])
        scheduler.load_state_dict(content["scheduler"])
        return header.position, dict(content["precision"]), header.averaged


@dataclass(frozen=True)
class Trained:
    """
    A trained student in eval mode, float32, on the CPU, with its configuration and the stretch that its images need.

    `colours` are what the training images called `data.bands`, and `image_bands` how many bands they had that are not alpha; None in a
    checkpoint of an earlier version. `file` is the name of the file of a student that kdpipe did not train.
    """

    student: nn.Module
    config: Config
    stretch: list[tuple[float, float]] | None
    position: Position
    colours: list[str] | None = None
    image_bands: int | None = None
    file: str | None = None

    @property
    def description(self) -> str:
        """The student in words, for tables."""
        return self.file or f"{self.config.name} after step {self.position.steps}"

    def alone(self) -> Trained:
        """The same student where images are read for it alone: `data.bands` are just those that it sees, in its order."""
        data, student = self.config.data, self.config.student
        places = data.places(student.bands)
        if places == data.places(None):
            return self
        own = data.model_copy(update={"bands": data.numbers(student.bands), "visible": None})
        config = self.config.model_copy(update={"data": own, "student": student.model_copy(update={"bands": None})})
        stretch = self.stretch and [self.stretch[place] for place in places]
        colours = self.colours and [self.colours[place] for place in places]
        return replace(self, config=config, stretch=stretch, colours=colours)


def load_trained(path: str | Path, say: Callable[[str], None] = lambda line: None) -> Trained:
    """
    The student in a checkpoint of `train-student`, built from the configuration in it.

    A module that the checkpoint names as `student.model` is imported only within `trust.trusting_code`; `say` is called with a warning if
    its file has changed. Raises `CheckpointError` where the file is not such a checkpoint, or names a module that is not to be imported,
    and `ConfigError` where its configuration is not valid today.
    """
    if Path(path).is_dir():
        raise CheckpointError(f"{path} is a folder, and a checkpoint is a file in it, such as {Path(path) / BEST}")
    content = read_checkpoint(path)
    if not is_of_a_student(content):
        raise CheckpointError(
            f"{path} is not a checkpoint of `kdpipe train-student` (format {reprlib.repr(content.get('format'))}), and does not say what "
            "network, classes and normalisation its weights are for. For those of a student of another origin, add -c CONFIG, which does"
        )
    header = header_of(content, path)
    record = header.kdpipe
    config = parse_config(config_in(header, path), origin=f"the configuration in {path}")
    # timm would load settings, and with some of them code, from a hub (tu-hf-hub:…) or a folder (tu-local-dir:…).
    if ":" in (config.student.encoder or ""):
        raise CheckpointError(
            f"{path} names the encoder {config.student.encoder!r}, which timm would fetch from elsewhere: a checkpoint may only name "
            "encoders that are installed"
        )
    stretch, called, bands = record.stretch, record.image_colours, config.data.bands
    if (stretch is not None and len(stretch) != len(bands)) or (called is not None and len(called) < max(bands)):
        raise CheckpointError(
            f"{path} does not fit its own configuration: its stretch or its bands are not those of {list(bands)}"
        )
    if config.student.model is not None:
        require_trust(config.student.model, path)
        if note := source_note(record, config, path):
            say(note)
    if config.student.pretrained is not None and record.transformers is None:
        raise CheckpointError(
            f"{path} does not describe the network of transformers that it was trained with: it is damaged"
        )
    student = _built(config, record.transformers, header.student, path)
    load_strictly(student, header.student, origin=str(path))
    if called is not None and len(called) < max(config.data.bands):
        raise CheckpointError(
            f"{path} names {count_text(len(called), 'bands')} of its images, and its data.bands are {list(config.data.bands)}"
        )
    return Trained(
        student=student.eval().requires_grad_(False),
        config=config,
        stretch=stretch,
        position=header.position,
        colours=[called[band - 1] for band in bands] if called else record.colours,
        image_bands=count_of(called) if called else None,
    )


def _built(config: Config, description: str | None, state: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """The student that a configuration describes; raises `CheckpointError` where it is far larger than the weights beside it."""
    with readable(Path(path), "describes a network that cannot be built"):
        try:
            with torch.device("meta"):  # holds no values
                declared = sum(
                    tensor.numel() for tensor in untrained_student(config, description).state_dict().values()
                )
        except (RuntimeError, ConfigError):  # the Mix Transformers, and others, compute with values during construction
            declared = 0
        stored = sum(tensor.numel() for tensor in state.values())
        if declared > 2 * stored + MAX_MISSING:
            raise CheckpointError(
                f"{path} does not fit its own configuration, which describes a network of {declared} numbers, and {stored} are stored"
            )
        return untrained_student(config, description)


def _content(path: Path) -> dict[str, Any]:
    content = read_checkpoint(path)
    if not is_of_a_student(content):
        raise CheckpointError(
            f"{path} is not a checkpoint that `kdpipe train-student` can resume (format {reprlib.repr(content.get('format'))})"
        )
    return content
