"""
Files of weights, examined before and while torch reads them.

torch compares no checksums, believes a pickle that states how large the records of its archive are, and lets it allocate what it likes.
So the archive is compared with its own checksums first, tensors are mapped, which keeps them within the file, and copied.

No code in a file is executed. Not covered: a pickle that is made to be slow, such as one whose keys take an exponential time to hash.
"""

from __future__ import annotations

import copy
import mmap
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.configs.errors import CheckpointError, KdpipeError
from kdpipe.configs.os_errors import told

UNREADABLE = "is not a readable checkpoint: damaged, or not a file that torch.save wrote"
MAX_PICKLE_BYTES = (
    2**24
)  # structure and names alone: some hundred thousand tensors. Read, it may take fifty times as much
MAX_VALUES = 2**24  # that lists stand for, as a pickle may name one list many times
MAX_EMPTY_BYTES = 2**26  # of a tensor that repeats one stored number, as `expand` makes them
_ZIP_START, _ZIP_END, _ZIP_END_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22
_CHUNK_BYTES = 2**20
# Functions that torch.load calls for a file, with which a few bytes in it become gigabytes. Weights need none of them.
_ALLOCATING = re.compile(
    rb"c(builtins|__builtin__)\n(bytearray)\n|c(_codecs)\n(encode)\n|c(torch\._utils)\n(_rebuild_device_tensor_from_\w+)\n"
)


@contextmanager
def readable(file: Path, otherwise: str = UNREADABLE) -> Iterator[None]:
    """
    Turn any exception of the libraries that read a file into a `CheckpointError`: the file, then `otherwise` and their reason.

    What the operating system says is told as such, as the file need not be damaged.
    """
    try:
        yield
    except (KdpipeError, pickle.UnpicklingError):  # the caller says what the pickle names
        raise
    except Exception as err:  # those of torch, zipfile, pickle and safetensors have no class in common
        if isinstance(err, OSError) and err.errno is not None:
            raise told(err, "reading", file, CheckpointError) from err
        raise CheckpointError(f"{file} {otherwise}{reason_of(err)}") from err


def reason_of(err: Exception) -> str:
    """`: first line of the error`, cut off where it is long; empty where the error has no words, such as a `KeyError` for a byte."""
    lines = str(err).strip().splitlines()
    if not lines or isinstance(err, KeyError | IndexError):
        return ""
    return f": {lines[0][:200].rstrip('.')}"


def names_in_archive(file: Path) -> list[str]:
    """The names of the records in a file of torch.save or torch.jit.save; empty for another file, such as one of an old torch.save."""
    if not _is_archive(file):
        return []
    with zipfile.ZipFile(file) as archive:
        return archive.namelist()


def load_pickled(file: Path) -> Any:
    """
    The content of a file of torch.save, on the CPU; nothing in it is executed.

    Raises `CheckpointError` where an archive's records differ from their checksums or are not those that torch.save writes,
    `pickle.UnpicklingError` where the pickle names more than weights need, and torch's own exceptions for other damage.
    """
    is_archive = _is_archive(file)
    if is_archive:
        with readable(file), zipfile.ZipFile(file) as archive:
            check_archive(file, archive)
    else:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _refuse_allocating(content)
    with warnings.catch_warnings():
        # torch warns of pickles from other versions, and raises for those it cannot read.
        warnings.simplefilter("ignore")
        loaded = torch.load(str(file), map_location="cpu", weights_only=True, mmap=is_archive)
    if _expanded(loaded, {}) > MAX_VALUES:
        raise CheckpointError(
            f"{file} {UNREADABLE}: its lists hold each other, and written out they have more than {MAX_VALUES} values"
        )
    for tensor in _tensors(loaded):
        _check_tensor(file, tensor)
    return copy.deepcopy(loaded) if is_archive else loaded  # a mapped tensor would change with its file


def _is_archive(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(_ZIP_START)) == _ZIP_START


def check_archive(file: Path, archive: zipfile.ZipFile) -> None:
    """
    Raise `CheckpointError` unless an archive of torch can be read in one way only, and its records have their checksums.

    zipfile and torch would take different records where names repeat, or where another directory follows the first.
    """
    with file.open("rb") as stream:
        stream.seek(-_ZIP_END_BYTES, 2)
        if not stream.read().startswith(_ZIP_END):  # what follows could hold a second directory, which torch might take
            raise CheckpointError(f"{file} {UNREADABLE}: it does not end as its archive does")
    records = archive.infolist()
    names = [record.filename for record in records]
    if len(set(names)) < len(names):
        raise CheckpointError(f"{file} {UNREADABLE}: it has two records of one name")
    if any(
        record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size for record in records
    ):
        raise CheckpointError(f"{file} {UNREADABLE}: its records are compressed, which torch.save never does")
    has_checksums = any(
        record.CRC for record in records
    )  # all are 0 under torch.serialization.set_crc32_options(False)
    for record in records:
        is_pickle = record.filename.endswith(".pkl")
        if is_pickle and record.file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{file}: the names and the structure of its tensors take {record.file_size} bytes, more than the {MAX_PICKLE_BYTES} "
                "that are read; save the weights alone"
            )
        if not has_checksums:
            record.CRC = None  # type: ignore[assignment]  # zipfile then compares nothing
        with archive.open(record) as part:
            if is_pickle:
                _refuse_allocating(part.read())
            while part.read(_CHUNK_BYTES):
                pass


def _refuse_allocating(content: Any) -> None:
    found = _ALLOCATING.search(content)
    if found:
        module, name = (part.decode() for part in found.groups() if part is not None)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def _expanded(value: Any, known: dict[int, int]) -> int:
    """Number of values in nested mappings and lists, where each counts as often as it is held; `known` are those counted before."""
    if not isinstance(value, Mapping | list | tuple | set):
        return 1
    if id(value) not in known:
        known[id(value)] = MAX_VALUES  # while it is counted, as a list within itself has no end
        parts = value.values() if isinstance(value, Mapping) else value
        known[id(value)] = min(1 + sum(_expanded(part, known) for part in parts), MAX_VALUES + 1)
    return known[id(value)]


def _tensors(content: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings, lists and tuples, once."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value


def _check_tensor(file: Path, tensor: Tensor) -> None:
    """Raise `CheckpointError` unless a tensor is an ordinary one, whose numbers lie in the file."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not is_plain or tensor.is_nested:
        kind = "a nested" if tensor.is_nested else f"a {str(tensor.layout).removeprefix('torch.')} {tensor.device.type}"
        raise CheckpointError(
            f"{file} holds {kind} {type(tensor).__name__}, expected tensors whose numbers are in the file"
        )
    size_bytes = tensor.numel() * tensor.element_size()
    if size_bytes > max(tensor.untyped_storage().nbytes(), MAX_EMPTY_BYTES):
        raise CheckpointError(
            f"{file} {UNREADABLE}: a tensor of {tuple(tensor.shape)} would take {size_bytes} bytes, and "
            f"{tensor.untyped_storage().nbytes()} are stored"
        )
