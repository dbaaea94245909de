"""
The loop of stage two: steps, validations, checkpoints and logs of a run that `run.py` has set up.

Lightning Fabric provides device, precision and gradients. The order of the work is our own, because a run that is resumed in the
middle of an epoch must reach the very weights of an uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from kdpipe.configs import dump_config
from kdpipe.configs.errors import Interrupted
from kdpipe.configs.schema import Config
from kdpipe.data.rasters import Stretch
from kdpipe.pipeline.distributed import Alone, any_rank, computed_precision
from kdpipe.pipeline.evaluation.confusion import Scores
from kdpipe.pipeline.losses import LossTerms, mean_terms
from kdpipe.pipeline.memory import fits_in_memory, training_advice
from kdpipe.pipeline.models.normalize import student_inputs
from kdpipe.pipeline.precompute.worth import worth_of_run
from kdpipe.pipeline.progress import Progress, at_once
from kdpipe.pipeline.runs import checkpoint, layout
from kdpipe.pipeline.runs.checkpoint import Averaged, Position
from kdpipe.pipeline.runs.record import CacheUsed, Run, Validation, paces_of_other_modes, write_run
from kdpipe.pipeline.training.averaging import WeightAverage
from kdpipe.pipeline.training.divergence import growth_hint, refuse_divergence
from kdpipe.pipeline.training.loaders import OnlineTargets, end_workers, unpacked
from kdpipe.pipeline.training.logs import BoardPictures, Logs
from kdpipe.pipeline.training.objective import Objective
from kdpipe.pipeline.training.summary import Summary
from kdpipe.pipeline.training.targets import Targets
from kdpipe.pipeline.training.validation import batch_size_text, validate
from kdpipe.pipeline.versions import library_versions

NOTHING_DONE = "stopped before a step was made; run the same command again"
WARM_UP_STEPS = 3  # left out of the time per step: allocations, kernel choices, workers starting


@dataclass(frozen=True)
class Learner:
    """A student with its loss, optimizer and schedule; `model` and `wrapped_optimizer` are student and optimizer as Fabric wraps them."""

    fabric: Fabric
    student: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    model: Any
    wrapped_optimizer: Any
    average: WeightAverage | None = None


@dataclass(frozen=True)
class Batches:
    """Batches of `tiles` training tiles from a run's position on, and of whole validation tiles (None without `data.val`)."""

    train: Any
    val: Any
    tiles: int
    per_epoch: int
    total_steps: int

    def end_workers(self) -> None:
        """End the processes that load batches."""
        for batches in filter(None, (self.train, self.val)):
            end_workers(batches._dataloader)


class Loop:
    """
    One run of stage two, from the `position` of its set-up to its summary.

    Args:
        config: with numbers for `train.batch_size` and `train.accumulate`.
        folder: for checkpoints and `run.json`.
        stretch: of 16-bit images, recorded with the weights.
        colours: what the training images call their bands, recorded with the weights.
        stop: once set, the run saves a checkpoint after the current step and raises `Interrupted`.
        started: `time.perf_counter()` when the run's set-up began.
    """

    def __init__(
        self, config: Config, device: torch.device, folder: Path, learner: Learner, batches: Batches, targets: Targets,
        stretch: Stretch, colours: list[str], pictures: BoardPictures, position: Position, progress: Progress, stop: threading.Event,
        started: float,
    ) -> None:  # fmt: skip
        self.config, self.device, self.folder, self.learner, self.batches = config, device, folder, learner, batches
        self.position, self._targets, self._pictures = position, targets, pictures
        self._progress, self._stop = progress, stop
        self._started = started - position.wall_seconds  # as if the run had never been interrupted
        self._precision = computed_precision(config, device)
        self._advice = training_advice(config, self._precision)
        self._record = {
            "config": dump_config(config),
            "mode": config.distill.mode,
            "fingerprint": targets.fingerprint,
            "stretch": [list(pair) for pair in stretch] if stretch else None,
            "image_colours": colours,
            "libraries": library_versions(),
            **checkpoint.network_record(learner.student, config),
            **learner.objective.record(),
        }
        self._accumulated: list[LossTerms] = []
        self._step_seconds: list[float] = []
        self.logs = Logs(config)
        self.summary = Summary(
            name=config.name,
            mode=config.distill.mode,
            weights=str(folder),
            logs=self.logs.folder,
            fingerprint=targets.fingerprint,
            limit=config.data.limit,
        )

    def run(self) -> Summary:
        """Train to the last step, validating and saving on the way."""
        if self.learner.fabric.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / layout.CONFIG).write_text(dump_config(self.config), encoding="utf-8")
        title, total = f"student ({self.config.distill.mode})", self.batches.total_steps
        with self._progress.bar(title, total, "steps", self.position.steps) as advance:
            self._catch_up()
            clock = time.perf_counter()
            for batch in self._batches_as_they_come() if self.position.steps < total else ():
                terms = self._train_batch(batch)
                if terms is None:
                    continue
                self._log_step(terms, time.perf_counter() - clock)
                advance(1, loss=self.summary.losses[-1])
                self._end_step()
                if self.position.steps >= total:
                    break
                clock = time.perf_counter()
        if not self.summary.final:
            self._validate()
        if hint := growth_hint(self.summary.losses, self.config, self._precision):
            self._progress.say(hint)
        return self._summarised()

    def _batches_as_they_come(self) -> Iterator[dict[str, Tensor]]:
        """The batches of this rank. Waiting for one, such as the first, for which workers must start, is a point to stop at."""
        batches = iter(self.batches.train)
        while True:
            try:
                # Half of a step cannot be saved, and other ranks would wait for this one in vain.
                with nullcontext() if self._accumulated else self._stops_at_once(self._stopped_text()):
                    batch = next(batches, None)
            except Interrupted:
                if self.summary.losses:
                    self._save_all()
                raise
            if batch is None:
                return
            yield batch

    def _stops_at_once(self, so_far: str) -> AbstractContextManager[None]:
        """A block that a signal may end, where this process decides alone: in a run on several devices before its first step."""
        alone = self.config.train.devices == 1 or not self.summary.losses
        return at_once(self._stop, so_far) if alone and self.learner.fabric.is_global_zero else nullcontext()

    def _stopped_text(self) -> str:
        if not self.summary.losses:
            return NOTHING_DONE
        return (
            f"stopped after step {self.position.steps} of {self.batches.total_steps}; the run is saved in {self.folder}. Run the same "
            "command with --resume to go on"
        )

    def _train_batch(self, batch: dict[str, Tensor]) -> LossTerms | None:
        """Train on one batch; returns the mean loss terms of the optimizer step that it completes, None if it completes none."""
        config, learner = self.config, self.learner
        # Gradients are summed over the ranks once a step, in its last batch.
        last = len(self._accumulated) + 1 == config.train.accumulate
        unsynced = learner.fabric.no_backward_sync(learner.model, enabled=not last and config.train.devices > 1)
        # Dropout has a seed of its own in every batch: the same with and without a teacher, resumed or not.
        torch.manual_seed(config.seed * 1_000_003 + self.position.batches + learner.fabric.global_rank * 7_368_787)
        learner.student.train()
        with fits_in_memory(f"while training on {batch_size_text(batch, 'crop')}", self._advice), unsynced:
            output = learner.model(student_inputs(batch["image"], config))
            target = unpacked(batch["target"], batch["inside"]) if "target" in batch else None
            terms = learner.objective(output, batch["mask"], batch["inside"], target, batch.get("entropy_error"))
            learner.fabric.backward(terms.total / config.train.accumulate)
            if last:
                self._update_weights()
            # This check makes the CPU wait for the GPU, so it comes after the update. Nothing is saved in between, so diverged
            # weights never reach a checkpoint.
            refuse_divergence(terms, target, self.position.steps + 1, config, self._precision, self.folder)
            if last and learner.average is not None:
                learner.average.update(learner.student, self.position.steps + 1)
        self._accumulated.append(terms)
        self.position = replace(self.position, batches=self.position.batches + 1)
        if not last:
            return None
        terms = mean_terms(self._accumulated)
        self._accumulated.clear()
        return terms

    def _update_weights(self) -> None:
        learner, clip_norm = self.learner, self.config.train.clip_norm
        if clip_norm is not None:
            learner.fabric.clip_gradients(
                learner.model, learner.wrapped_optimizer, max_norm=clip_norm, error_if_nonfinite=False
            )
        learner.wrapped_optimizer.step()
        learner.wrapped_optimizer.zero_grad()

    def _log_step(self, terms: LossTerms, seconds: float) -> None:
        self._step_seconds.append(seconds)
        self.position = replace(self.position, steps=self.position.steps + 1, seconds=self.position.seconds + seconds)
        self.summary.losses.append(terms.total.item())
        groups = self.learner.optimizer.param_groups
        self._log(
            {
                "train_loss": self.summary.losses[-1],
                "train_hard_loss": terms.hard.item(),
                "train_kd_loss": terms.soft.item(),
                "lr_encoder": groups[0]["lr"],
                "lr": groups[-1]["lr"],
                "seconds_per_step": seconds,
            }
        )

    def _end_step(self) -> None:
        """Move the schedule at the end of an epoch, validate and save where they are due, and stop if asked to."""
        train, steps, total = self.config.train, self.position.steps, self.batches.total_steps
        into_epoch = self.position.batches % self.batches.per_epoch
        if into_epoch == 0:
            self.learner.scheduler.step()
        stopping = any_rank(self._stop.is_set(), self.device)  # all ranks stop after the same step
        if self._is_validation_due():
            if self.batches.val is not None:
                # A tile that cannot be read, or too little memory, must not cost the epoch.
                self._save_all()
            self._validate()
        if steps >= total or into_epoch == 0 or stopping or steps % train.checkpoint_every_steps == 0:
            self._save_all()
        if stopping and steps < total:
            raise Interrupted(self._stopped_text())

    def _is_validation_due(self) -> bool:
        epochs, into_epoch = divmod(self.position.batches, self.batches.per_epoch)
        is_over = self.position.steps >= self.batches.total_steps
        return is_over or (into_epoch == 0 and epochs % self.config.train.val_every_epochs == 0)

    def _catch_up(self) -> None:
        """Validate first if the run ended between a checkpoint and the validation that follows it."""
        steps, noted = self.position.steps, {past["steps"] for past in self.position.history}
        is_open = 0 < steps < self.batches.total_steps and steps not in noted
        if is_open and self.batches.val is not None and self._is_validation_due():
            self._validate()
            self._save(layout.LAST)

    def _validate(self) -> None:
        # Not through the DDP wrapper: it hangs unless all ranks validate the same number of batches.
        learner = self.learner
        raw = learner.model if self.config.train.devices == 1 else Alone(learner.student, learner.fabric)
        has_average = self._averaged() is not None
        model = learner.average.model if learner.average and has_average else raw
        if self.batches.val is not None:
            # The run is saved, so a stop need not wait for the scores: a resumed run validates first.
            with self._stops_at_once(self._stopped_text()):
                found, without_average = self._scores(model), self._scores(raw) if has_average else None
            self._note(found, without_average)
        # After the scores, because the CSV logger warns if TensorBoard's file is in the folder before its own.
        if learner.fabric.is_global_zero:
            self._pictures.show(self.logs.tensorboard, model, self.device, self.position.steps)

    def _scores(self, model: Any) -> Scores:
        found = validate(model, self.batches.val, self.config, self.device, self._stop)
        if found is None:
            raise Interrupted(self._stopped_text())
        return found

    def _averaged(self) -> Averaged | None:
        return self.learner.average.state() if self.learner.average else None

    def _note(self, scores: Scores, raw: Scores | None) -> None:
        """Record a validation in `run.json` and the logs, and save the weights if they are the best so far."""
        figures = {"miou": scores.miou, "overall_accuracy": scores.overall_accuracy}
        found = Validation(
            steps=self.position.steps,
            seconds=self.position.seconds,
            **{name: None if math.isnan(value) else value for name, value in figures.items()},
            iou=scores.iou,
            raw_miou=None if raw is None or math.isnan(raw.miou) else raw.miou,
        )
        earlier = [past for past in self.position.history if past["steps"] < found.steps]
        self.position = replace(self.position, history=(*earlier, found.model_dump()))
        self._write_run()
        if not math.isnan(scores.miou) and (self.position.best_miou is None or scores.miou > self.position.best_miou):
            self.position = replace(self.position, best_miou=scores.miou, best_step=self.position.steps)
            self._save(layout.BEST)
        logged = {"val_mIoU": scores.miou, "val_F1": scores.mean_f1, "val_OA": scores.overall_accuracy}
        self._log(
            logged
            | {f"val_IoU/{name}": value for name, value in scores.iou.items() if value is not None}
            | ({"val_mIoU_raw": raw.miou} if raw else {})
        )
        self.summary.final = asdict(scores)
        left_out = "".join(f"; {name} {reason}" for name, reason in scores.left_out.items())
        averaged = f" with averaged weights, {100 * raw.miou:.2f} without" if raw else ""
        self._progress.say(f"step {self.position.steps}: val mIoU {100 * scores.miou:.2f}{averaged}{left_out}")

    def _log(self, figures: dict[str, float]) -> None:
        epoch = (self.position.batches - 1) // self.batches.per_epoch
        self.logs.log({**figures, "epoch": epoch}, self.position.steps)

    def _take_times(self) -> None:
        measured = self._step_seconds[WARM_UP_STEPS:]
        pace = statistics.median(measured) if measured else self.position.seconds_per_step
        wall_seconds = time.perf_counter() - self._started
        self.position = replace(self.position, wall_seconds=wall_seconds, seconds_per_step=pace)

    def _save(self, name: str) -> None:
        self._take_times()
        learner, averaged = self.learner, self._averaged()
        if learner.fabric.is_global_zero:
            precision = learner.fabric.strategy.precision.state_dict()
            checkpoint.save(
                self.folder / name, learner.student, learner.optimizer, learner.scheduler, precision, self.position, self._record,
                averaged,
            )  # fmt: skip
        learner.fabric.barrier()  # no rank looks for a checkpoint that the first one is still writing

    def _save_all(self) -> None:
        self._save(layout.LAST)
        self.logs.save()

    def _write_run(self) -> None:
        self._take_times()
        if not self.learner.fabric.is_global_zero:
            return
        config, position, targets = self.config, self.position, self._targets
        cache = None
        if targets.fingerprint:
            cache = CacheUsed(path=config.cache.path, fingerprint=targets.fingerprint, tiles=self.batches.tiles)
        run = Run(
            name=config.name,
            seed=config.seed,
            mode=config.distill.mode,
            device=str(self.device),
            total_steps=self.batches.total_steps,
            config=config.model_dump(mode="json"),
            cache=cache,
            libraries=self._record["libraries"],
            history=[Validation.model_validate(found) for found in position.history],
            wall_seconds=position.wall_seconds,
            seconds_per_step=position.seconds_per_step,
            stage_one_seconds=targets.costs.seconds if targets.costs else None,
            class_weights=self.learner.objective.class_weights,
            class_trust=self.learner.objective.class_trust,
            own_loss=self.learner.objective.own_loss,
        )
        write_run(self.folder, run)

    def _summarised(self) -> Summary:
        self._take_times()
        if self.position.history:
            self._write_run()
        summary, position, source = self.summary, self.position, self._targets.source
        summary.steps, summary.epochs = position.steps, position.batches / self.batches.per_epoch
        summary.best_miou, summary.best_step = position.best_miou, position.best_step
        summary.wall_seconds, summary.seconds_per_step = position.wall_seconds, position.seconds_per_step
        if isinstance(source, OnlineTargets) and self._step_seconds:
            summary.teacher_seconds_per_step = source.teacher_seconds / len(self._step_seconds)
        summary.other_modes = paces_of_other_modes(self.folder, summary.mode)
        if self._targets.costs and summary.seconds_per_step:
            summary.worth = worth_of_run(
                self.config, self._targets.costs, summary.seconds_per_step, summary.steps, summary.epochs
            )
            summary.cache_bytes = self._targets.costs.bytes
        return summary
