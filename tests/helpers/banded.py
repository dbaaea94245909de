"""Tiles of more bands than three, a teacher that sees some of them, and the same network computed by hand from rasterio's bands."""

from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
from helpers.configs import ENCODER
from helpers.files import read_raster, write_tiff
from PIL import Image

from kdpipe.configs import parse_config

CLASSES = ["Field", "Water", "Tree"]
H, W = 64, 96  # multiples of 32: no padding
NAMES = {"red": 1, "green": 2, "blue": 3, "nir": 4}


def write_tiles(root: Path, bands=4, dtype="uint8", count=3, seed=0):
    """Tiles whose bands depend on their class; the files do not name their bands."""
    rng = np.random.default_rng(seed)
    scale = 1 if dtype == "uint8" else 40
    for number in range(count):
        labels = np.kron(rng.integers(0, 3, (H // 16, W // 16)), np.ones((16, 16), dtype=int))
        values = labels * 60 * (1 + np.arange(bands)[:, None, None] % 3) // 3 + rng.integers(0, 90, (bands, H, W))
        path = root / "images" / f"t{number}.tif"
        write_tiff(path, (values * scale).astype(dtype), photometric="minisblack", alpha="no")
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(labels.astype(np.uint8)).save(root / "masks" / f"t{number}.png")


def write_teacher(path: Path, bands: int, classes=3) -> Path:
    torch.manual_seed(bands)
    model = smp.create_model("unet", ENCODER, encoder_weights=None, in_channels=bands, classes=classes)
    with torch.no_grad():
        model.segmentation_head[0].weight *= 8
    torch.save(model.state_dict(), path)
    return path


def config_of(folder: Path, teacher: Path, data: dict, seen: dict, student: dict, **overrides):
    """A configuration; `seen` and `student` are further keys of the sections `teacher` and `student`."""
    raw = {
        "name": "banded", "group": "tests", "seed": 3, "classes": {"names": CLASSES},
        "data": {"train": [str(folder / "Train")], "val": [str(folder / "Val")], **data},
        "teacher": {"architecture": "unet", "encoder": ENCODER, "checkpoint": str(teacher), "classes": CLASSES, **seen},
        "class_map": {"Field": {"Field": 1}, "Water": {"Water": 0.75, "Tree": 0.25}, "Tree": {"Tree": 1}},
        "cache": {"path": str(folder / "cache.zarr")},
        "distill": {"temperature": 2.0},
        "student": {"architecture": "unet", "encoder": ENCODER, **student},
        "train": {"epochs": 1, "batch_size": 2, "crop": 64, "workers": 0, "max_steps": 2, "scales": [1.0]},
    }  # fmt: skip
    for key, value in overrides.items():
        section, name = key.split("__")
        raw[section][name] = value
    return parse_config(raw, "test")


def inputs_by_hand(path, numbers, mean, std, stretch=None):
    """A network's input, float32 `(1, C, H, W)`: rasterio's bands `numbers`, stretched, divided by 255 and normalised in NumPy."""
    bands = read_raster(path).astype(np.float64)[[number - 1 for number in numbers]]
    if stretch is not None:
        low, high = (np.array(ends)[:, None, None] for ends in zip(*stretch, strict=True))
        bands = np.rint((np.clip(bands, low, high) - low) * 255 / (high - low))
    mean, std = (np.array(values)[:, None, None] for values in (mean, std))
    return torch.from_numpy(((bands / 255 - mean) / std)[None].astype(np.float32))


@torch.inference_mode()
def logits_by_hand(state, inputs, classes=3):
    """Logits `(C, H, W)` of smp's U-Net with these weights."""
    model = smp.create_model("unet", ENCODER, encoder_weights=None, in_channels=inputs.shape[1], classes=classes)
    model.load_state_dict(state)
    return model.eval()(inputs)[0].double().numpy()


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=0))
    return exponentials / exponentials.sum(axis=0)
