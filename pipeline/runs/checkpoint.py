"""A student's checkpoint: its weights, all that a resumed run needs, and what it was trained from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from kdpipe.configs import dump_config, parse_config
from kdpipe.configs.errors import CheckpointError, ConfigError, StaleCache, summarise
from kdpipe.configs.files import write_atomically
from kdpipe.configs.schema import Config
from kdpipe.data.declared.scene import count_of
from kdpipe.pipeline.models.student import STUDENT_PREFIX, build_student
from kdpipe.pipeline.models.weights import load_strictly, read_checkpoint
from kdpipe.pipeline.runs.layout import BEST

FORMAT = 1
# Keys that may differ when a run is resumed: they change how long it trains or where its data lie, not what is computed.
RESUMABLE_KEYS = (
    "train.epochs",
    "train.max_steps",
    "train.workers",
    "train.effective_batch_size",  # the product of two keys that must not differ
    "train.val_batch_size",
    "train.checkpoint_every_steps",
    "cache.path",
)


@dataclass(frozen=True)
class Position:
    """
    How far a run has come: batches and optimizer steps done, the best validation mIoU with its step, and times over all resumes.

    `seconds` is the time spent in steps, waiting for data included, `wall_seconds` that of the whole run, validation and set-up
    included. `seconds_per_step` is the median step since the last start, warm-up left out. `history` holds each validation as
    `record.Validation` reads it.
    """

    batches: int = 0
    steps: int = 0
    best_miou: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    wall_seconds: float = 0.0
    seconds_per_step: float | None = None
    history: tuple[dict[str, Any], ...] = ()


def save(
    path: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    precision_state: Mapping[str, Any],
    position: Position,
    record: Mapping[str, Any],
) -> None:
    """Write a checkpoint, whole or not at all; `record` describes the run: config, mode, fingerprint, stretch, colours, libraries."""
    content = {
        "format": FORMAT,
        "kdpipe": dict(record),
        "position": asdict(position),
        "state_dict": {STUDENT_PREFIX + name: value for name, value in student.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "precision": dict(precision_state),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        torch.save(content, file)


def recorded_config(path: Path) -> dict[str, Any]:
    """The resolved configuration in a checkpoint, as plain values; `CheckpointError` where the file is not a whole checkpoint."""
    config: dict[str, Any] = yaml.safe_load(_content(path)["kdpipe"]["config"])
    return config


def restore(
    path: Path,
    config: Config,
    fingerprint: str | None,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> tuple[Position, dict[str, Any]]:
    """
    Load a checkpoint into a student, its optimizer and scheduler; returns the position and the precision plugin's state.

    Raises `ConfigError` where the configuration differs in more than `RESUMABLE_KEYS`, `StaleCache` where the cache has another
    fingerprint, `CheckpointError` where the file is not a whole checkpoint of `train-student`.
    """
    content = _content(path)
    recorded = content["kdpipe"]
    changed = changed_keys(yaml.safe_load(recorded["config"]), yaml.safe_load(dump_config(config)))
    if changed:
        raise ConfigError(
            f"{path} was trained with another configuration, which --resume cannot go on with: {summarise(changed)}; "
            "set it back, or start a new run under another name"
        )
    if recorded["fingerprint"] != fingerprint:
        raise StaleCache(
            f"{path} was trained from the cache with fingerprint {recorded['fingerprint']}, the cache now has {fingerprint}; "
            "restore that cache, or start a new run under another name"
        )
    state: dict[str, Tensor] = content["state_dict"]
    load_strictly(
        student, {name.removeprefix(STUDENT_PREFIX): value for name, value in state.items()}, origin=str(path)
    )
    optimizer.load_state_dict(content["optimizer"])
    scheduler.load_state_dict(content["scheduler"])
    position = content["position"]
    return Position(**{**position, "history": tuple(position["history"])}), content["precision"]


@dataclass(frozen=True)
class Trained:
    """
    A trained student in eval mode, float32, on the CPU, with its configuration and the stretch that its images need.

    `colours` are what the training images called `data.bands`, and `image_bands` how many bands they had that are not alpha; None in a
    checkpoint of an earlier version.
    """

    student: nn.Module
    config: Config
    stretch: list[tuple[float, float]] | None
    position: Position
    colours: list[str] | None = None
    image_bands: int | None = None

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


def load_trained(path: str | Path) -> Trained:
    """
    The student in a checkpoint of `train-student`, built from the configuration in it.

    Raises `CheckpointError` where the file is not such a checkpoint, `ConfigError` where its configuration is not valid today.
    """
    if Path(path).is_dir():
        raise CheckpointError(f"{path} is a folder, and a checkpoint is a file in it, such as {Path(path) / BEST}")
    content = read_checkpoint(path)
    if content.get("format") != FORMAT or "kdpipe" not in content:
        raise CheckpointError(
            f"{path} is not a checkpoint of `kdpipe train-student` (format {content.get('format')!r}), and does not say what "
            "network, classes and normalisation its weights are for"
        )
    recorded = content["kdpipe"]
    config = parse_config(yaml.safe_load(recorded["config"]), origin=f"the configuration in {path}")
    # timm would load settings, and with some of them code, from a hub (tu-hf-hub:…) or a folder (tu-local-dir:…).
    if ":" in (config.student.encoder or ""):
        raise CheckpointError(
            f"{path} names the encoder {config.student.encoder!r}, which timm would fetch from elsewhere: a checkpoint may only name "
            "encoders that are installed"
        )
    student = build_student(
        config.student.architecture,
        len(config.classes.names),
        in_channels=len(config.data.places(config.student.bands)),
        encoder=config.student.encoder,
        options=config.student.options,
    )
    state = {name.removeprefix(STUDENT_PREFIX): value for name, value in content["state_dict"].items()}
    load_strictly(student, state, origin=str(path))
    stretch, called = recorded["stretch"], recorded.get("image_colours")
    return Trained(
        student=student.eval().requires_grad_(False),
        config=config,
        stretch=[(low, high) for low, high in stretch] if stretch else None,
        position=Position(**content["position"]),
        colours=[called[band - 1] for band in config.data.bands] if called else recorded.get("colours"),
        image_bands=count_of(called) if called else None,
    )


def _content(path: Path) -> dict[str, Any]:
    content = read_checkpoint(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a checkpoint that `kdpipe train-student` can resume (format {content.get('format')!r})"
        )
    return content


def changed_keys(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """`key: was a, is b` for every dotted key in which two resolved configurations differ, `RESUMABLE_KEYS` excepted."""
    before, after = flat_keys(recorded), flat_keys(current)
    return [
        f"{key}: was {before.get(key)!r}, is {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if key not in RESUMABLE_KEYS and before.get(key) != after.get(key)
    ]


def flat_keys(content: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping flattened to dotted keys: `{"train": {"lr": 1}}` becomes `{"train.lr": 1}`."""
    if not isinstance(content, Mapping) or not content:
        return {prefix: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= flat_keys(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
