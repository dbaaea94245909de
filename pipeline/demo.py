"""
The whole pipeline on a generated landscape, as `make demo` and `kdpipe demo` run it.

The commands run as a user would run them, each in its own process, with the shipped `demo` config.
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

from kdpipe.configs import Config, load_config
from kdpipe.configs.errors import ConfigError, KdpipeError
from kdpipe.configs.outputs import output_path
from kdpipe.data.rasters import read_image, read_mask
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.evaluation.confusion import count_pairs, scores
from kdpipe.pipeline.evaluation.evaluate import evaluate, student_model, teacher_model
from kdpipe.pipeline.models.normalize import normalized
from kdpipe.pipeline.models.smp import create_smp_model
from kdpipe.pipeline.pictures import Panel, contact_sheet, paint_classes, paint_soft_target, visible
from kdpipe.pipeline.progress import Progress
from kdpipe.pipeline.runs.layout import LAST
from kdpipe.pipeline.text import duration_text

TEACHER_STEPS, TEACHER_BATCH, TEACHER_CROP, TEACHER_LR = 300, 8, 128, 2e-3
SHOWN_TILES = 3
PICTURE, PAGE = "demo.png", "report.html"
# Options by label; results in LABEL.json. Without the teacher, as many crops are taken of the tiles with labels alone.
STUDENTS: dict[str, list[str]] = {"with": [], "without": ["--kd", "none"]}
MARKER = ".kdpipe-demo"  # marks a folder as a demo's, which may be replaced


def run_demo(out: Path, progress: Progress) -> Iterator[Table | str]:
    """
    Make the data and the teacher, run the commands, and yield the comparison of the students and what to do next.

    An earlier demo in `out` is replaced. Raises `ConfigError` if `out` holds anything else, `KdpipeError` if a command fails.
    """
    start = time.perf_counter()
    out = output_path(out, key="--out")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise ConfigError(f"{out} is not empty and no earlier demo; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).touch()
    # The shipped config places everything below `demo_output`; for another --out the same keys are set.
    places = {
        "data.train": f"[{out}/data/Train]",
        "data.val": f"[{out}/data/Val]",
        "data.unlabelled": f"[{out}/data/Unlabelled]",
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
    for label, kd in STUDENTS.items():
        result = out / f"{label}.json"
        _command(progress, "train-student", "-c", "demo", *settings, *kd, "--overwrite", "--json", str(result))
        results[label] = json.loads(result.read_text())
    runs = [Path(result["weights"]) for result in results.values()]
    _command(progress, "report", *map(str, runs), "--tiles", "8", "--teacher", "--out", str(out / PAGE))
    taught, alone = (run / LAST for run in runs)
    draw_demo(config, taught, alone, out / PICTURE)
    yield _comparison(config, results)
    yield (
        "Three tiles have labels, and the teacher predicts 28 others: that is where distillation pays. docs/results.md says what it gains "
        "on scenes that no network has seen."
    )
    yield f"The demo took {duration_text(time.perf_counter() - start)}; everything is in {out}. Next:"
    yield f"  - Open {out / PAGE} in a browser: scores, curves, and tiles to compare. {PICTURE} shows three of them."
    yield "  - kdpipe init FOLDER --teacher CHECKPOINT writes a config for your own tiles: docs/own-data.md"
    yield "  - docs/tutorial.md explains the same steps one by one."


def train_teacher(config: Config, root: Path, progress: Progress) -> None:
    """Train the config's teacher from scratch on the tiles and 8-class masks below `root`; saves a bare fp16 state dict."""
    images = sorted((root / "images").glob("*.png"))
    pairs = [
        (read_image(path), read_mask(root / "masks" / path.name, len(config.teacher_classes), 255)) for path in images
    ]
    rng = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    teacher = config.members["teacher"]
    assert teacher.architecture is not None
    assert teacher.encoder is not None
    model = create_smp_model(
        teacher.architecture, teacher.encoder, len(teacher.classes), key="teacher", options=teacher.options
    )
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
        {name: v.half() if v.is_floating_point() else v for name, v in model.state_dict().items()}, teacher.origin
    )


def draw_demo(config: Config, taught: Path, alone: Path, picture: Path) -> None:
    """
    Draw validation tiles: image, label, the teacher's soft target, and what two students predict, with mIoU in percent.

    `taught` and `alone` are the checkpoints of the student with and without the teacher.
    """
    cpu = torch.device("cpu")
    models = {"teacher's soft target": teacher_model(config, cpu, tta=None, window=None)}
    for title, file in (("student", taught), ("student without a teacher", alone)):
        models[title] = student_model(file, cpu, tta=None, window=None)
    means = [evaluate(model).together.scores.miou for model in models.values()]
    titles = [
        "image",
        "label",
        *(f"{title}\nmIoU of all tiles {100 * m:.1f}" for title, m in zip(models, means, strict=True)),
    ]
    num_classes, ignore_index = len(config.classes.names), config.classes.ignore_index
    rows = []
    for tile in list_tiles(config.data, "val")[:SHOWN_TILES]:
        assert tile.mask is not None
        image_HWC = read_image(tile.image, config.data.bands, None, config.data.alpha)
        labels_HW = read_mask(tile.mask, num_classes, ignore_index)
        panels = [
            Panel(visible(image_HWC, config.data.visible_places), tile.id),
            Panel(paint_classes(labels_HW, num_classes)),
        ]
        for number, model in enumerate(models.values()):
            probs_CHW = model.predict(image_HWC)
            predicted_HW = probs_CHW.argmax(axis=0)
            painted = paint_classes(predicted_HW, num_classes) if number else paint_soft_target(probs_CHW)
            counts_LP = count_pairs(labels_HW, predicted_HW, num_classes, num_classes, ignore_index)
            miou = scores(counts_LP, config.classes.names, config.classes.not_scored).miou
            panels.append(Panel(painted, f"mIoU {100 * miou:.1f}"))
        rows.append(panels)
    contact_sheet(rows, titles, config.classes.names).save(picture, optimize=True)


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
