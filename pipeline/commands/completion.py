"""
Shell completion: candidates for half-typed arguments, and the command that prints a shell's script.

Each candidate function is a `shell_complete` of click: from the context, the parameter and the incomplete word to the candidates that
begin with that word. A shell calls at every press of a key, so nothing heavy is imported; only keys cost the import of the schema.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    ZshComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

WEIGHTS = (".pth", ".pt", ".ckpt", ".safetensors")
RUNS = "model_weights"  # folder of stage two's runs, as <group>/<name>
RUN_FILE = "run.json"
DEVICES = ("cpu", "cuda", "cuda:0", "mps")
MAPPINGS = ("normalize", "stretch")  # values that may be a small mapping, given whole: {percentiles: [2, 98]}
COMPLETE_VARIABLE = "_KDPIPE_COMPLETE"  # click's, for a program called kdpipe

Candidates = list[str] | list[CompletionItem[str]]
Completer = Callable[[click.Context, click.Parameter, str], Candidates]


def configs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of shipped configs, and YAML files."""
    shipped = [name for name in _shipped() if name.startswith(incomplete)]
    return shipped + list(_paths(incomplete, (".yaml", ".yml")))


def overrides(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """`key=` for the keys of a configuration and, after the `=`, the values of a key that has only a few."""
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
    """Files of weights, and folders; a folder named `.zarr` is a cache, to which no slash is added."""
    return [path.removesuffix("/") if path.endswith(".zarr/") else path for path in _paths(incomplete, WEIGHTS)]


def checkpoint_then_roots(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """A checkpoint first, then folders of tiles; folders alone with `--teacher`."""
    given = context.params.get("paths") or context.params.get("teacher")
    return list(_paths(incomplete, () if given else WEIGHTS))


def folders(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Folders."""
    return list(_paths(incomplete, ()))


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Any file, completed by the shell itself."""
    return [CompletionItem(incomplete, type="file")]


def runs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Runs in `model_weights` that are not named yet; if there are none, any folder."""
    named = {path.rstrip("/") for path in context.params.get("runs") or ()}
    found = sorted(str(path.parent) for path in Path(RUNS).glob(f"*/*/{RUN_FILE}"))
    matching = [path for path in found if path.startswith(incomplete) and path not in named]
    return matching or list(_paths(incomplete, ()))


def devices(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of devices, present or not: only torch could tell."""
    return [name for name in DEVICES if name.startswith(incomplete)]


def _shipped() -> list[str]:
    """The result of `configs.load.shipped_configs` without importing pydantic: `find_spec` imports only the parents of a package."""
    spec = find_spec("kdpipe.configs")
    places = spec.submodule_search_locations if spec else None
    folder = Path(next(iter(places or ["."])))
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def _paths(incomplete: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Folders, with a `/` at the end, and files of the suffixes that begin with `incomplete`; hidden ones only if it begins with a dot."""
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
    """The dotted keys of a configuration that hold a value, each with its choices if there are only a few."""
    from kdpipe.configs.schema import Config

    return dict(_keys_of(Config, ""))


def _keys_of(model: Any, prefix: str) -> Iterator[tuple[str, list[str]]]:
    for name, field in model.model_fields.items():
        kinds = list(_kinds(field.annotation))
        section = next((kind for kind in kinds if name not in MAPPINGS and hasattr(kind, "model_fields")), None)
        if section is None:
            yield f"{prefix}{name}", [choice for kind in kinds for choice in _choices(kind)]
        else:
            yield from _keys_of(section, f"{prefix}{name}.")


def _kinds(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type: both of `Literal["none"] | MeanStd`; a list is one, as an item of it is no value of the key."""
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


BASH = """\
%(complete_func)s() {
    local type value
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain)
                [[ $value == *[=/] ]] && compopt -o nospace
                [[ $value == *[[:space:]]* ]] && printf -v value %%q "$value"
                COMPREPLY+=("$value")
                ;;
        esac
    done < <(env COMP_WORDS="${COMP_LINE:0:COMP_POINT}" COMP_BREAKS="$COMP_WORDBREAKS" %(complete_var)s=bash_complete "$1")
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


@add_completion_class
class WholeWords(BashComplete):
    """
    Bash's completion of whole words.

    Bash breaks words at `=` and `:`: `--set train.precision=b` arrives as five words, and a candidate replaces the last of them. Here
    click completes the words between spaces, and what bash keeps of the word is cut off each candidate.
    """

    source_template = BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the cursor, and the incomplete one up to the cursor."""
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)
        incomplete = words.pop() if len(words) > 1 and not line.endswith((" ", "\t")) else ""
        breaks = [character for character in "=:" if character in os.environ.get("COMP_BREAKS", "=:")]
        self._kept = 1 + max((incomplete.rfind(character) for character in breaks), default=-1)
        return words[1:], incomplete

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        """The candidates without what bash keeps. click's own lack the `--option=` before a value, which bash keeps anyway."""
        found = super().get_completions(args, incomplete)
        kept = incomplete[: self._kept]
        for item in found:
            item.value = item.value.removeprefix(kept)
        return found


@add_completion_class
class OpenEnds(ZshComplete):
    """Zsh's completion without a space after a folder or `key=`, where the user types on."""

    source_template = ZshComplete.source_template.replace(
        'completions+=("$key")',
        'if [[ "$key" == *[=/] ]]; then compadd -U -S "" -- "$key"; else completions+=("$key"); fi',
    )


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """
    Print the completion script of a shell.

    It completes commands, options, configs, their keys, files and runs. To install it:

    \b
    bash   echo 'eval "$(kdpipe completion bash)"' >> ~/.bashrc
    zsh    echo 'eval "$(kdpipe completion zsh)"' >> ~/.zshrc
    fish   kdpipe completion fish > ~/.config/fish/completions/kdpipe.fish
    """  # noqa: D301 - \b is how click keeps the lines below it
    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(context.find_root().command, {}, "kdpipe", COMPLETE_VARIABLE).source(), nl=False)
