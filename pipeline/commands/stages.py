"""The commands of the pipeline: precompute-teacher, verify-cache, train-student."""

from __future__ import annotations

from typing import Any

import click

from kdpipe.pipeline.commands import completion
from kdpipe.pipeline.commands.options import file_option, load, run, with_config


@click.command("precompute-teacher")
@with_config
@click.option("--dry-run", is_flag=True, help="Estimate bytes and time, and check the disk. Writes nothing.")
@click.option("--repair", is_flag=True, help="Read every byte first, and compute damaged tiles again.")
@click.option("--workers", type=click.IntRange(1), metavar="N",
              help="Compute in N processes on this machine, one per GPU.")  # fmt: skip
@click.option("--scheduler", metavar="ADDRESS", help="Compute on the workers of a dask cluster: tcp://host:8786.")
def precompute_teacher(
    source: str, overrides: tuple[str, ...], json_path: str | None, device: str | None, dry_run: bool, repair: bool,
    workers: int | None, scheduler: str | None,
) -> None:  # fmt: skip
    """
    Stage one: cache the teacher's soft targets.

    Stores the teacher's soft targets of every training tile. Continues where an earlier run stopped.

    Exit codes: 0 done, 1 some tiles failed (named), 2 usage or config, 3 refused (stale cache, another writer, full disk).
    """
    if sum(map(bool, (dry_run, workers, scheduler))) > 1:
        raise click.UsageError("--dry-run, --workers and --scheduler exclude each other")
    config = load(source, overrides)
    if dry_run:
        run("dry_run.dry_run", config, device, json_path)
    # Whether a named device exists is for torch to say.
    elif repair or device or not run("complete_cache.report_complete", config, json_path):
        run(
            "precompute.precompute_teacher",
            config,
            device,
            json_path,
            repair=repair,
            workers=workers,
            scheduler=scheduler,
        )


@click.command("verify-cache")
@with_config
@click.option("--level", type=click.Choice(["quick", "full", "parity"]), default="full", show_default=True,
              help="quick: complete and fresh. full: every byte too. parity: also run the teacher again, and compare "
              "with the labels.")  # fmt: skip
@click.option("--sample", type=click.IntRange(1), default=12, show_default=True, metavar="N",
              help="Tiles on which parity runs the teacher.")  # fmt: skip
@click.option("--student", metavar="CHECKPOINT", shell_complete=completion.weights,
              help="Student whose gradients parity compares. Default: a fresh one.")  # fmt: skip
@click.option("--reference", type=click.Path(exists=True, file_okay=False), metavar="FOLDER",
              shell_complete=completion.folders,
              help="Also compare the teacher with scores that its owner's own script saved, as .npy, .npz or .tif named as the "
              "tiles, and say what explains a difference. Needs no cache: where there is none, only the teacher is compared.")  # fmt: skip
@file_option("--report", "page", "Write an HTML report: findings, and tiles of the cache.")
def verify_cache(source: str, overrides: tuple[str, ...], **options: Any) -> None:
    """
    Prove that the cache is complete, fresh and right.

    Exit codes: 0 the cache passes, 1 findings, 2 usage or config, 3 refused.
    """
    run("verify.verify_cache", load(source, overrides), **options)


@click.command("train-student")
@with_config
@click.option("--kd", type=click.Choice(["cached", "online", "none"]),
              help="Source of the soft targets: the cache, the teacher at every step, or none. Default: the config's.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint, if there is one.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run of this name.")
@click.option("--devices", type=click.IntRange(1), metavar="N",
              help="Train on N GPUs, or in N processes on the CPU (train.devices).")  # fmt: skip
def train_student(source: str, overrides: tuple[str, ...], devices: int | None, **options: Any) -> None:
    """
    Stage two: train the student from the cache.

    Exit codes: 0 done, 1 the loss diverged, 2 usage or config, 3 refused (incomplete, stale or damaged cache).
    """
    if devices is not None:
        overrides = (*overrides, f"train.devices={devices}")
    run("train.train_student", load(source, overrides), **options)
