"""Where runs may write."""

from __future__ import annotations

from pathlib import Path

from kdpipe.configs.errors import ConfigError


def output_path(path: str | Path, key: str) -> Path:
    """
    `path`, made absolute, if it may be written to.

    Raises `ConfigError` naming `key` where it lies in a Python package: `cache/` and `data/` of a checkout hold source.
    """
    absolute = Path(path).expanduser().resolve()
    package = next((folder for folder in (absolute, *absolute.parents) if (folder / "__init__.py").exists()), None)
    if package is not None:
        raise ConfigError(f"{key}: {absolute} lies in the Python package {package}; choose a folder outside of it")
    return absolute
