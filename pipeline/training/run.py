"""Stage two: training a student from the cache, with the live teacher, or without one. This file sets a run up; `loop.py` runs it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn

from kdpipe.cache.manifest import MANIFEST_NAME
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.storage.lock import folder_lock
from kdpipe.configs.errors import ConfigError, DataError, NoLocks
from kdpipe.configs.schema import Config, DistillMode
from kdpipe.data.dataset import TrainTiles, ValTiles
from kdpipe.data.declared.scene import colours_of
from kdpipe.data.rasters import Stretch, image_size
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import Tile, list_tiles
from kdpipe.pipeline.distributed import (
    computed_precision,
    end_ranks,
    freeze_unused,
    is_further_process,
    launch,
    open_fabric,
)
from kdpipe.pipeline.inputs import check_headers, check_labels
from kdpipe.pipeline.memory import fits_in_memory, training_advice
from kdpipe.pipeline.models.limits.training import refuse_crops, refuse_tiles
from kdpipe.pipeline.models.student import bands_of, initial_student, untrained_student, with_own_normalization
from kdpipe.pipeline.progress import Progress, Silent, at_once
from kdpipe.pipeline.runs import checkpoint, layout
from kdpipe.pipeline.runs.checkpoint import Position, Recorded
from kdpipe.pipeline.runs.trained_on import changes_since, note_tiles, write_tiles
from kdpipe.pipeline.training.averaging import WeightAverage
from kdpipe.pipeline.training.batch_size import resolve_batch_size
from kdpipe.pipeline.training.loaders import batches_per_epoch, steps_in, train_loader, val_loader
from kdpipe.pipeline.training.logs import BoardPictures
from kdpipe.pipeline.training.loop import NOTHING_DONE, Batches, Learner, Loop
from kdpipe.pipeline.training.objective import Objective, changed_loss_note, class_trust_of, class_weights_of
from kdpipe.pipeline.training.optimizer import make_optimizer
from kdpipe.pipeline.training.summary import Summary
from kdpipe.pipeline.training.targets import Targets, open_targets, training_samples

LEAVING_SECONDS = 3.0  # for the other processes of a run to end by themselves, as they do where all were stopped


def train(
    config: Config,
    device: torch.device,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Summary:
    """
    Train a student as configured; checkpoints, logs and the resolved config are written as it goes.

    `resume` continues from the last checkpoint if there is one; without it, an existing run is refused unless `overwrite`.
    Raises `CacheLocked` while another process trains a run of this name, `CacheError` (before the first step) if the cache cannot be
    used, and `TrainingDiverged` if the loss diverges. Once `stop` is set, saves a checkpoint and raises `Interrupted`.
    """
    advice = training_advice(config, computed_precision(config, device))
    told = Silent() if progress is None or is_further_process(config) else progress
    with _only_writer(config, told), fits_in_memory("while training", advice, workers=config.train.workers):
        stop = stop or threading.Event()
        # The first process ends the others.
        with nullcontext() if is_further_process(config) else at_once(stop, NOTHING_DONE):
            loop = _set_up(config, device, told, stop, resume=resume, overwrite=overwrite)
        try:
            summary = loop.run()
        except BaseException:
            with suppress(Exception):  # the error that ended the run says more than logs that cannot be closed
                loop.logs.close()
            end_ranks(loop.learner.fabric, LEAVING_SECONDS)
            raise
        finally:
            loop.batches.end_workers()
        loop.logs.close()
        return summary


def with_mode(config: Config, mode: DistillMode | None) -> Config:
    """
    The configuration with another `distill.mode`, as `--kd` asks.

    A mode other than the config's own is added to the run's name, so that runs to be compared do not overwrite each other.
    """
    if mode is None or mode == config.distill.mode:
        return config
    distill = config.distill.model_copy(update={"mode": mode})
    return config.model_copy(update={"distill": distill, "name": f"{config.name}-{mode}"})


@contextmanager
def _only_writer(config: Config, progress: Progress) -> Iterator[None]:
    """Hold the run's folder, which the first process of a run does for all of them; without locks, warn and go on."""
    with ExitStack() as held:
        try:
            if not is_further_process(config):
                held.enter_context(folder_lock(layout.weights_folder(config)))
        except NoLocks as err:
            progress.say(f"warning: {err}; until then, start no second run of this name")
        yield


def _set_up(
    config: Config, device: torch.device, progress: Progress, stop: threading.Event, *, resume: bool, overwrite: bool
) -> Loop:
    started = time.perf_counter()
    folder = layout.weights_folder(config)
    resume = _resumes(folder, progress, resume=resume, overwrite=overwrite)
    ranks, online = config.train.devices, config.distill.mode == "online"
    if ranks > 1 and online:
        raise ConfigError(
            f"distill.mode: online trains on one device, and train.devices is {ranks}; every process would load a teacher of its own"
        )
    tiles = list_tiles(config.data, "train", labelled_only=config.distill.mode == "none")
    val_tiles = _validation_tiles(config)
    resumed = (folder / layout.LAST).stat().st_mtime if resume else None
    if not is_further_process(config):
        _check_headers(config, tiles, val_tiles, progress, resumed)
    every_tile = list_tiles(config.data, "train")
    if config.distill.mode == "none" and (without_mask := len(every_tile) - len(tiles)):
        progress.say(
            f"note: an epoch is as long as with a teacher: the labelled tiles, {len(tiles)}, take the turns of those without a mask, "
            f"{without_mask}"
        )
    stretch = resolve_stretch(config.data, every_tile)
    targets = open_targets(config, tiles, stretch, device)
    if targets.note:
        progress.say(targets.note)
    if not is_further_process(config):  # after the cache: where both tell of another configuration, it names the key
        check_labels(config, tiles, val_tiles, progress, since=resumed)
    if online and config.train.workers:
        progress.say("online: the teacher predicts in the main process, so train.workers is 0")

    fabric = open_fabric(config, device, ranks)
    try:
        if ranks > 1:
            # Lightning starts the other processes here. Each runs the command from the top to this line, so no checkpoint may be
            # written before it: `_resumes` would take it for an earlier run's.
            launch(fabric)
        return _loop_on(fabric, config, tiles, val_tiles, stretch, targets, progress, stop, started, folder, resume)
    except BaseException:
        end_ranks(fabric, 0)
        raise


def _loop_on(
    fabric: Fabric, config: Config, tiles: list[Tile], val_tiles: list[Tile], stretch: Stretch, targets: Targets, progress: Progress,
    stop: threading.Event, started: float, folder: Path, resume: bool,
) -> Loop:  # fmt: skip
    """The loop on what the first part of the set-up has checked and opened, with the student where it was saved, if it resumes."""
    device = fabric.device
    recorded = checkpoint.recorded(folder / layout.LAST) if resume else None
    config = recorded.with_its_normalization(config) if recorded else with_own_normalization(config)
    if recorded and (note := checkpoint.source_note(recorded.record, config, folder / layout.LAST)):
        progress.say(note)
    config = resolve_batch_size(config, device, progress, recorded.config if recorded else None)
    # A copy of the source, so that a live teacher's time for other than training is not counted as training time.
    shown = training_samples(config, tiles, stretch, copy(targets.source))
    objective = _objective(config, fabric, tiles, shown, progress, recorded)
    learner = _build_learner(config, fabric, device, val_tiles, objective, progress, recorded)
    position, averaged = Position(), None
    if resume:
        position, precision_state, averaged = checkpoint.restore(
            folder / layout.LAST, config, targets.fingerprint, learner.student, learner.optimizer, learner.scheduler
        )
        fabric.strategy.precision.load_state_dict(precision_state)
        progress.say(f"resuming after step {position.steps}")

    validation = ValTiles(val_tiles, config, stretch)
    batches = _load_batches(config, fabric, tiles, validation, stretch, targets, position.batches)
    if config.train.average is not None:
        images = training_samples(config, tiles, stretch, None)
        average = WeightAverage(learner.student, config, images, batches.total_steps, device, fabric)
        if anew := average.restore(averaged):
            progress.say(anew)
        learner = replace(learner, average=average)
    pictures = BoardPictures(config, shown, validation, batches.total_steps)
    if fabric.is_global_zero:
        noted = note_tiles({"train": tiles, "val": val_tiles})
        if resume:
            for line in changes_since(folder, noted, images_are_known=targets.fingerprint is not None):
                progress.say(line)
        write_tiles(folder, noted)
    colours = colours_of(tiles[0].image, config.data.alpha)  # all tiles agree on those that are read
    return Loop(
        config, device, folder, learner, batches, targets, stretch, colours, pictures, position, progress, stop, started
    )


def _resumes(folder: Path, progress: Progress, *, resume: bool, overwrite: bool) -> bool:
    """Whether there is a checkpoint to resume; refuses to write over a run that nobody asked to replace."""
    if not (folder / layout.LAST).exists():
        if resume:
            progress.say(f"nothing to resume in {folder}: starting at the first step")
        return False
    if not resume and not overwrite:
        raise ConfigError(
            f"{folder} holds a run already; go on with --resume, replace it with --overwrite, "
            "or choose another name (--set name=…)"
        )
    return resume


def _check_headers(
    config: Config, tiles: list[Tile], val_tiles: list[Tile], progress: Progress, resumed: float | None
) -> None:
    """Check headers, after an earlier check (of stage one, or before the checkpoint of time `resumed`) of what has changed since."""
    precomputed = None
    if config.distill.mode == "cached":
        storage = open_storage(config.cache.path)
        manifest = storage.info(MANIFEST_NAME)
        precomputed = manifest.modified if manifest else None
    check_headers(config, tiles, val_tiles, progress, since=resumed or precomputed, val_since=resumed)


def _validation_tiles(config: Config) -> list[Tile]:
    """The labelled tiles of `data.val`; `DataError` where it has tiles and none of them is labelled."""
    tiles = list_tiles(config.data, "val") if config.data.val else []
    labelled = [tile for tile in tiles if tile.mask is not None]
    if tiles and not labelled:
        raise DataError(f"data.val has no labelled tile to validate on: {config.data.val}")
    return labelled


def _objective(
    config: Config,
    fabric: Fabric,
    tiles: list[Tile],
    samples: TrainTiles,
    progress: Progress,
    recorded: Recorded | None,
) -> Objective:
    """The loss of a run, with the weights of classes that it was begun with, if it resumes; the first process counts them for all."""
    before = recorded.record if recorded else None
    weights = trust = None
    if fabric.is_global_zero:
        weights = class_weights_of(config, tiles, before.class_weights if before else None, progress)
        trust = class_trust_of(config, samples, before.class_trust if before else None, progress)
    objective = Objective(config, fabric.device, fabric.broadcast(weights), fabric.broadcast(trust))
    if note := changed_loss_note(before, objective.own_loss):
        progress.say(note)
    return objective


def starting_student(config: Config, progress: Progress, recorded: Recorded | None) -> nn.Module:
    """The student with its initial weights, or with random ones for those of a run to resume."""
    if recorded:
        return untrained_student(config, recorded.record.transformers, progress.say)
    return initial_student(config, progress.say)


def _build_learner(
    config: Config, fabric: Fabric, device: torch.device, val_tiles: list[Tile], objective: Objective, progress: Progress,
    recorded: Recorded | None,
) -> Learner:  # fmt: skip
    """The student with the initial weights of `config.seed`, or for those of a run to resume, and its optimizer, on the device."""
    torch.manual_seed(config.seed)
    # 20 to 40 % faster on CPUs, and the layout of tensor cores
    student: Any = starting_student(config, progress, recorded).to(memory_format=torch.channels_last)
    assert config.train.batch_size != "auto"  # it is resolved
    together = config.train.devices if device.type == "cuda" else 1  # whose batch norms are one
    refuse_crops(student, config, config.train.batch_size * together)
    refuse_tiles(student, config, lambda: [(tile.id, image_size(tile.image)) for tile in val_tiles])
    if config.train.devices > 1:
        freeze_unused(
            student.to(device), torch.rand(2, bands_of(config), config.train.crop, config.train.crop, device=device)
        )
    if config.train.devices > 1 and has_batch_norm(student):
        if device.type == "cuda":
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
        else:
            progress.say(
                "note: on the CPU each process normalises its own samples, and the batch norms' statistics of the first one are saved"
            )
    optimizer = make_optimizer(student, config.train)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, T_0=config.train.restart_epochs, T_mult=config.train.restart_mult
    )
    # Before a checkpoint is restored: the optimizer's state is loaded to the device where its parameters are by then.
    model, wrapped_optimizer = fabric.setup(student, optimizer)
    return Learner(fabric, student, objective, optimizer, scheduler, model, wrapped_optimizer)


def has_batch_norm(student: nn.Module) -> bool:
    """Whether the samples of a batch affect each other in a student."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in student.modules())


def _load_batches(
    config: Config, fabric: Fabric, tiles: list[Tile], validation: ValTiles, stretch: Stretch, targets: Targets, start: int
) -> Batches:  # fmt: skip
    """Loaders of this rank's part of the training batches from number `start` on, and of the validation tiles."""
    samples = training_samples(config, tiles, stretch, targets.source)
    per_epoch = batches_per_epoch(config, len(samples))
    workers = 0 if config.distill.mode == "online" else config.train.workers
    rank, ranks, pin = fabric.global_rank, config.train.devices, fabric.device.type == "cuda"
    sizes_HW = [image_size(tile.image) for tile in validation.tiles]
    train_batches, val_batches = (
        fabric.setup_dataloaders(loader, use_distributed_sampler=False)
        for loader in (
            train_loader(config, samples, start, workers, rank, ranks, pin=pin),
            val_loader(config, validation, sizes_HW, workers, rank, ranks),
        )
    )
    return Batches(train_batches, val_batches if sizes_HW else None, len(tiles), per_epoch, steps_in(config, per_epoch))
