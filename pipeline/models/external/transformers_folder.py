"""
Semantic segmentation networks of Hugging Face transformers, with the preprocessing and post-processing of their own files.

The file's own processor prepares the images and turns the outputs into scores, as a script of the teacher's owner does.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.configs.errors import CheckpointError, ConfigError, extra_text
from kdpipe.configs.files import file_sha256

CONFIG = "config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the second also has a tokenizer's settings
DETERMINING = ("*.json", "*.txt", "*.safetensors")  # in the names of the files that determine what a network predicts
NOT_DETERMINING = ("trainer_state.json", "training_args.json")
# Scores of networks that predict masks are sums of probabilities. A logarithm needs more than zero.
SMALLEST_SCORE = 1e-12
# trust_remote_code: left to itself, transformers asks at the terminal whether to run a folder's code.
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
PICKLE_TO_SAFETENSORS = """\
from transformers import AutoModelForSemanticSegmentation
AutoModelForSemanticSegmentation.from_pretrained({folder!r}).save_pretrained({folder!r}, safe_serialization=True)
"""


def local_folder(name: str, key: str, *, download: bool) -> Path | None:
    """
    The folder of a pretrained network: `name` itself, or the local copy of the hub's repository of that name.

    With `download`, the hub is asked for what is not on this disk. Raises `CheckpointError`, which names `key`, where the folder cannot
    be had; without `download` it is None.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        if not download:
            return None
        raise CheckpointError(f"{key}.pretrained: no folder at {Path(name).absolute()}")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as err:
        raise ConfigError(f"{key}.pretrained needs transformers; {extra_text('transformers')}") from err
    try:
        return Path(snapshot_download(name, allow_patterns=list(DETERMINING), local_files_only=not download))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as err:
        if not download:
            return None
        raise CheckpointError(
            f"{key}.pretrained: {name} is neither a folder here nor can it be downloaded: {str(err).splitlines()[0]}. Give a folder "
            "that save_pretrained wrote"
        ) from err


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of each file that determines what the network in a folder predicts, by name."""
    found = {path for pattern in DETERMINING for path in folder.glob(pattern) if path.is_file()}
    return {path.name: file_sha256(str(path)) for path in sorted(found) if path.name not in NOT_DETERMINING}


def class_names(folder: Path) -> list[str]:
    """The classes that `config.json` names, in the order of the channels; empty where it names none."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        named = {int(number): str(name) for number, name in config["id2label"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [named[number] for number in sorted(named)] if sorted(named) == list(range(len(named))) else []


def processor_settings(folder: Path) -> dict[str, Any]:
    """What the folder's file says of its image processor; raises `OSError` where there is no file, `ValueError` for a damaged one."""
    file = next((folder / name for name in PROCESSORS if (folder / name).exists()), folder / PROCESSORS[0])
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no mapping")
    settings: dict[str, Any] = found.get("image_processor", found)
    return settings


class PretrainedSegmenter(nn.Module):
    """
    A network of transformers from RGB images, x / 255, float32 `(N, 3, H, W)`, to logits `(N, C, H, W)`.

    The images become 8-bit integers again, which the file's processor resizes and normalises; its semantic post-processing returns the
    scores at the image's size. The scores of networks that predict masks (Mask2Former, OneFormer, MaskFormer) are sums of
    probabilities; the logits are their logarithms, so that softmax gives each class its share of the scores.
    """

    prepares_images = True  # `views.padded_logits` passes the images on as they are

    def __init__(self, network: nn.Module, processor: Any) -> None:
        super().__init__()
        self.network = network
        self._processor = processor
        self._task = {"task_inputs": ["semantic"]} if hasattr(processor, "tokenizer") else {}  # OneFormer's

    def forward(self, images_N3HW: Tensor) -> Tensor:
        bytes_N3HW = (images_N3HW.float() * 255).round().clamp(0, 255).to(torch.uint8)
        count, _, height, width = bytes_N3HW.shape
        task = {name: value * count for name, value in self._task.items()}
        inputs = self._processor(images=list(bytes_N3HW), return_tensors="pt", **task).to(images_N3HW.device)
        outputs = self.network(**inputs)
        found = self._processor.post_process_semantic_segmentation(
            outputs, target_sizes=[(height, width)] * count, return_segmentation_scores=True
        )
        scores_NCHW = torch.stack([each["segmentation_scores"] for each in found]).float()
        if hasattr(outputs, "masks_queries_logits"):
            return scores_NCHW.clamp(min=SMALLEST_SCORE).log()
        return scores_NCHW


def load_pretrained(name: str, classes: Sequence[str], key: str) -> PretrainedSegmenter:
    """
    The network and the processor of a folder that `save_pretrained` wrote, or of a repository of the hub.

    No code and no pickle of the folder is loaded: weights come from safetensors alone. Raises `CheckpointError`, which names `key`, where
    anything is missing or does not fit, and where `classes` differ from the file's own in number or order.
    """
    folder = local_folder(name, key, download=True)
    assert folder is not None
    network, info = load_network(folder, key, lambda: _check_classes(folder, classes, key))
    unfit = {
        what: sorted(map(str, info[what]))
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(what)
    }
    if unfit:
        told = "; ".join(f"{what.replace('_keys', '')}: {', '.join(names[:3])}" for what, names in unfit.items())
        raise CheckpointError(f"{key}.pretrained: the weights in {folder} do not fit its {CONFIG}; {told}")
    return PretrainedSegmenter(network, _processor(folder, network, key)).eval().requires_grad_(False)


def load_network(
    folder: Path, key: str, check: Callable[[], None] = lambda: None
) -> tuple[nn.Module, Mapping[str, Any]]:
    """
    The network of a folder with its weights, float32, and what transformers says of keys that are missing or left over.

    `check` is called before any weights are read. Raises `CheckpointError` as `load_pretrained` does.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as err:
        raise ConfigError(f"{key}.pretrained needs transformers; {extra_text('transformers')}") from err
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{key}.pretrained: {folder} has no {CONFIG}: give a folder that save_pretrained wrote")
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{key}.pretrained: {folder} has no weights as .safetensors, and those of other kinds can execute code. If you trust where "
            "they came from, save them anew where that can do no harm:\n\n"
            + "\n".join(f"    {line}" for line in PICKLE_TO_SAFETENSORS.format(folder=str(folder)).splitlines())
        )
    check()
    with _told(folder, key):
        config = transformers.AutoConfig.from_pretrained(folder, **LOCAL)
        found: tuple[nn.Module, Mapping[str, Any]] = model_class(transformers, config).from_pretrained(
            folder, **LOCAL, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        return found


def _processor(folder: Path, network: Any, key: str) -> Any:
    transformers: Any = importlib.import_module("transformers")
    with _told(folder, key):
        with_text = network.config.model_type == "oneformer"
        return (transformers.AutoProcessor if with_text else transformers.AutoImageProcessor).from_pretrained(
            folder, **LOCAL
        )


@contextmanager
def _told(folder: Path, key: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as err:  # transformers raises whatever a damaged or unknown file makes it stumble on
        raise CheckpointError(
            f"{key}.pretrained: transformers cannot load {folder}: {type(err).__name__}: {_first(err)}"
        ) from err


def model_class(transformers: Any, config: Any) -> Any:
    """The class of transformers for a configuration; raises `CheckpointError` for one that does not segment semantically."""
    for auto in (
        transformers.AutoModelForSemanticSegmentation,
        transformers.AutoModelForUniversalSegmentation,
        transformers.AutoModelForInstanceSegmentation,
    ):
        if type(config) in auto._model_mapping:
            return auto
    raise CheckpointError(f"transformers has no semantic segmentation for networks of the type {config.model_type}")


def _check_classes(folder: Path, classes: Sequence[str], key: str) -> None:
    own = class_names(folder)
    if not own or (len(own) == len(classes) and (list(classes) == own or set(classes) != set(own))):
        return
    what = (
        f"the same classes as {folder / CONFIG}, in another order" if set(classes) == set(own)
        else f"{len(classes)} classes, and the network of {folder} has {len(own)}"
    )  # fmt: skip
    raise CheckpointError(
        f"{key}.classes names {what}. The file's own order:\n\n    {key}:\n      classes: [{', '.join(own)}]"
    )


def _first(err: Exception) -> str:
    lines = str(err).strip().splitlines()
    return lines[0] if lines else "no reason given"
