"""Folders that output may be written to."""

from __future__ import annotations

from pathlib import Path

from kdpipe.configs.errors import ConfigError


def output_path(path: str | Path, key: str) -> Path:
    """
    `path`, made absolute.

    Raises `ConfigError` naming `key` if it lies in a Python package, because `cache/` and `data/` of a checkout hold source.
    """
    absolute = Path(path).expanduser().resolve()
    package = next((folder for folder in (absolute, *absolute.parents) if (folder / "__init__.py").exists()), None)
    if package is not None:
        raise ConfigError(f"{key}: {absolute} lies in the Python package {package}; choose a folder outside of it")
    return absolute
