"""
Teachers that are not networks of smp: a module of the user's own, a folder of transformers, an exported file, a network that is passed in
Python, stored predictions.

For each: the network, and the fields of a recipe that say what determines its values.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.configs.errors import CheckpointError
from kdpipe.configs.files import file_sha256
from kdpipe.configs.schema import Teacher
from kdpipe.pipeline.teacher.given import given_fields, given_network

if TYPE_CHECKING:
    from torch import nn


def load_foreign(teacher: Teacher, key: str, say: Callable[[str], None]) -> nn.Module:
    """
    The network of a teacher that `model`, `pretrained`, `file` or `given` names, with logits at the size of its images.

    `say` is called with a sentence on what is not taken as it is. Raises `ConfigError` and `CheckpointError`, which name `key`.
    """
    from kdpipe.pipeline.models.external.outputs import AtImageSize

    network = _network(teacher, key, say)
    return AtImageSize(network, len(teacher.classes), f"{key}.{teacher.kind}", say)


def _network(teacher: Teacher, key: str, say: Callable[[str], None]) -> nn.Module:
    if teacher.given is not None:
        return given_network(key, teacher.given)
    if teacher.pretrained is not None:
        from kdpipe.pipeline.models.external.transformers_folder import load_pretrained

        return load_pretrained(teacher.pretrained, teacher.classes, key)
    if teacher.file is not None:
        from kdpipe.pipeline.models.external.exported import load_exported

        return load_exported(teacher.file, key)
    from kdpipe.pipeline.models.external.own_module import build_own, load_own_weights

    assert teacher.model is not None
    assert teacher.checkpoint is not None
    network = build_own(teacher.model, teacher.options, f"{key}.model")
    load_own_weights(network, teacher.checkpoint, teacher.weights, key, say)
    return network


def source_fields(teacher: Teacher, key: str, *, required: bool = False) -> dict[str, Any]:
    """
    The fields of a recipe that say which network a teacher is.

    Those of files that are not on this disk are left out, as training from a cache does not need them; with `required` they raise
    `CheckpointError`, which names `key`.
    """
    fields: dict[str, Any] = {
        "architecture": teacher.architecture.lower() if teacher.architecture else None,
        "encoder": teacher.encoder,
        "model": teacher.model,
        "options": teacher.options,
        "weights": teacher.weights,
        "predictions": teacher.are,
        "given": teacher.given,
    }
    if teacher.predictions is not None:  # their content is in the digest of each tile
        return fields | {"checkpoint_sha256": None, "files_sha256": None}
    if teacher.given is not None:
        return fields | given_fields(key, teacher.given, required=required) | {"files_sha256": None}
    if teacher.pretrained is not None:
        from kdpipe.pipeline.models.external.transformers_folder import digests, local_folder

        folder = local_folder(teacher.pretrained, key, download=required)
        return fields | ({"files_sha256": digests(folder)} if folder is not None else {})
    if teacher.file is not None:
        from kdpipe.pipeline.models.external.exported import digests as digests_of_export

        if _is_here(teacher.file, f"{key}.file", required):
            fields["files_sha256"] = digests_of_export(teacher.file, key)
        return fields | {"checkpoint_sha256": None}
    assert teacher.checkpoint is not None
    if _is_here(teacher.checkpoint, f"{key}.checkpoint", required):
        fields["checkpoint_sha256"] = file_sha256(teacher.checkpoint)
    if teacher.model is not None:
        fields |= _own_fields(teacher.model, key, required)
    return fields | {"files_sha256": None}


def _own_fields(model: str, key: str, required: bool) -> dict[str, str | None]:
    from kdpipe.pipeline.models.external.own_module import find_source

    source = find_source(model)
    if source is not None:
        return {"source_sha256": source.sha256, "source_version": source.version}
    if required:
        raise CheckpointError(
            f"{key}.model: no module {model.partition(':')[0]} among the installed packages or in {Path.cwd()}"
        )
    return {}


def _is_here(path: str, key: str, required: bool) -> bool:
    if not Path(path).is_file() and required:
        raise CheckpointError(f"{key}: no file at {Path(path).absolute()}")
    return Path(path).is_file()
