"""
Students that start from a semantic segmentation network of Hugging Face transformers, with our classes and bands.

Unlike a teacher, such a student is given normalised images of any size, as every student is, and not the file's own preprocessing: crops
are neither resized nor rounded. Its checkpoint holds the configuration of transformers as JSON, so that it is built again without the
folder; nothing that such a text names is fetched or imported.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdpipe.configs.errors import CheckpointError, ConfigError, extra_text, summarise
from kdpipe.configs.schema import MeanStd
from kdpipe.pipeline.models.external.encoder import encoder_of
from kdpipe.pipeline.models.external.transformers_folder import (
    CONFIG,
    PROCESSORS,
    SMALLEST_SCORE,
    class_names,
    load_network,
    local_folder,
    model_class,
    processor_settings,
)
from kdpipe.pipeline.models.normalize import COLOURS, adapted_to_bands
from kdpipe.pipeline.models.weights import load_strictly

ONEFORMER, TASK = "oneformer", "the task is semantic"
VOCABULARIES = ("tokenizer.json", "vocab.json")
OF_SQUARES = ("dpt",)  # types of networks that take square images alone, and whose logits have the images' size
BANDS = "num_channels"  # in the configuration of a network, or of its backbone
MAX_NUMBER = 2**20  # in a recorded configuration: no size of a network comes near
# Keys of a configuration by which transformers or timm would fetch a network, or run code, and those that name where one came from.
FETCHING = ("backbone", "use_pretrained_backbone", "auto_map", "quantization_config", "custom_pipelines")
ORIGINS = ("_name_or_path", "name_or_path", "_commit_hash", "_attn_implementation", "attn_implementation")


class TransformersStudent(nn.Module):
    """
    A network of transformers from normalised images `(N, B, H, W)` to logits `(N, C, h, w)`, at its own resolution.

    Networks that predict masks (Mask2Former, MaskFormer, OneFormer) score a class by a sum of probabilities; their logits are its
    logarithm. `task_1L` are the tokens of OneFormer's task, int64, which are saved with the weights.
    """

    task_1L: Tensor | None

    def __init__(self, network: Any, task_1L: Tensor | None = None) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("task_1L", task_1L)

    def forward(self, images_NBHW: Tensor) -> Tensor:
        height, width = images_NBHW.shape[-2:]
        if self.network.config.model_type in OF_SQUARES and height != width:
            side = max(height, width)
            squares_NBSS = functional.pad(images_NBHW, (0, side - width, 0, side - height), mode="replicate")
            whole_NCSS: Tensor = self(squares_NBSS)
            return whole_NCSS[..., :height, :width]
        task = {} if self.task_1L is None else {"task_inputs": self.task_1L.expand(images_NBHW.shape[0], -1)}
        outputs = self.network(pixel_values=images_NBHW, **task)
        masks_NQhw = getattr(outputs, "masks_queries_logits", None)
        if masks_NQhw is None:
            logits: Tensor = outputs.logits
            return logits
        shares_NQC = outputs.class_queries_logits.float().softmax(dim=-1)[..., :-1]  # the last class is "no object"
        return log_scores(shares_NQC, masks_NQhw.float())

    @property
    def description(self) -> str:
        """The configuration from which `described_student` builds the network again, as JSON."""
        return json.dumps(dict(_without_origin(self.network.config.to_dict())), sort_keys=True)


def log_scores(shares_NQC: Tensor, masks_NQhw: Tensor) -> Tensor:
    """
    The logarithm of Σ_q share_qc · σ(mask_q), float32 `(N, C, h, w)`, finite where no query claims a pixel and every sigmoid underflows.

    Each sigmoid is taken relative to the largest of its pixel. It is written as softplus, which ONNX has too.
    """
    logs_NQhw = -functional.softplus(-masks_NQhw)
    largest_N1hw = logs_NQhw.amax(dim=1, keepdim=True)
    relative_NChw = torch.einsum("nqc,nqhw->nchw", shares_NQC, (logs_NQhw - largest_N1hw).exp())
    return relative_NChw.clamp(min=SMALLEST_SCORE).log() + largest_N1hw


def untrained_pretrained(name: str, classes: Sequence[str], in_channels: int) -> TransformersStudent:
    """The network of a folder, or of a repository of the hub, for our classes and bands, with random weights."""
    folder = _folder(name)
    config = _configured(folder, classes, in_channels)
    return _built(config, f"student.pretrained: {name}", _task_of(folder, config))


def pretrained_student(
    name: str, classes: Sequence[str], in_channels: int, say: Callable[[str], None]
) -> TransformersStudent:
    """
    The network of a folder with its weights, for our classes and bands.

    `say` is called with a sentence on each part that does not keep its weights: a head for other classes, a head that the file lacks,
    filters for three bands. Raises `CheckpointError` where the folder cannot be used, or its weights lack a part of the encoder.
    """
    folder = _folder(name)
    key = f"student.pretrained {name}"
    source, info = load_network(folder, "student")
    config = _configured(folder, classes, in_channels)
    student = _built(config, key, _task_of(folder, config))
    own, state = student.network.state_dict(), dict(source.state_dict())
    missing, found = sorted(map(str, info["missing_keys"])), class_names(folder)
    _refuse_without_encoder(student.network, missing, key)
    if missing:
        say(f"{key} has no weights of {summarise(missing, 3)}: they start from random ones")
    head = _head(folder, classes, own)
    if any(name in state and state[name].shape != own[name].shape for name in head):
        state |= {name: own[name] for name in head}
        say(f"{key} is for {len(found) or 'other'} classes, and classes.names has {len(classes)}: its head starts anew")
    elif not missing and set(found) == set(classes) and found != list(classes):
        order = [found.index(each) for each in classes]
        state |= {name: _in_order(state[name], order) for name in head}
        say(f"{key} has the classes of classes.names in another order: the channels of its head change places")
    load_strictly(student.network, adapted_to_bands(student.network, state, key, say), origin=key)
    return student


def described_student(description: str, origin: str) -> TransformersStudent:
    """
    The network of a `TransformersStudent.description`, with random weights; no file is read and nothing is fetched.

    Raises `CheckpointError`, which names `origin`, where the text is not such a description, or names what would have to be fetched.
    """
    try:
        content = json.loads(description)
        fetching = [name for name, value in _pairs(content) if name in FETCHING and value]
        numbers = [value for _, value in _pairs(content) if isinstance(value, int) and abs(value) > MAX_NUMBER]
        kind, settings = content["model_type"], dict(_without_origin(content))
    except (ValueError, TypeError, LookupError, RecursionError) as err:
        raise CheckpointError(
            f"{origin} should hold the configuration of a network of transformers, found no JSON of one"
        ) from err
    if fetching or numbers:
        what = (
            f"the key {fetching[0]}, by which transformers would fetch a network or run code"
            if fetching
            else f"the size {numbers[0]}"
        )
        raise CheckpointError(
            f"the network of transformers that {origin} describes has {what}: kdpipe writes none, so the file was changed "
            "after it was saved"
        )
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if k != "model_type"})
    except Exception as err:  # transformers raises whatever an odd configuration makes it stumble on
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot build the network that {origin} describes, which was written with "
            f"{content.get('transformers_version', 'another version')}: {type(err).__name__}: {_first(err)}"
        ) from err
    return _built(config, origin)


def own_normalization(name: str, in_channels: int) -> MeanStd:
    """
    The normalisation of x / 255 in a folder's `preprocessor_config.json`, repeated in turn for another number of bands than three.

    Raises `CheckpointError` where there is no such file, or it has no mean and deviation of three bands.
    """
    folder = _folder(name)
    try:
        found = processor_settings(folder)
        scale = 1 / (255 * float(found.get("rescale_factor", 1 / 255))) if found.get("do_rescale", True) else 1 / 255
        mean, std = ([float(x) * scale for x in found[key]] for key in ("image_mean", "image_std"))
        if not found.get("do_normalize", True):
            mean, std = [0.0] * COLOURS, [scale] * COLOURS
        if (len(mean), len(std)) != (COLOURS, COLOURS):
            raise ValueError(f"a mean of {len(mean)} bands")
        places = [i % COLOURS for i in range(in_channels)]
        return MeanStd(mean=tuple(mean[i] for i in places), std=tuple(std[i] for i in places))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as err:
        raise CheckpointError(
            f"student.pretrained: {folder / PROCESSORS[0]} should hold image_mean and image_std of three bands, found none "
            f"({type(err).__name__}): give the folder its image processor, or set student.normalize"
        ) from err


def _folder(name: str) -> Path:
    folder = local_folder(name, "student", download=True)
    assert folder is not None
    return folder


def _transformers() -> Any:
    try:
        found: Any = importlib.import_module("transformers")
    except ImportError as err:
        raise ConfigError(f"student.pretrained needs transformers; {extra_text('transformers')}") from err
    found.logging.set_verbosity_error()
    return found


def _configured(folder: Path, classes: Sequence[str], in_channels: int) -> Any:
    """The folder's configuration with our classes and bands; `CheckpointError` where it cannot have so many bands."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"student.pretrained: {folder} has no {CONFIG}: give a folder that save_pretrained wrote")
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as err:  # transformers raises whatever a damaged file makes it stumble on
        raise CheckpointError(
            f"student.pretrained: transformers cannot read {folder / CONFIG}: {type(err).__name__}: {_first(err)}"
        ) from err
    if any(name in FETCHING and value for name, value in _pairs(config.to_dict())):
        raise CheckpointError(
            f"student.pretrained: the network of {folder} takes its backbone from timm or from a repository, which a checkpoint "
            "must not fetch: take a network with a backbone_config of transformers, or build it in a module of your own (student.model)"
        )
    config.id2label = dict(enumerate(classes))  # num_labels follows
    config.label2id = {name: number for number, name in enumerate(classes)}
    if in_channels != COLOURS:
        holders = [each for each in (getattr(config, "backbone_config", None), config) if hasattr(each, BANDS)]
        if not holders:
            raise CheckpointError(
                f"student.pretrained: networks of the type {config.model_type} see three bands, and the student sees {in_channels}: "
                "choose three in student.bands"
            )
        setattr(holders[0], BANDS, in_channels)
    return config


def _task_of(folder: Path, config: Any) -> Tensor | None:
    """The tokens of the text that tells OneFormer to segment semantically, `(1, L)`, by the folder's tokenizer; None for other networks."""
    if config.model_type != ONEFORMER:
        return None
    try:
        if not any((folder / name).is_file() for name in VOCABULARIES):  # transformers would take an empty one
            raise FileNotFoundError(f"it has no {' or '.join(VOCABULARIES)}")
        tokenizer = _transformers().AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        found = tokenizer([TASK], padding="max_length", max_length=config.task_seq_len, truncation=True)
    except Exception as err:  # transformers raises whatever a damaged or missing file makes it stumble on
        raise CheckpointError(
            f"student.pretrained: OneFormer is told its task by a text, and transformers cannot read the tokenizer of {folder}: "
            f"{type(err).__name__}: {_first(err)}"
        ) from err
    return torch.tensor(found["input_ids"]) * torch.tensor(found["attention_mask"])  # as OneFormerProcessor does


def _built(config: Any, origin: str, task_1L: Tensor | None = None) -> TransformersStudent:
    transformers = _transformers()
    if config.model_type == ONEFORMER:
        config.is_training = False  # otherwise it needs a text beside each image
        if task_1L is None:  # of a checkpoint, which holds them
            task_1L = torch.zeros(1, config.task_seq_len, dtype=torch.int64)
    network_class = model_class(transformers, config)
    try:
        return TransformersStudent(network_class.from_config(config, trust_remote_code=False).float(), task_1L)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as err:
        raise CheckpointError(
            f"{origin}: transformers cannot build the network: {type(err).__name__}: {_first(err)}"
        ) from err


def _refuse_without_encoder(network: nn.Module, missing: Sequence[str], key: str) -> None:
    """A file of an encoder alone lacks the decoder; one that lacks a part of the encoder is another network's."""
    encoder = encoder_of(network)
    inner = {id(each) for each in encoder.parameters()} if encoder is not None else set()
    lacking = [name for name in missing if id(dict(network.named_parameters()).get(name)) in inner]
    if lacking:
        raise CheckpointError(
            f"{key} lacks weights of the encoder that its {CONFIG} describes: {summarise(lacking, 3)}"
        )


def _head(folder: Path, classes: Sequence[str], own: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors whose first axis is the classes: those that one more class makes longer."""
    with torch.device("meta"):  # holds no values
        larger = _built(_configured(folder, [*classes, "one more"], COLOURS), "student.pretrained").network.state_dict()
    return [name for name, value in own.items() if len(value.shape) and len(larger[name]) > len(value)]


def _in_order(value: Tensor, order: Sequence[int]) -> Tensor:
    """The rows of a head in another order; a last one for "no object" stays."""
    return value[torch.tensor([*order, *range(len(order), len(value))])]


def _without_origin(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A configuration without the keys that say where the network came from, nested ones too."""
    for name, value in content.items():
        if name not in ORIGINS:
            yield name, dict(_without_origin(value)) if isinstance(value, Mapping) else value


def _pairs(content: Any) -> Iterator[tuple[str, Any]]:
    """All names in nested mappings and lists with their values."""
    parts = content.items() if isinstance(content, Mapping) else enumerate(content) if isinstance(content, list) else ()
    for name, value in parts:
        yield str(name), value
        yield from _pairs(value)


def _first(err: Exception) -> str:
    lines = str(err).strip().splitlines()
    return lines[0][:300] if lines else "no reason given"
