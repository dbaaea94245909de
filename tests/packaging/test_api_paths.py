"""Whatever public name takes a path takes it as a text and as any `os.PathLike`."""

import inspect
import os
import pydoc
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.configs import ENCODER
from helpers.foreign_networks import CLASSES
from helpers.stored_predictions import write_all

from kdpipe.cache import SoftTargetCache
from kdpipe.cache.packing.pack import pack
from kdpipe.cache.packing.unpack import unpack
from kdpipe.configs import dump_config, load_config
from kdpipe.pipeline.models.student import build_student, load_student_weights
from kdpipe.pipeline.runs.checkpoint import load_trained
from kdpipe.pipeline.training.run import train
from kdpipe.pipeline.verify import verify

API = Path(__file__).resolve().parents[2] / "docs/api.md"
NAMES = re.findall(r"^(kdpipe\.\S+)$", API.read_text(encoding="utf-8"), re.MULTILINE)
TAKES_A_PATH = {"path", "file", "folder", "checkpoint", "source", "reference", "student", "image", "out", "root"}


class Place(os.PathLike):
    """A path of another library, which is neither a text nor a `Path`."""

    def __init__(self, path):
        self._path = str(path)

    def __fspath__(self):
        return self._path


@pytest.fixture(params=[str, Path, Place])
def as_path(request):
    return request.param


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "student.pth"
    torch.save(build_student("unet", 6, encoder=ENCODER).state_dict(), path)
    return path


def open_a_cache(cached, as_path, **_):
    assert SoftTargetCache.open(as_path(cached.cache.path)).tile_ids


def create_a_cache(as_path, tmp_path, **_):
    image = tmp_path / "image.png"
    image.write_bytes(b"pixels")
    with SoftTargetCache.create(as_path(tmp_path / "own.zarr"), classes=["a", "b"]) as own:
        assert not own.is_written("t", as_path(image))
        own.write("t", np.full((2, 4, 4), 0.5, np.float32), as_path(image))
        assert own.is_written("t", as_path(image))
    assert SoftTargetCache.open(as_path(tmp_path / "own.zarr")).tile_ids == ["t"]


def load_a_config(cached, as_path, tmp_path, **_):
    (tmp_path / "mine.yaml").write_text(dump_config(cached))
    assert load_config(as_path(tmp_path / "mine.yaml")) == cached


def build_from_a_checkpoint(as_path, weights, **_):
    built = build_student("unet", 6, encoder=ENCODER, checkpoint=as_path(weights))
    expected = torch.load(weights, weights_only=True)
    assert all(torch.equal(value, expected[name]) for name, value in built.state_dict().items())


def load_weights(as_path, weights, **_):
    load_student_weights(build_student("unet", 6, encoder=ENCODER), as_path(weights))


def load_a_trained_student(make_config, as_path, monkeypatch, tmp_path, **_):
    monkeypatch.chdir(tmp_path)
    config = make_config(distill__mode="none", data__val=[], train__max_steps=1)
    folder = train(config, torch.device("cpu")).weights
    assert load_trained(as_path(f"{folder}/last.ckpt")).position.steps == 1


def verify_with_a_folder_and_a_checkpoint(make_config, landscape, as_path, weights, tmp_path, **_):
    images = sorted((landscape / "Train/images").iterdir())[:1]
    saved = write_all(tmp_path / "saved", images, "logits")
    config = make_config(
        teacher={"predictions": str(saved), "are": "logits", "classes": CLASSES},
        cache__path=str(tmp_path / "none.zarr"),
    )
    report = verify(config, "quick", "cpu", reference=as_path(saved), student=as_path(weights))
    assert len(report.reference.tiles) == 1
    assert report.findings == []


def pack_a_cache(cached, as_path, tmp_path, **_):
    assert pack(as_path(cached.cache.path), as_path(tmp_path / "c.zarr.zip")).tiles == [6]


def unpack_a_cache(cached, as_path, tmp_path, **_):
    packed = pack(cached.cache.path, tmp_path / "c.zarr.zip").files
    assert unpack([as_path(file) for file in packed], as_path(tmp_path / "back.zarr")).tiles == 6


CALLS = {
    "kdpipe.cache.SoftTargetCache.open": open_a_cache,
    "kdpipe.cache.SoftTargetCache.create": create_a_cache,
    "kdpipe.cache.packing.pack.pack": pack_a_cache,
    "kdpipe.cache.packing.unpack.unpack": unpack_a_cache,
    "kdpipe.configs.load_config": load_a_config,
    "kdpipe.pipeline.models.student.build_student": build_from_a_checkpoint,
    "kdpipe.pipeline.models.student.load_student_weights": load_weights,
    "kdpipe.pipeline.runs.checkpoint.load_trained": load_a_trained_student,
    "kdpipe.pipeline.verify.verify": verify_with_a_folder_and_a_checkpoint,
}


def parameters():
    """The public functions and methods, each with the names of its parameters."""
    for name in NAMES:
        found = pydoc.locate(name)
        if inspect.isclass(found):
            for part in (part for part in dir(found) if not part.startswith("_") and part in vars(found)):
                if callable(getattr(found, part)):
                    yield f"{name}.{part}", set(inspect.signature(getattr(found, part)).parameters)
        elif callable(found):
            yield name, set(inspect.signature(found).parameters)


def test_every_public_name_that_takes_a_path_is_called_here():
    assert {name for name, given in parameters() if given & TAKES_A_PATH} == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_a_public_name_takes_a_path_of_any_kind(
    name, as_path, cached, make_config, landscape, weights, tmp_path, monkeypatch
):
    CALLS[name](
        as_path=as_path, cached=cached, make_config=make_config, landscape=landscape, weights=weights, tmp_path=tmp_path,
        monkeypatch=monkeypatch,
    )  # fmt: skip
