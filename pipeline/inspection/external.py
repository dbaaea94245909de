"""Whole networks of other libraries: a folder of transformers, an exported file. Nothing in them is run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kdpipe.configs.errors import CheckpointError
from kdpipe.pipeline.models.external import exported, transformers_folder

EXPORTED = (".onnx", ".pt2")


@dataclass(frozen=True)
class External:
    """
    A network that needs no architecture in the configuration.

    `key` is the one of `teacher` that names it, `sha256` that of each file that determines it. `classes` are named in its files (empty
    where they are not), and `channels` is their number, None if unknown. `input_shape` is `(N, bands, H, W)`; words are sizes that may
    vary. `preprocessing` says how a folder of transformers prepares images.
    """

    path: str
    key: Literal["pretrained", "file"]
    network: str
    channels: int | None
    classes: list[str]
    input_shape: list[int | str] | None
    preprocessing: dict[str, Any]
    size_bytes: int
    sha256: dict[str, str]


def is_external(path: str) -> bool:
    """Whether a path is a folder that `save_pretrained` wrote, or an exported network by its ending."""
    return (Path(path) / transformers_folder.CONFIG).is_file() or Path(path).suffix in EXPORTED


def inspect_external(path: str) -> External:
    """A description of the network at `path`. Raises `CheckpointError` where it cannot be read."""
    if Path(path).is_dir():
        return _inspect_folder(Path(path))
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


def _preprocessing(folder: Path) -> dict[str, Any]:
    """The steps that the file of the image processor names; empty where there is none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found = found.get("image_processor", found)
        steps = {}
        if found.get("do_resize", True) and "size" in found:
            steps["size"] = found["size"]
        if found.get("do_normalize", True):
            steps |= {key: found[key] for key in ("image_mean", "image_std") if key in found}
        return steps
    return {}


def _size_of(folder: Path, names: dict[str, str]) -> int:
    return sum((folder / name).stat().st_size for name in names)
