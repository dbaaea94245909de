"""The versions of the libraries that compute and store the values of a cache."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version

LIBRARIES = (
    "kdpipe",
    "torch",
    "segmentation-models-pytorch",
    "timm",
    "numpy",
    "zarr",
    "numcodecs",
    "rasterio",
    "albumentations",
)


def library_versions() -> dict[str, str]:
    """The installed version of each: recorded in caches and checkpoints, not part of the fingerprint."""
    return {name: _installed(name) for name in LIBRARIES}


@cache  # each takes milliseconds to parse, and none changes while a process runs
def _installed(name: str) -> str:
    return version(name)


def other_libraries(recorded: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Libraries whose version now differs from the recorded one, with both: a reason to warn, never to refuse."""
    installed = library_versions()
    return {
        name: (then, installed[name])
        for name, then in recorded.items()
        if name in installed and installed[name] != then
    }


def library_note(recorded: Mapping[str, str]) -> str | None:
    """One line on `other_libraries`; None if there are none."""
    others = other_libraries(recorded)
    if not others:
        return None
    pairs = "; ".join(f"{name} {then}, installed is {now}" for name, (then, now) in others.items())
    return f"note: the cache was computed with {pairs}; the values are not recomputed for that"
