"""
Students that kdpipe did not train: an exported file or the weights of a network, described by a configuration of the user's.

Neither says what its classes, bands and normalisation are, which the configuration does. A module that it names is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from kdpipe.configs.errors import CheckpointError
from kdpipe.configs.schema import Config, Percentiles
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.models.external.exported import ExportedNetwork, OnnxNetwork, load_exported
from kdpipe.pipeline.models.external.outputs import AtImageSize
from kdpipe.pipeline.models.student import bands_of, load_student_weights, untrained_student, with_own_normalization
from kdpipe.pipeline.models.weights import read_checkpoint
from kdpipe.pipeline.runs.checkpoint import Position, Trained, is_of_a_student

EXPORTED = (".onnx", ".pt2", ".torchscript")


def trained_elsewhere(path: str | Path, config: Config, say: Callable[[str], None] = lambda line: None) -> Trained:
    """
    The student of an exported file (`.onnx`, `.pt2`), or `config.student` with the weights of a file, in eval mode on the CPU.

    `say` is called with a sentence on what is not taken as it is. Raises `CheckpointError` where the file does not fit the configuration,
    and for a checkpoint of `train-student`, which carries its own.
    """
    config = with_own_normalization(config)
    student = _exported(path, config, say) if Path(path).suffix in EXPORTED else _of_weights(path, config, say)
    # Percentiles are taken from the training tiles; any other stretch needs none of them.
    by_tiles = isinstance(config.data.stretch, Percentiles)
    stretch = resolve_stretch(config.data, list_tiles(config.data, "train") if by_tiles else [])
    return Trained(
        student=student.eval().requires_grad_(False),
        config=config,
        stretch=None if stretch is None else [(low, high) for low, high in stretch],
        position=Position(),
        file=Path(path).name,
    )


def refuse_undescribed(path: str | Path) -> None:
    """Raise `CheckpointError` for an exported file, where no configuration describes it."""
    if Path(path).suffix in EXPORTED:
        raise CheckpointError(
            f"{path} does not say what its classes, bands and normalisation are: add -c CONFIG, whose classes.names, data.bands, "
            "data.stretch, student.bands and student.normalize are those of the network"
        )


def _exported(path: str | Path, config: Config, say: Callable[[str], None]) -> nn.Module:
    network = load_exported(str(path), "")
    assert isinstance(network, OnnxNetwork | ExportedNetwork)
    classes, bands = len(config.classes.names), bands_of(config)
    for what, wanted, found, key in (
        ("classes", classes, network.channels, "classes.names"),
        ("bands", bands, network.input_shape[1], "student.bands"),
    ):
        is_sigmoid = what == "classes" and (wanted, found) == (2, 1)
        if isinstance(found, int) and found != wanted and not is_sigmoid:
            raise CheckpointError(
                f"{path} is a network of {found} {what}, and the configuration has {wanted}: name those of the network in {key}, "
                "in its order"
            )
    return AtImageSize(network, classes, str(path), say)


def _of_weights(path: str | Path, config: Config, say: Callable[[str], None]) -> nn.Module:
    if Path(path).suffix != ".safetensors" and is_of_a_student(read_checkpoint(path)):
        raise CheckpointError(
            f"{path} is a checkpoint of `kdpipe train-student`, and carries its own configuration: leave -c out"
        )
    student = untrained_student(config, say=say)
    load_student_weights(student, path, say=say)
    return student
