"""Whole networks of other libraries: a folder of transformers, an exported file; and folders of predictions. Nothing in them is run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache import tile
from kdpipe.configs.errors import CheckpointError
from kdpipe.configs.schema.teacher import Are
from kdpipe.data.declared.header import read_declared
from kdpipe.data.rasters import read_bands
from kdpipe.pipeline.models.external import exported, transformers_folder
from kdpipe.pipeline.teacher.predictions.arrays import ARRAYS, SUM_TOLERANCE, read_array
from kdpipe.pipeline.teacher.predictions.files import files_in

EXPORTED = (".onnx", ".pt2")
MOST_BYTES = 2**32  # of the one array that is looked at


@dataclass(frozen=True)
class External:
    """
    A network that needs no architecture in the configuration, or predictions that another program made.

    `key` is the one of `teacher` that names it, `sha256` that of each file that determines it. `classes` are named in its files (empty
    where they are not), and `channels` is their number, None if unknown. `input_shape` is `(N, bands, H, W)`; words are sizes that may
    vary. `preprocessing` says how a folder of transformers prepares images. `are` is what predictions seem to hold, by the first file.
    """

    path: str
    key: Literal["pretrained", "file", "predictions"]
    network: str
    channels: int | None
    classes: list[str]
    input_shape: list[int | str] | None
    preprocessing: dict[str, Any]
    size_bytes: int
    sha256: dict[str, str]
    are: Are | None = None


def is_external(path: str) -> bool:
    """Whether a path is a folder that `save_pretrained` wrote or that holds predictions, or an exported network by its ending."""
    if (Path(path) / transformers_folder.CONFIG).is_file() or Path(path).suffix in EXPORTED:
        return True
    return _holds_predictions(Path(path))


def _holds_predictions(folder: Path) -> bool:
    """Whether a folder is no cache, and its first file can hold predictions: an array, or a raster that is no picture."""
    if not folder.is_dir() or (folder / tile.METADATA_NAME).exists():
        return False
    first = next((path for _, path in files_in(folder)), None)
    return first is not None and (first.suffix.lower() in ARRAYS or read_declared(first).rgb is None)


def inspect_external(path: str) -> External:
    """A description of the network at `path`. Raises `CheckpointError` where it cannot be read."""
    if Path(path).is_dir():
        return _inspect_predictions(Path(path)) if _holds_predictions(Path(path)) else _inspect_folder(Path(path))
    exported.load_exported(path, "teacher")  # refuses what stage one would refuse
    inputs, channels = exported.shapes(path)
    digests = exported.digests(path, "teacher")
    return External(
        path=path,
        key="file",
        network="an ONNX network" if path.endswith(".onnx") else "a network of torch.export",
        channels=channels,
        classes=[],
        input_shape=inputs,
        preprocessing={},
        size_bytes=_size_of(Path(path).parent, digests),
        sha256=digests,
    )


def _inspect_folder(folder: Path) -> External:
    try:
        config = json.loads((folder / transformers_folder.CONFIG).read_text(encoding="utf-8"))
        kind = (config.get("architectures") or [config["model_type"]])[0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as err:
        raise CheckpointError(
            f"{folder / transformers_folder.CONFIG} is not a configuration of transformers: {err}"
        ) from err
    classes, digests = transformers_folder.class_names(folder), transformers_folder.digests(folder)
    return External(
        path=str(folder),
        key="pretrained",
        network=f"{kind} of transformers",
        channels=len(classes) or None,
        classes=classes,
        input_shape=None,
        preprocessing=_preprocessing(folder),
        size_bytes=_size_of(folder, digests),
        sha256=digests,
    )


def _inspect_predictions(folder: Path) -> External:
    """The number of files and their size in bytes, and the kind of the first one's values."""
    files = [path for _, path in files_in(folder)]
    values = read_array(files[0], MOST_BYTES) if files[0].suffix.lower() in ARRAYS else _bands_of(files[0])
    channels: int | None = None
    are: Are | None = None
    if values.ndim == 2 or (values.ndim == 3 and len(values) == 1 and values.dtype.kind in "iu"):
        are = "classes"
    elif values.ndim == 3:
        channels = len(values)
        are = "probabilities" if _are_probabilities(values) else "logits"
    shape = ", ".join(map(str, values.shape))
    return External(
        path=str(folder), key="predictions", channels=channels, classes=[], input_shape=None, preprocessing={}, sha256={},
        network=f"{len(files)} files of predictions, the first of {values.dtype} ({shape})",
        size_bytes=sum(path.stat().st_size for path in files), are=are,
    )  # fmt: skip


def _are_probabilities(values_CHW: NDArray[Any]) -> bool:
    known_HW = np.isfinite(values_CHW).all(axis=0)
    if values_CHW.dtype.kind in "iu":  # scaled
        return bool(values_CHW.min() >= 0)
    probs_Cn = values_CHW[:, known_HW]
    return bool(probs_Cn.size and probs_Cn.min() >= 0 and np.abs(probs_Cn.sum(axis=0) - 1).max() <= SUM_TOLERANCE)


def _bands_of(path: Path) -> NDArray[Any]:
    """All bands of a raster as stored, `(C, H, W)`."""
    return read_bands(path, range(1, read_declared(path).bands + 1), "band")[0]


def _preprocessing(folder: Path) -> dict[str, Any]:
    """The steps that the file of the image processor names; empty where there is none."""
    try:
        found = transformers_folder.processor_settings(folder)
    except (OSError, ValueError):
        return {}
    steps = {}
    if found.get("do_resize", True) and "size" in found:
        steps["size"] = found["size"]
    if found.get("do_normalize", True):
        steps |= {key: found[key] for key in ("image_mean", "image_std") if key in found}
    return steps


def _size_of(folder: Path, names: dict[str, str]) -> int:
    return sum((folder / name).stat().st_size for name in names)
