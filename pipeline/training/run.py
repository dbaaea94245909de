"""
Stage two: training the student, from the cache, with the live teacher, or without one.

The loop is Lightning Fabric's: the device, precision and gradients are Lightning's, the order of things is ours, because a
run must go on in the middle of an epoch to the very weights that an uninterrupted one reaches.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

from kdpipe.configs import dump_config
from kdpipe.configs.errors import ConfigError, DataError, Interrupted
from kdpipe.configs.outputs import output_path
from kdpipe.configs.schema import Config, DistillMode
from kdpipe.data.dataset import ValTiles
from kdpipe.data.rasters import image_size
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.distributed import Alone, any_rank, computed_precision, is_further_process, open_fabric
from kdpipe.pipeline.evaluation.confusion import Scores
from kdpipe.pipeline.losses import LossTerms, distillation_loss, mean_terms
from kdpipe.pipeline.memory import fits_in_memory, training_advice
from kdpipe.pipeline.models.normalize import normalized
from kdpipe.pipeline.models.student import build_student
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.runs import checkpoint as checkpoints
from kdpipe.pipeline.runs.checkpoint import Position
from kdpipe.pipeline.runs.record import CONFIG, CacheUsed, Run, Validation, paces_of_other_modes, write_run
from kdpipe.pipeline.training.batch_size import resolve_batch_size
from kdpipe.pipeline.training.divergence import growth_hint, refuse_divergence
from kdpipe.pipeline.training.loaders import OnlineTargets, batches_per_epoch, steps_in, train_loader, val_loader
from kdpipe.pipeline.training.optimizer import make_optimizer
from kdpipe.pipeline.training.packing import unpacked
from kdpipe.pipeline.training.targets import open_targets, training_samples
from kdpipe.pipeline.training.tensorboard import BoardPictures
from kdpipe.pipeline.training.validation import batch_size_text, validate
from kdpipe.pipeline.training.worth import Worth, worth_of_run
from kdpipe.pipeline.versions import library_versions

WEIGHTS_DIR, LOGS_DIR = Path("model_weights"), Path("lightning_logs")  # as the guide lays them out
WARM_UP_STEPS = 3  # left out of the time per step: allocations, kernel choices, workers starting


@dataclass
class Summary:
    """
    What a run of stage two reached; times in seconds, scores in 0..1.

    `teacher_seconds_per_step` is what the live teacher took (None where none is live), `other_modes` the seconds a step of the
    runs of the same config in other modes, by name. `worth` is what the cache saved, by what stage one noted beside it (None where
    nothing is noted), and `cache_bytes` what that stored.
    """

    name: str
    mode: DistillMode
    weights: str
    logs: str
    steps: int = 0
    epochs: float = 0.0
    best_miou: float | None = None
    best_step: int | None = None
    final: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    seconds_per_step: float | None = None
    teacher_seconds_per_step: float | None = None
    other_modes: dict[str, float] = field(default_factory=dict)
    fingerprint: str | None = None
    worth: Worth | None = None
    cache_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "worth": self.worth.as_dict() if self.worth else None}


def has_batch_norm(student: nn.Module) -> bool:
    """Whether samples of a batch meet in a student."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in student.modules())


def with_mode(config: Config, mode: DistillMode | None) -> Config:
    """
    The configuration with another `distill.mode`, as `--kd` asks.

    A mode other than the config's own is added to the run's name, so that runs to be compared do not overwrite each other.
    """
    if mode is None or mode == config.distill.mode:
        return config
    distill = config.distill.model_copy(update={"mode": mode})
    return config.model_copy(update={"distill": distill, "name": f"{config.name}-{mode}"})


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

    `resume` goes on from the last checkpoint if there is one; without it, an existing run is refused unless `overwrite`.
    Raises `CacheError`s before the first step, `TrainingDiverged`, and `Interrupted` once `stop` is set, after a checkpoint.
    """
    advice = training_advice(config, computed_precision(config, device))
    told = Silent() if progress is None or is_further_process(config) else progress
    with fits_in_memory("while training", advice, workers=config.train.workers):
        run = _Run(config, device, told, stop or threading.Event(), resume=resume, overwrite=overwrite)
        try:
            summary = run.fit()
        except BaseException:
            with suppress(Exception):  # what ended the run says more than logs that cannot be closed
                run.close_logs()
            raise
        run.close_logs()
        return summary


class _Run:
    """One run of stage two, from its set-up to its summary."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        progress: Progress,
        stop: threading.Event,
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        self.config, self.device, self.progress, self.stop = config, device, progress, stop
        self.folder = output_path(WEIGHTS_DIR / config.group / config.name, key="model_weights")
        resume = self._check_folder(resume, overwrite)

        if config.train.devices > 1 and config.distill.mode == "online":
            raise ConfigError(
                f"distill.mode: online trains on one device, and train.devices is {config.train.devices}; its teacher would be asked "
                "in every process"
            )
        tiles = list_tiles(config.data, "train", labelled_only=config.distill.mode == "none")
        self.val_tiles = list_tiles(config.data, "val") if config.data.val else []
        self.stretch = resolve_stretch(config.data, list_tiles(config.data, "train"))
        targets = open_targets(config, tiles, self.stretch, device)
        self.fingerprint, self._costs = targets.fingerprint, targets.costs
        self._teacher = targets.source if isinstance(targets.source, OnlineTargets) else None
        if targets.note:
            progress.say(targets.note)
        self.cache_used = (
            CacheUsed(path=config.cache.path, fingerprint=targets.fingerprint, tiles=len(tiles))
            if targets.fingerprint
            else None
        )
        workers = 0 if config.distill.mode == "online" else config.train.workers
        if workers != config.train.workers:
            progress.say("online: the teacher answers in the main process, so that train.workers is 0")
        self._sizes_HW = self._val_sizes()

        ranks = config.train.devices
        if ranks > 1:
            # From here on as many processes, each from its start to this line: all see the same run to go on with, or none.
            self.fabric = open_fabric(config, device, ranks)
            self.fabric.launch()
            self.device = device = self.fabric.device
        recorded = checkpoints.recorded_config(self.folder / checkpoints.LAST) if resume else None
        self.config = config = resolve_batch_size(config, device, progress, recorded)
        self.precision = computed_precision(config, device)
        self._advice = training_advice(config, self.precision)
        if ranks == 1:
            self.fabric = open_fabric(config, device)
        rank = self.fabric.global_rank
        torch.manual_seed(config.seed)
        self.student = build_student(
            config.student.architecture,
            len(config.classes.names),
            encoder=config.student.encoder,
            encoder_weights=config.student.encoder_weights,
            checkpoint=config.student.checkpoint,
            replace_head=config.student.replace_head,
            say=progress.say,
        ).to(memory_format=torch.channels_last)  # a fifth to two fifths faster on CPUs, and the layout of tensor cores
        if ranks > 1 and has_batch_norm(self.student):
            if device.type == "cuda":
                self.student = nn.SyncBatchNorm.convert_sync_batchnorm(self.student)  # type: ignore[no-untyped-call]
            else:
                progress.say(
                    "note: on the CPU the batch norms of each process see its own samples, and the first one's statistics count"
                )
        self.optimizer = make_optimizer(self.student, config.train)
        train_config = config.train
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
            self.optimizer, T_0=train_config.restart_epochs, T_mult=train_config.restart_mult
        )
        self.position = Position()
        self._window_terms: list[LossTerms] = []
        # Before the checkpoint is read: the optimizer's state is loaded to where its parameters are by then.
        self.model, self._fabric_optimizer = self.fabric.setup(self.student, self.optimizer)
        if resume:
            self.position, precision_state = checkpoints.restore(
                self.folder / checkpoints.LAST, config, self.fingerprint, self.student, self.optimizer, self.scheduler
            )
            self.fabric.strategy.precision.load_state_dict(precision_state)
            progress.say(f"resuming after step {self.position.steps}")

        dataset = training_samples(config, tiles, self.stretch, targets.source)
        self.per_epoch = batches_per_epoch(config, len(dataset))
        self.total_steps = steps_in(config, self.per_epoch)
        self.loader = self.fabric.setup_dataloaders(
            train_loader(
                config, dataset, self.position.batches, workers, rank, ranks, pin=self.fabric.device.type == "cuda"
            ),
            use_distributed_sampler=False,
        )
        validation = ValTiles(self.val_tiles, config, self.stretch)
        self.val_loader = self.fabric.setup_dataloaders(
            val_loader(config, validation, self._sizes_HW, workers, rank, ranks), use_distributed_sampler=False
        )
        # A source of their own: what a live teacher answers for pictures is no part of a step.
        shown = training_samples(config, tiles, self.stretch, copy(targets.source))
        self.pictures = BoardPictures(config, shown, validation, self.total_steps)
        self.csv = CSVLogger(LOGS_DIR, name=f"{config.group}/{config.name}")
        self.tensorboard = TensorBoardLogger(LOGS_DIR, name=f"{config.group}/{config.name}", version=self.csv.version)
        self.summary = Summary(
            name=config.name,
            mode=config.distill.mode,
            weights=str(self.folder),
            logs=self.csv.log_dir,
            fingerprint=self.fingerprint,
        )

    def fit(self) -> Summary:
        """Train to the last step, validating and saving on the way."""
        config, start = self.config, time.perf_counter()
        if self.fabric.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
        step_seconds: list[float] = []
        with self.progress.bar(
            f"student ({config.distill.mode})", self.total_steps, "steps", self.position.steps
        ) as advance:
            clock = time.perf_counter()
            batches: Any = iter(self.loader) if self.position.steps < self.total_steps else iter(())
            for batch in batches:
                # The ranks' gradients are added up once a step, in its last batch.
                more = len(self._window_terms) + 1 < config.train.accumulate
                apart = self.fabric.no_backward_sync(self.model, enabled=more and config.train.devices > 1)
                with fits_in_memory(f"while training on {batch_size_text(batch, 'crop')}", self._advice), apart:
                    terms = self._train_batch(batch)
                if terms is None:
                    continue
                step_seconds.append(time.perf_counter() - clock)
                self.position = replace(self.position, seconds=self.position.seconds + step_seconds[-1])
                self._log_step(terms, step_seconds[-1])
                advance(1, loss=self.summary.losses[-1])
                if self._at_end_of_epoch():
                    self.scheduler.step()
                self._validate_and_save()
                if self.position.steps >= self.total_steps:
                    break
                clock = time.perf_counter()
        if not self.summary.final:
            self._validate()
        if hint := growth_hint(self.summary.losses, config, self.precision):
            self.progress.say(hint)
        self.summary.steps, self.summary.epochs = self.position.steps, self.position.batches / self.per_epoch
        self.summary.best_miou, self.summary.best_step = self.position.best_miou, self.position.best_step
        self.summary.seconds = time.perf_counter() - start
        measured = step_seconds[WARM_UP_STEPS:]
        self.summary.seconds_per_step = statistics.median(measured) if measured else None
        if self._teacher and step_seconds:
            self.summary.teacher_seconds_per_step = self._teacher.teacher_seconds / len(step_seconds)
        self.summary.other_modes = paces_of_other_modes(self.folder, config.distill.mode)
        if self._costs and self.summary.seconds_per_step:
            self.summary.worth = worth_of_run(
                config, self._costs, self.summary.seconds_per_step, self.summary.steps, self.summary.epochs
            )
            self.summary.cache_bytes = self._costs.bytes
        return self.summary

    def _train_batch(self, batch: dict[str, Tensor]) -> LossTerms | None:
        """One batch forward and backward; its step's mean loss terms where it completes one, None where it does not."""
        config, window = self.config, self.config.train.accumulate
        # Dropout draws from a state of its own in every batch: the same with and without teacher, resumed or not.
        torch.manual_seed(config.seed * 1_000_003 + self.position.batches + self.fabric.global_rank * 7_368_787)
        self.student.train()
        answer = self.model(normalized(batch["image"], config.student.normalize))
        logits, auxiliary = answer if isinstance(answer, tuple) else (answer, None)
        target = unpacked(batch["target"], batch["inside"]) if "target" in batch else None
        terms = distillation_loss(
            logits,
            batch["mask"],
            batch["inside"],
            target,
            batch.get("entropy_error"),
            alpha=config.distill.alpha,
            temperature=config.distill.temperature,
            ignore_index=config.classes.ignore_index,
            auxiliary_NCHW=auxiliary,
        )
        self.fabric.backward(terms.total / window)
        self._window_terms.append(terms)
        whole = len(self._window_terms) == window
        if whole:
            self._step()
        # Last, since a GPU is waited for; nothing is saved before.
        refuse_divergence(terms, target, self.position.steps + 1, config, self.precision, self.folder)
        self.position = replace(self.position, batches=self.position.batches + 1)
        if not whole:
            return None
        self.position = replace(self.position, steps=self.position.steps + 1)
        terms = mean_terms(self._window_terms)
        self._window_terms.clear()
        return terms

    def _step(self) -> None:
        config = self.config
        if config.train.clip_norm is not None:
            self.fabric.clip_gradients(
                self.model, self._fabric_optimizer, max_norm=config.train.clip_norm, error_if_nonfinite=False
            )
        self._fabric_optimizer.step()
        self._fabric_optimizer.zero_grad()

    def _validate_and_save(self) -> None:
        """Validate and save where it is due, and stop where it was asked for; only ever between two steps."""
        train_config = self.config.train
        stopping = any_rank(self.stop.is_set(), self.device)  # the ranks stop after one and the same step
        ended = self.position.steps >= self.total_steps
        epoch_ended = self._at_end_of_epoch()
        if ended or (epoch_ended and (self.position.batches // self.per_epoch) % train_config.val_every_epochs == 0):
            self._validate()
        if ended or epoch_ended or stopping or self.position.steps % train_config.checkpoint_every_steps == 0:
            self._save(checkpoints.LAST)
            self.csv.save()
        if stopping and not ended:
            raise Interrupted(
                f"stopped after step {self.position.steps} of {self.total_steps}; the run is saved in {self.folder}. "
                "Run the same command with --resume to go on"
            )

    def _validate(self) -> None:
        # Not through DDP, which would have all ranks validate as many batches as each other.
        model = self.model if self.config.train.devices == 1 else Alone(self.student, self.fabric)
        if self.val_tiles:
            self._note(validate(model, self.val_loader, self.config, self.device))
        if (
            self.fabric.is_global_zero
        ):  # after the scores: the CSV logger warns where TensorBoard's file is there before its own
            self.pictures.show(self.tensorboard.experiment, model, self.device, self.position.steps)

    def _note(self, result: Scores) -> None:
        figures = {"miou": result.miou, "overall_accuracy": result.overall_accuracy}
        found = Validation(
            steps=self.position.steps,
            seconds=self.position.seconds,
            **{name: None if math.isnan(value) else value for name, value in figures.items()},
            iou=result.iou,
        )
        earlier = [past for past in self.position.history if past["steps"] < found.steps]
        self.position = replace(self.position, history=(*earlier, found.model_dump()))
        self._write_run()
        if not math.isnan(result.miou) and (self.position.best_miou is None or result.miou > self.position.best_miou):
            self.position = replace(self.position, best_miou=result.miou, best_step=self.position.steps)
            self._save(checkpoints.BEST)
        logged = {"val_mIoU": result.miou, "val_F1": result.mean_f1, "val_OA": result.overall_accuracy}
        logged |= {f"val_IoU/{name}": value for name, value in result.iou.items() if value is not None}
        self._log(logged)
        self.summary.final = result.as_dict()
        left_out = "".join(f"; {name} {reason}" for name, reason in result.left_out.items())
        self.progress.say(f"step {self.position.steps}: val mIoU {100 * result.miou:.2f}{left_out}")

    def _write_run(self) -> None:
        if not self.fabric.is_global_zero:
            return
        run = Run(
            name=self.config.name,
            seed=self.config.seed,
            mode=self.config.distill.mode,
            device=str(self.device),
            total_steps=self.total_steps,
            config=self.config.model_dump(mode="json"),
            cache=self.cache_used,
            libraries=library_versions(),
            history=[Validation.model_validate(found) for found in self.position.history],
        )
        write_run(self.folder, run)

    def _save(self, name: str) -> None:
        if self.fabric.is_global_zero:
            record = {
                "config": dump_config(self.config),
                "mode": self.config.distill.mode,
                "fingerprint": self.fingerprint,
                "stretch": [list(pair) for pair in self.stretch] if self.stretch else None,
                "libraries": library_versions(),
            }
            precision_state = self.fabric.strategy.precision.state_dict()
            checkpoints.save(
                self.folder / name, self.student, self.optimizer, self.scheduler, precision_state, self.position, record
            )
        self.fabric.barrier()  # no rank looks for a checkpoint that the first one is still writing

    def _log_step(self, terms: LossTerms, seconds: float) -> None:
        self.summary.losses.append(terms.total.item())
        groups = self.optimizer.param_groups
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

    def _log(self, figures: dict[str, float]) -> None:
        epoch = (self.position.batches - 1) // self.per_epoch
        for logger in (self.csv, self.tensorboard):
            logger.log_metrics({**figures, "epoch": epoch}, step=self.position.steps)

    def close_logs(self) -> None:
        """Write what is logged; TensorBoard's thread would otherwise write later, also after an error."""
        for logger in (self.csv, self.tensorboard):
            logger.finalize("success")

    def _at_end_of_epoch(self) -> bool:
        return self.position.batches % self.per_epoch == 0

    def _val_sizes(self) -> list[tuple[int, int]]:
        unlabelled = [tile.id for tile in self.val_tiles if tile.mask is None]
        if self.val_tiles and len(unlabelled) == len(self.val_tiles):
            raise DataError(f"data.val has no labelled tile to validate on: {self.config.data.val}")
        self.val_tiles = [tile for tile in self.val_tiles if tile.mask is not None]
        return [image_size(tile.image) for tile in self.val_tiles]

    def _check_folder(self, resume: bool, overwrite: bool) -> bool:
        """Whether to resume; refuses to write over a run that nobody asked to replace."""
        last = self.folder / checkpoints.LAST
        if not last.exists():
            if resume:
                self.progress.say(f"nothing to resume in {self.folder}: starting at the first step")
            return False
        if not resume and not overwrite:
            raise ConfigError(
                f"{self.folder} holds a run already; go on with --resume, replace it with --overwrite, "
                "or choose another name (--set name=…)"
            )
        return resume
