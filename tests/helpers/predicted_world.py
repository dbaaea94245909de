"""Three labelled tiles, and a configuration whose teacher is what another program predicted of them."""

import numpy as np
import pytest
import torch
from helpers.stored_predictions import logits_of
from PIL import Image

from kdpipe.configs import parse_config

CPU = torch.device("cpu")
TEACHER, STUDENT = ["tree", "field", "roof"], ["green", "grey"]
CLASS_MAP = {"tree": {"green": 1}, "field": {"green": 0.75, "grey": 0.25}, "roof": {"grey": 1}}
MAP = np.array([[1, 0], [0.75, 0.25], [0, 1]])
T = 2.0
SIZES = {"a": (40, 52), "b": (40, 52), "north/c": (33, 41)}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Three labelled tiles, of which one lies in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, (height, width) in SIZES.items():
        for kind, values in (
            ("images", rng.integers(0, 256, (height, width, 3))),
            ("masks", rng.integers(0, 2, (height, width))),
        ):
            path = tmp_path / f"data/Mine/{kind}/{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(path)
    return tmp_path


def config(folder, are="probabilities", predictions=None, **sections):
    raw = {
        "name": "predicted",
        "classes": {"names": STUDENT},
        "data": {"train": [str(folder / "data/Mine")], "nested": True},
        "teacher": {"predictions": predictions or str(folder / "saved"), "are": are, "classes": TEACHER},
        "class_map": CLASS_MAP,
        "cache": {"path": str(folder / f"{are}.zarr")},
        "distill": {"temperature": T},
        "student": {"architecture": "unet", "encoder": "tu-test_resnet"},
        "train": {
            "crop": 32,
            "batch_size": 1,
            "epochs": 1,
            "workers": 0,
            "scales": [1.0],
            "mosaic": 0.0,
            "photometric": 0.0,
        },
    }
    raw["class_map"] = sections.pop("class_map", CLASS_MAP)
    for key, value in sections.items():
        raw[key] = raw[key] | value if isinstance(raw.get(key), dict) else value
    return parse_config(raw, "test")


def image_of(folder, name):
    return folder / f"data/Mine/images/{name}.png"


def logits_at(folder, name):
    return logits_of(Image.open(image_of(folder, name)).convert("RGB"), len(TEACHER))


def softened(probs_THW, temperature=T):
    """`normalise((p @ M)^(1/T))`, in float64."""
    mapped = np.einsum("thw,ts->shw", probs_THW, MAP) ** (1 / temperature)
    return mapped / mapped.sum(axis=0)
