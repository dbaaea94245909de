"""Arrays of scores in `.npy` and `.npz` files, and what is wrong with the shape of one."""

from __future__ import annotations

import unicodedata
import zipfile
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.configs.errors import DataError, KdpipeError, summarise

ARRAYS = (".npy", ".npz")
LEAST_LIMIT_BYTES = 2**26  # of an array that is read; larger where the scores of the tile may be
SUM_TOLERANCE = 1e-2  # of a pixel's probabilities, which float16 may have rounded


def same_name(name: str) -> str:
    """A name in one Unicode form, as systems write names in several."""
    return unicodedata.normalize("NFC", name)


def most_bytes(channels: int, height: int, width: int) -> int:
    """The bytes that an array of scores may have, from generous types and shapes."""
    return max(LEAST_LIMIT_BYTES, 16 * (channels + 16) * height * width)


def read_array(path: Path, limit_bytes: int) -> NDArray[Any]:
    """
    The one array of a `.npy` or `.npz` file, whose header is checked before memory is asked for.

    Raises `DataError` for a file that is damaged, holds Python objects or several arrays, or declares more than `limit_bytes`.
    """
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                _require_size(path, file, limit_bytes)
                loaded: NDArray[Any] = np.load(path, allow_pickle=False)
                return loaded
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            named = [name.removesuffix(".npy") for name in names]
            if len(names) != 1:
                raise DataError(
                    f"{path} holds {len(names)} arrays ({summarise(named)}): save one, with np.savez(file, scores)"
                )
            with archive.open(names[0]) as part:
                _require_size(path, part, limit_bytes)
            with archive.open(names[0]) as part:
                array: NDArray[Any] = np.lib.format.read_array(part, allow_pickle=False)
                return array
    except KdpipeError:
        raise
    except Exception as err:  # those of NumPy, zipfile and zlib have no class in common
        if "pickle" in str(err) or "Object arrays" in str(err):  # so NumPy calls everything that is not its own
            raise DataError(
                f"{path} is damaged, or holds Python objects, which could execute code and are not read: save one float array, with "
                "np.save(file, scores)"
            ) from err
        raise DataError(f"cannot read {path} as a NumPy file: {err}") from err


def shape_hint(shape: tuple[int, ...], wanted: tuple[int, int, int]) -> str:
    """What an array of another shape than `wanted`, `(C, H, W)`, probably is, as the end of an error; empty if it is not known."""
    channels, height, width = wanted
    if shape == (height, width, channels):
        return ". This is (H, W, C): save scores.transpose(2, 0, 1)"
    if shape == (1, *wanted):
        return ". This is a batch of one: save scores[0]"
    if len(shape) == 2:
        return ". These are no scores of classes but one value for each pixel"
    if len(shape) != 3:
        return ""
    if shape[0] != channels:
        return ". Save every channel that the network predicts, those of teacher.drop_channels too"
    return ". Resize the scores to the tile's size, or crop what was padded, before they are saved"


def _require_size(path: Path, file: IO[bytes], limit_bytes: int) -> None:
    """Raise `DataError` where the header at the start of `file` claims a larger array."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if prod(shape) * dtype.itemsize > limit_bytes:
        raise DataError(
            f"{path} declares an array of {dtype} {shape}, far larger than the scores of its tile: save those of one tile"
        )
