"""
A folder in which the commands of the docs run as they stand: a checkout's neighbours, a configuration, a cache, students, scenes.

Small tiles stand in for the Dubai tiles, and a network with random weights for their teacher. The labels are the teacher's
own predictions, so that the gate has no findings.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import rasterio.shutil
import torch
import yaml
from helpers.files import write_scene
from PIL import Image

from kdpipe.cache import SoftTargetCache
from kdpipe.configs import load_config
from kdpipe.data.landscape.labels import write_sample_data
from kdpipe.pipeline.commands.main import main
from kdpipe.pipeline.models.smp import create_smp_model
from kdpipe.pipeline.training.loop import WARM_UP_STEPS

TEACHER = "u-efficientnet-b4_s0_CELoss_pretrained.pth"
SHORT = [f"train.max_steps={WARM_UP_STEPS + 1}", "train.batch_size=2", "train.crop=64", "train.workers=0"]
# Options that a test adds to a command, so that it takes seconds and can be run twice.
MORE = {
    "train-student": ["--overwrite", *(part for key in SHORT for part in ("--set", key))],
    "precompute-teacher": [part for key in SHORT for part in ("--set", key)],  # --dry-run takes a step
    "verify-cache": ["--sample", "2"],
    "suggest-map": ["--sample", "2"],
    "report": ["--tiles", "2"],
    "compare": ["--tiles", "2"],
    "predict": ["--overwrite"],
    "export": ["--overwrite"],
}
SMALLER = {"--fp16", "--int8", "--argmax"}  # after a few steps, classes are nearly tied, and 8 bits change many


def run(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]) -> int:
    """The exit code of `kdpipe ARGUMENTS`, run in this process, which has imported everything already."""
    tolerance = ["--tolerance", "100"] if arguments[0] == "export" and SMALLER & set(arguments) else []
    monkeypatch.setattr(sys, "argv", ["kdpipe", *arguments, *MORE.get(arguments[0], []), *tolerance])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def build(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder to run commands in; its neighbours in `folder` are those of a checkout."""
    shared, project = folder / "shared", folder / "project"
    _write_tiles(shared / "data" / "dubai")
    _write_teacher(shared / "pretrain_weights" / TEACHER)
    project.mkdir()
    monkeypatch.chdir(project)
    Path("pretrain_weights").symlink_to("../shared/pretrain_weights")
    assert run(monkeypatch, ["precompute-teacher", "-c", "dubai/linknet_kd"]) == 0
    _label_with_predictions(SoftTargetCache.open("caches/dubai.zarr"), shared / "data" / "dubai" / "Train")
    _remove_classes_absent_from_dubai(shared / "data" / "dubai")
    for root in ("North", "South"):
        shutil.copytree(shared / "data" / "dubai" / "Val", Path("regions") / root)
    for options in ([], ["--kd", "none"]):
        assert run(monkeypatch, ["train-student", "-c", "dubai/linknet_kd", *options]) == 0
    best = "model_weights/dubai/dubai-linknet-kd/best.ckpt"
    assert run(monkeypatch, ["export", "--checkpoint", best, "--format", "onnx", "--out", "student.onnx"]) == 0
    mine = load_config(
        "dubai/linknet_kd",
        ["name=mine", "group=default", "cache.path=caches/mine.zarr", "train.crops_per_tile=1", *SHORT],
    )
    Path("mine.yaml").write_text(yaml.safe_dump(mine.model_dump(mode="json")))
    shutil.copytree("caches/dubai.zarr", "caches/mine.zarr")
    _write_scenes(Path("scenes"))
    return project


def _write_tiles(root: Path) -> None:
    write_sample_data(root, seed=3, train=6, val=2, unlabelled=2, teacher=0, side=(65, 110))
    named = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)  # the tile that pages name
    Image.fromarray(named).save(root / "Train" / "images" / "t1_001.png")
    Image.fromarray(named[..., 0] // 64).save(root / "Train" / "masks" / "t1_001.png")
    unlabelled = root / "Unlabelled" / "images"
    next(unlabelled.iterdir()).rename(unlabelled / "t7_001.png")


def _write_teacher(path: Path) -> None:
    torch.manual_seed(0)
    model = create_smp_model("unet", "efficientnet-b4", 8, key="teacher")
    with torch.no_grad():
        model.segmentation_head[0].weight *= 8
    path.parent.mkdir(parents=True)
    torch.save(model.half().state_dict(), path)


def _label_with_predictions(cache: SoftTargetCache, root: Path) -> None:
    for tile in cache.tile_ids:
        labels = cache.read(tile).argmax(axis=0).astype(np.uint8)
        Image.fromarray(labels).save(root / "masks" / f"{tile.split('/')[1]}.png")


def _remove_classes_absent_from_dubai(root: Path) -> None:
    """Remove Grassland and Cropland, which the real tiles do not have."""
    for path in root.glob("*/masks/*.png"):
        labels = np.array(Image.open(path))
        labels[(labels == 2) | (labels == 3)] = 255
        Image.fromarray(labels).save(path)


def _write_scenes(folder: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (3, 90, 120), dtype=np.uint8)
    for name in ("a.tif", "2024/b.tif"):
        write_scene(folder / name, pixels)
    rasterio.shutil.copy(folder / "a.tif", "mosaic.vrt", driver="VRT")
    Image.fromarray(pixels.transpose(1, 2, 0)).save("tile.png")


def copy_of(project: Path, folder: Path, page: str) -> Path:
    """A page's own copy of the world, so that no page finds what another wrote. The tutorial's has no cache yet."""
    (folder / "shared").symlink_to(project.parent / "shared")
    own = folder / "project"
    shutil.copytree(project, own, symlinks=True)
    if page == "docs/tutorial.md":
        shutil.rmtree(own / "caches" / "dubai.zarr")
    return own
