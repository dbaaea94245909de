"""Folders that output may be written to."""

from __future__ import annotations

from pathlib import Path

from kdpipe.configs.errors import ConfigError
from kdpipe.configs.os_errors import explained


def output_path(path: str | Path, key: str) -> Path:
    """
    `path`, made absolute.

    Raises `ConfigError` naming `key` for a path that the operating system refuses, and for one in a Python package, because `cache/` and
    `data/` of a checkout hold source.
    """
    with explained(f"{key}: looking for", path, ConfigError):
        try:
            absolute = Path(path).expanduser().resolve()
        except RuntimeError as err:  # a link that leads back to itself, or `~` of a user who is not known
            raise ConfigError(f"{key}: {path} leads nowhere ({err}): correct the path") from err
        package = next((folder for folder in (absolute, *absolute.parents) if (folder / "__init__.py").exists()), None)
    if package is not None:
        raise ConfigError(f"{key}: {absolute} lies in the Python package {package}; choose a folder outside of it")
    return absolute
