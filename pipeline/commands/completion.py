"""
What a shell may put in the place of a half-typed argument: names of configs, keys and their values, files, runs.

Each function answers click's `shell_complete`: `(context, parameter, incomplete)` to the candidates that begin with `incomplete`. A
shell asks at every press of a key, so that nothing heavy is imported: only keys cost the import of the schema.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from click.shell_completion import CompletionItem

WEIGHTS = (".pth", ".pt", ".ckpt", ".safetensors")
RUNS = "model_weights"  # where stage two puts them, as <group>/<name>
RUN_FILE = "run.json"
DEVICES = ("cpu", "cuda", "cuda:0", "mps")

Candidates = list[str] | list[CompletionItem[str]]
Completer = Callable[[click.Context, click.Parameter, str], Candidates]


def configs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The shipped configs' names, and YAML files."""
    shipped = [name for name in _shipped() if name.startswith(incomplete)]
    return shipped + list(_paths(incomplete, (".yaml", ".yml")))


def overrides(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """`key=` for the keys of a configuration, and after the `=` the values of those that have a few."""
    key, equals, value = incomplete.partition("=")
    keys = _keys()
    if not equals:
        return [f"{name}=" for name in keys if name.startswith(key)]
    return [f"{key}={choice}" for choice in keys.get(key, []) if choice.startswith(value)]


def weights(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Files of weights."""
    return list(_paths(incomplete, WEIGHTS))


def students(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Students' checkpoints, and ONNX files."""
    return list(_paths(incomplete, (*WEIGHTS, ".onnx")))


def weights_or_cache(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Files of weights, and folders whose name ends in `.zarr` as they are."""
    return [path.removesuffix("/") if path.endswith(".zarr/") else path for path in _paths(incomplete, WEIGHTS)]


def checkpoint_then_roots(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """A checkpoint first, folders of tiles after it, or at once with `--teacher`."""
    given = context.params.get("paths") or context.params.get("teacher")
    return list(_paths(incomplete, () if given else WEIGHTS))


def folders(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Folders."""
    return list(_paths(incomplete, ()))


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Any file, by the shell's own means."""
    return [CompletionItem(incomplete, type="file")]


def runs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Folders of runs: those in `model_weights` that are not named yet, else any folder."""
    named = {path.rstrip("/") for path in context.params.get("runs") or ()}
    found = sorted(str(path.parent) for path in Path(RUNS).glob(f"*/*/{RUN_FILE}"))
    matching = [path for path in found if path.startswith(incomplete) and path not in named]
    return matching or list(_paths(incomplete, ()))


def devices(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of devices, whether or not they are here: to know, torch would have to be imported."""
    return [name for name in DEVICES if name.startswith(incomplete)]


def _shipped() -> list[str]:
    """As `configs.load.shipped_configs`, without the import of pydantic: `find_spec` imports nothing of a package but its parents."""
    spec = find_spec("kdpipe.configs")
    places = spec.submodule_search_locations if spec else None
    folder = Path(next(iter(places or ["."])))
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def _paths(incomplete: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Folders, which end in `/`, and files of the suffixes, as far as they begin with what is typed; hidden ones if it does."""
    head, slash, start = incomplete.rpartition("/")
    with suppress(OSError, RuntimeError):  # no such folder, no permission, no such user's home
        for entry in sorted(Path(head + slash or ".").expanduser().iterdir()):
            if not entry.name.startswith(start) or (entry.name.startswith(".") and not start.startswith(".")):
                continue
            if entry.is_dir():
                yield f"{head}{slash}{entry.name}/"
            elif entry.suffix.lower() in suffixes:
                yield f"{head}{slash}{entry.name}"


def _keys() -> dict[str, list[str]]:
    """The dotted keys of a configuration that hold a value, and its choices where there are a few."""
    from kdpipe.configs.schema import Config

    return dict(_keys_of(Config, ""))


def _keys_of(model: Any, prefix: str) -> Iterator[tuple[str, list[str]]]:
    for name, field in model.model_fields.items():
        kinds = list(_kinds(field.annotation))
        section = next((kind for kind in kinds if name not in OPEN and hasattr(kind, "model_fields")), None)
        if section is None:
            yield f"{prefix}{name}", [choice for kind in kinds for choice in _choices(kind)]
        else:
            yield from _keys_of(section, f"{prefix}{name}.")


OPEN = ("normalize", "stretch")  # values that may be a small mapping: written whole, as {percentiles: [2, 98]}


def _kinds(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type: of `Literal["none"] | MeanStd` both; of a list none, as one value of it is no value of the key."""
    if annotation is None or annotation is type(None):
        return
    if get_origin(annotation) in (Literal, list, tuple, dict) or not get_args(annotation):
        yield annotation
        return
    for part in get_args(annotation):
        yield from _kinds(part)


def _choices(kind: Any) -> list[str]:
    if kind is bool:
        return ["true", "false"]
    return [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
