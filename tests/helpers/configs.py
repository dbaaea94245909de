"""A small configuration on the generated landscape, with overrides."""

from pathlib import Path

import torch

from kdpipe.configs import Config, parse_config
from kdpipe.pipeline.models.smp import create_smp_model

ENCODER = "tu-test_resnet"  # timm's smallest: half of the time of a mobilenet_v2, but not recognised from its tensors
RECOGNISED = "mobilenet_v2"


def write_teacher(folder: Path, encoder: str) -> Path:
    """Write `ENCODER.pth`: a small U-Net with 8 classes and random weights, whose predictions are neither flat nor certain."""
    torch.manual_seed(0)
    model = create_smp_model("unet", encoder, 8, key="teacher")
    with torch.no_grad():
        model.segmentation_head[0].weight *= 8
    path = folder / f"{encoder}.pth"
    torch.save(model.state_dict(), path)
    return path


def tiny_config(landscape: Path, teacher_file: Path, folder: Path, **overrides: object) -> Config:
    """
    A configuration on the small landscape, with its cache in `folder`; overrides are dotted keys written with `__`.

    Teacher and student have the encoder that `teacher_file` is named after.
    """
    raw: dict = {
        "name": "tiny",
        "group": "tests",
        "seed": 7,
        "classes": {"names": ["Background", "Forest", "Grassland", "Cropland", "Settlement", "SemiNatural"]},
        "data": {"train": [str(landscape / "Train")], "val": [str(landscape / "Val")]},
        "teacher": {
            "architecture": "unet",
            "encoder": teacher_file.stem,
            "checkpoint": str(teacher_file),
            "precision": "fp32",  # what `auto` decides depends on the machine, and bf16 on what is predicted together
            "classes": ["Tree", "Rangeland", "Cropland", "Developed", "Road", "Bareland", "Water", "Background"],
        },
        "class_map": {
            "Tree": {"Forest": 1},
            "Rangeland": {"Grassland": 0.7, "SemiNatural": 0.3},
            "Cropland": {"Cropland": 1},
            "Developed": {"Settlement": 1},
            "Road": {"Settlement": 1},
            "Bareland": {"SemiNatural": 1},
            "Water": {"Background": 1},
            "Background": {"Background": 1},
        },
        "cache": {"path": str(folder / "cache.zarr")},
        "student": {"architecture": "unet", "encoder": teacher_file.stem},
        "train": {"epochs": 2, "batch_size": 2, "crop": 64, "workers": 0, "lr": 1e-3, "backbone_lr": 1e-4},
    }
    for key, value in overrides.items():
        *sections, last = key.split("__")
        target = raw
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    return parse_config(raw, "test")
