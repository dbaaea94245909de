"""What the commands share: options, exit codes, and the few lines before and after the function that each of them calls."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kdpipe.pipeline.commands import completion

if TYPE_CHECKING:
    from rich.console import Console

    from kdpipe.configs import Config
    from kdpipe.pipeline.commands.console import ConsoleProgress

Command = TypeVar("Command", bound=Callable[..., Any])

EXIT_FINDINGS, EXIT_USAGE, EXIT_REFUSED = 1, 2, 3


def _writable(context: click.Context, option: click.Parameter, path: str | None) -> str | None:
    """The path, if a file can be written there: said before hours of work, not after them."""
    if path is None or context.resilient_parsing:  # while a shell completes, nothing is checked or made
        return path
    from kdpipe.configs.errors import ConfigError
    from kdpipe.configs.outputs import output_path

    file = output_path(path, option.opts[0])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConfigError(f"{option.opts[0]} {path}: its folder cannot be made: {err.strerror}") from err
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"{option.opts[0]} {path}: there is no permission to write it")
    return path


def file_option(name: str, variable: str, help_text: str, default: str | None = None) -> Callable[[Command], Command]:
    """An option that names a file to write."""
    kind = click.Path(dir_okay=False)
    return click.option(
        name,
        variable,
        metavar="FILE",
        type=kind,
        default=default,
        show_default=True,
        callback=_writable,
        help=help_text,
    )


json_option = file_option("--json", "json_path", "Write the result as JSON.")
debug_option = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
device_option = click.option(
    "--device",
    metavar="NAME",
    shell_complete=completion.devices,
    help="cuda, cuda:1, mps or cpu; the best one there is by default.",
)


def with_config(command: Command) -> Command:
    """The options that every command on a configuration has."""
    for option in (
        debug_option,
        device_option,
        json_option,
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            shell_complete=completion.overrides,
            help="Override a key: --set train.epochs=2.",
        ),
        click.option(
            "-c",
            "--config",
            "source",
            required=True,
            metavar="CONFIG",
            shell_complete=completion.configs,
            help="A YAML file, or a shipped config's name.",
        ),
    ):
        command = option(command)
    return command


def load(source: str, overrides: tuple[str, ...]) -> Config:
    """The configuration that `-c` and `--set` name."""
    from kdpipe.configs import load_config

    return load_config(source, overrides)


def open_console() -> tuple[Console, ConsoleProgress]:
    """Where results are printed, and where progress is shown; called once a command has imported what it needs (see `cli.main`)."""
    from rich.console import Console

    from kdpipe.pipeline.commands.console import ConsoleProgress

    gc.freeze()  # modules stay: to look through them for garbage, at the end too, takes a second
    gc.enable()
    console = Console()
    return console, ConsoleProgress(console)


def write_json(path: str | None, content: dict[str, Any]) -> None:
    """Write a result where `--json` asks for it."""
    if path is not None:
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def complain(message: str) -> None:
    """One paragraph on standard error."""
    click.echo(f"kdpipe: {message}", err=True)
