"""
The whole pipeline on a generated landscape: what `make demo` and `kdpipe demo` run.

The three commands are run as a user would, each in a process of its own, with the shipped `demo` config.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch.nn import functional as F

from kdpipe.cache import SoftTargetCache
from kdpipe.configs import Config, load_config
from kdpipe.configs.errors import ConfigError, KdpipeError
from kdpipe.configs.outputs import output_path
from kdpipe.data.rasters import read_image, read_mask
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.models.normalize import normalized
from kdpipe.pipeline.models.smp import create_smp_model
from kdpipe.pipeline.models.student import build_student, load_student_weights
from kdpipe.pipeline.models.views import padded_logits
from kdpipe.pipeline.pictures import contact_sheet, paint_classes, paint_soft_target
from kdpipe.pipeline.precompute.expected_recipe import configured_softening
from kdpipe.pipeline.progress import Progress

TEACHER_STEPS, TEACHER_BATCH, TEACHER_CROP, TEACHER_LR = 300, 8, 128, 2e-3
SHOWN_TILES = 3
MARKER = ".kdpipe-demo"  # says that a folder is a demo's and may be replaced


def run_demo(out: Path, progress: Progress) -> Iterator[Table | str]:
    """
    Make the data and the teacher, run the commands, and yield the comparison and where the picture is.

    An earlier demo in `out` is replaced. Raises `ConfigError` if `out` holds anything else, `KdpipeError` if a command fails.
    """
    start = time.perf_counter()
    out = output_path(out, key="--out")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise ConfigError(f"{out} is not empty and no earlier demo; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).touch()
    # The shipped config names everything below `demo_output`; elsewhere the same paths are set.
    places = {
        "data.train": f"[{out}/data/Train]",
        "data.val": f"[{out}/data/Val]",
        "teacher.checkpoint": f"{out}/teacher.pth",
        "cache.path": f"{out}/cache.zarr",
    }
    overrides = [] if out == Path("demo_output").resolve() else [f"{key}={value}" for key, value in places.items()]
    config = load_config("demo", overrides)
    settings = [part for override in overrides for part in ("--set", override)]

    _command(progress, "sample-data", str(out / "data"))
    train_teacher(config, out / "data" / "Teacher", progress)
    _command(progress, "precompute-teacher", "-c", "demo", *settings)
    _command(progress, "verify-cache", "-c", "demo", *settings, "--level", "parity")
    results = {}
    for label, kd in (("with", []), ("without", ["--kd", "none"])):
        result = out / f"{label}.json"
        _command(progress, "train-student", "-c", "demo", *settings, *kd, "--overwrite", "--json", str(result))
        results[label] = json.loads(result.read_text())
    yield _comparison(config, results)
    picture = out / "demo.png"
    _draw(config, Path(results["with"]["weights"]) / "best.ckpt", picture)
    yield "so short a run shows how it works, not what distillation gains: see the README for that"
    yield f"picture: {picture}"
    yield f"the demo took {time.perf_counter() - start:.0f} s; everything is in {out}"


def train_teacher(config: Config, root: Path, progress: Progress) -> None:
    """Train the config's teacher from scratch on the tiles and 8-class masks below `root`; saves a bare fp16 state dict."""
    images = sorted((root / "images").glob("*.png"))
    pairs = [
        (read_image(path), read_mask(root / "masks" / path.name, len(config.teacher_classes), 255)) for path in images
    ]
    rng = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    teacher = config.members["teacher"]
    model = create_smp_model(teacher.architecture, teacher.encoder, len(teacher.classes), key="teacher")
    optimizer = torch.optim.AdamW(model.parameters(), lr=TEACHER_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TEACHER_LR, total_steps=TEACHER_STEPS)
    with progress.bar("a teacher for the demo", TEACHER_STEPS, "steps") as advance:
        for _ in range(TEACHER_STEPS):
            crops = [_crop(pairs[i], rng) for i in rng.integers(len(pairs), size=TEACHER_BATCH)]
            inputs = torch.from_numpy(np.stack([crop for crop, _ in crops])).permute(0, 3, 1, 2)
            labels = torch.from_numpy(np.stack([mask for _, mask in crops])).long()
            loss = F.cross_entropy(model(normalized(inputs, teacher.normalize)), labels, ignore_index=255)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            advance(1, loss=loss.item())
    torch.save(
        {name: v.half() if v.is_floating_point() else v for name, v in model.state_dict().items()}, teacher.checkpoint
    )


def _crop(pair: tuple[Any, Any], rng: np.random.Generator) -> tuple[Any, Any]:
    image, mask = pair
    top, left = (int(rng.integers(side - TEACHER_CROP + 1)) for side in mask.shape)
    window = np.s_[top : top + TEACHER_CROP, left : left + TEACHER_CROP]
    turns = int(rng.integers(4))
    return np.rot90(image[window], turns).copy(), np.rot90(mask[window], turns).copy()


def _command(progress: Progress, *arguments: str) -> None:
    progress.say(f"\n$ kdpipe {' '.join(arguments)}")
    done = subprocess.run([sys.executable, "-m", "kdpipe.pipeline", *arguments], check=False)
    if done.returncode:
        raise KdpipeError(f"kdpipe {arguments[0]} ended with exit code {done.returncode}; its message is above")


def _comparison(config: Config, results: dict[str, dict[str, Any]]) -> Table:
    table = Table(
        title=f"The same student after {results['with']['steps']} steps: IoU in percent", title_justify="left"
    )
    for column in ("class", "with the teacher", "without", "difference"):
        table.add_column(column, justify="left" if column == "class" else "right")
    rows = {name: [results[label]["final"]["iou"][name] for label in results] for name in config.classes.names}
    rows["mean"] = [results[label]["final"]["miou"] for label in results]
    for name, (taught, alone) in rows.items():
        if taught is None or alone is None:
            table.add_row(name, "–", "–", "–")
        else:
            table.add_row(name, f"{100 * taught:.1f}", f"{100 * alone:.1f}", f"{100 * (taught - alone):+.1f}")
    return table


def _draw(config: Config, checkpoint: Path, picture: Path) -> None:
    num_classes = len(config.classes.names)
    student = build_student(config.student.architecture, num_classes, encoder=config.student.encoder)
    load_student_weights(student, checkpoint)
    student.eval()
    cache = SoftTargetCache.open(config.cache.path, configured_softening(config))
    rows = []
    for tile in list_tiles(config.data, "train")[:SHOWN_TILES]:
        assert tile.mask is not None
        image = read_image(tile.image)
        with torch.inference_mode():
            inputs = normalized(torch.from_numpy(image).permute(2, 0, 1)[None], config.student.normalize)
            answer = padded_logits(student, inputs)[0].argmax(dim=0).numpy()
        mask = read_mask(tile.mask, num_classes, config.classes.ignore_index)
        rows.append(
            [
                image,
                paint_classes(mask, num_classes),
                paint_soft_target(cache.read(tile.id)),
                paint_classes(answer, num_classes),
            ]
        )
    titles = ["image", "label", "teacher's soft target", "student"]
    contact_sheet(rows, titles, config.classes.names).save(picture)
