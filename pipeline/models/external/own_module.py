"""
Networks from a function or class of the user's own, named as `package.module:callable`.

The file that defines it is found without importing anything, so that a cache can be checked where its packages are not installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.configs.errors import ConfigError
from kdpipe.configs.files import file_sha256
from kdpipe.configs.schema.options import options_text

if TYPE_CHECKING:
    from torch import nn

    from kdpipe.pipeline.models.unwrap import Choice


@dataclass(frozen=True)
class Source:
    """The file that defines a callable: its path, its sha256, and the version of the package that installed it (None without one)."""

    path: Path
    sha256: str
    version: str | None


def find_source(name: str) -> Source | None:
    """
    The file of `package.module` in `package.module:callable`, on `sys.path` or in the current folder; None where there is none.

    Imports nothing.
    """
    package, *rest = name.partition(":")[0].split(".")
    file = next((path for path in _files_of(package, rest) if path.is_file()), None)
    return Source(file, file_sha256(str(file)), _version(package)) if file else None


def _files_of(package: str, rest: list[str]) -> list[Path]:
    """Where the module can be: in the folders of its installed package, else below the current folder."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # ValueError for a module without a spec, such as __main__
        spec = None
    if spec is None:
        folders = [Path.cwd() / package]
    elif spec.submodule_search_locations is None:
        return [Path(spec.origin)] if spec.origin and not rest else []
    else:
        folders = [Path(folder) for folder in spec.submodule_search_locations]
    modules = [folder.joinpath(*rest) for folder in folders]
    return [path for module in modules for path in (module / "__init__.py", module.with_suffix(".py"))]


@cache
def _distributions() -> Mapping[str, list[str]]:
    """The installed distributions of each package: reading them takes most of a second."""
    return importlib.metadata.packages_distributions()


def _version(package: str) -> str | None:
    for distribution in _distributions().get(package, []):
        return importlib.metadata.version(distribution)
    return None


def build_own(name: str, options: Mapping[str, Any], key: str) -> nn.Module:
    """
    The network that `package.module:callable`, called with `options` by name, returns. This runs the module's code.

    Raises `ConfigError` as `import_own` does, and where the callable raises, or returns no `nn.Module`.
    """
    from torch import nn

    target = import_own(name, key, "a network")
    try:
        network = target(**options)
    except Exception as err:
        raise ConfigError(f"{key}: {name}{options_text(options)} raised {type(err).__name__}: {err}") from err
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{key}: {name} should return a torch.nn.Module, found {type(network).__name__}")
    return network


def import_own(name: str, key: str, returns: str) -> Callable[..., Any]:
    """
    The callable `package.module:name`. This runs the module's code.

    A module in the current folder is found too, behind those that are installed. Raises `ConfigError`, which names `key` and what the
    callable should return, where there is no such module or callable.
    """
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        target: Any = importlib.import_module(module)
    except Exception as err:  # whatever its own code raises
        where = (
            f"; modules are looked for among the installed packages and in {here}" if _is_missing(err, module) else ""
        )
        raise ConfigError(f"{key}: cannot import {module}: {type(err).__name__}: {err}{where}") from err
    try:
        for part in attribute.split("."):
            target = getattr(target, part)
    except AttributeError as err:
        raise ConfigError(f"{key}: {module} ({target_file(target)}) has no {attribute}") from err
    if not callable(target):
        raise ConfigError(
            f"{key}: {name} should be a function or a class that returns {returns}, found {type(target).__name__}"
        )
    own: Callable[..., Any] = target
    return own


def load_own_weights(
    network: nn.Module,
    path: str | Path,
    choice: Choice | None = None,
    key: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """
    Load a file of weights into a network of the user's own, strictly; `choice` is `weights` of the section `key`, if it has one.

    Names may have the prefixes of trainers, of kdpipe's checkpoints, or the network's own. `say` is called with a sentence on what is not
    taken as it is. Raises `CheckpointError` where a tensor does not fit.
    """
    from kdpipe.pipeline.models.unwrap import unwrapped
    from kdpipe.pipeline.models.weights import load_strictly, read_checkpoint

    weights = unwrapped(read_checkpoint(path), str(path), choice, key or "student")
    notes = load_strictly(network, _with_own_prefix(weights.state, weights.prefix, network), origin=str(path))
    for note in weights.notes(str(path), key) + notes:
        say(note)


def _with_own_prefix(state: Mapping[str, Any], prefix: str, network: nn.Module) -> dict[str, Any]:
    """The tensors with as much of the prefix that was taken from them as belongs to the network's own names."""
    own, parts = network.state_dict().keys(), prefix.split(".")[:-1]
    prefixes = ["".join(f"{part}." for part in parts[first:]) for first in range(len(parts), -1, -1)]
    best = max(prefixes, key=lambda each: sum(each + name in own for name in state))
    return {best + name: value for name, value in state.items()}


def target_file(target: object) -> str:
    """The file of a module, for messages."""
    return str(getattr(target, "__file__", None) or "built in")


def _is_missing(err: Exception, module: str) -> bool:
    return isinstance(err, ModuleNotFoundError) and err.name is not None and f"{module}.".startswith(f"{err.name}.")
