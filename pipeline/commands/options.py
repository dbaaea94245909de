"""Options, exit codes and the loading of configs and actions that the commands share."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kdpipe.pipeline.commands import completion
from kdpipe.pipeline.text import printable

if TYPE_CHECKING:
    from kdpipe.configs import Config

Command = TypeVar("Command", bound=Callable[..., Any])

EXIT_FINDINGS, EXIT_USAGE, EXIT_REFUSED = 1, 2, 3


def run(action: str, /, *arguments: Any, **options: Any) -> Any:
    """
    Import and call an action, named by its module in `kdpipe.pipeline.commands.actions` and its function: `train.train_student`.

    Importing torch takes seconds, which `--help`, completion and the refusal of a config must not wait for. So a command
    declares its options and loads its config by itself, and its action imports the rest.
    """
    module, _, function = action.partition(".")
    return getattr(_imported(f"kdpipe.pipeline.commands.actions.{module}"), function)(*arguments, **options)


def load(source: str, overrides: tuple[str, ...]) -> Config:
    """The configuration that `-c` and `--set` name."""
    config: Config = _imported("kdpipe.configs").load_config(source, overrides)
    if config.cache.path.startswith("memory://"):
        from kdpipe.configs.errors import ConfigError

        raise ConfigError(
            f"cache.path: {config.cache.path} ends with the process that writes it: name a folder, or a URL such as s3://…"
        )
    return config


def load_open(source: str, overrides: tuple[str, ...]) -> tuple[Config, list[str]]:
    """The configuration, and the teacher classes whose row of its class map is still FILL_IN."""
    found: tuple[Config, list[str]] = _imported("kdpipe.configs").load_open_config(source, overrides)
    return found


def _imported(name: str) -> Any:
    """A module, imported without garbage collection: the half million objects that imports make are not garbage."""
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()  # modules stay; searching them for garbage, at exit too, would take a second
        gc.enable()


def complain(message: str) -> None:
    """Print one paragraph to standard error."""
    click.echo(f"kdpipe: {printable(message)}", err=True)


def _writable(context: click.Context, option: click.Parameter, path: str | None) -> str | None:
    """The path, if a file can be written there: refused before hours of work, not after them."""
    if path is None or context.resilient_parsing:  # a shell that completes must neither be refused nor make folders
        return path
    from kdpipe.configs.files import try_to_write
    from kdpipe.configs.outputs import output_path

    try_to_write(output_path(path, option.opts[0]), path, f"{option.opts[0]}: writing")
    return path


def file_option(name: str, variable: str, help_text: str, default: str | None = None) -> Callable[[Command], Command]:
    """An option that names a file to write."""
    return click.option(
        name, variable, metavar="FILE", type=click.Path(dir_okay=False), default=default, show_default=True,
        callback=_writable, help=help_text,
    )  # fmt: skip


def config_option(help_text: str, *names: str, required: bool = False) -> Callable[[Command], Command]:
    """An option that names a configuration."""
    return click.option(
        *names, "source", required=required, metavar="CONFIG", shell_complete=completion.configs, help=help_text
    )


set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", shell_complete=completion.overrides,
    help="Override a key of CONFIG: --set train.epochs=2. Repeatable.",
)  # fmt: skip
window_option = click.option(
    "--window",
    type=click.IntRange(64),
    metavar="PX",
    help="Predict tiles too large for memory in windows of this side.",
)


def _trusting(context: click.Context, option: click.Parameter, trusts: bool) -> None:
    if trusts:
        from kdpipe.pipeline.runs.trust import trusting_code

        context.with_resource(trusting_code())


trust_option = click.option(
    "--trust-code", is_flag=True, expose_value=False, callback=_trusting,
    help="Import modules that a checkpoint names. Only if you know where it came from.",
)  # fmt: skip


def limit_option(nouns: str = "tiles") -> Callable[[Command], Command]:
    """The option `--limit N` of a command that goes over `nouns`."""
    help_text = f"For a trial: take at most N {nouns}, spread evenly over all."
    return click.option("--limit", type=click.IntRange(1), metavar="N", help=help_text)


def common_options(*, device: bool) -> Callable[[Command], Command]:
    """Add `--json`, `--debug` and, to a command that computes, `--device`."""

    def added(command: Command) -> Command:
        # `main` looks for --debug in the arguments: an error may come before they are parsed.
        debugged = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")(
            command
        )
        if device:
            help_text = "cuda, cuda:1, mps or cpu. Default: the best one available."
            debugged = click.option("--device", metavar="NAME", shell_complete=completion.devices, help=help_text)(
                debugged
            )
        return file_option("--json", "json_path", "Write the result as JSON.")(debugged)

    return added


def with_config(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a command that runs on a configuration; `--limit N` is one of the overrides that it is called with."""

    @wraps(command)  # with the options that it has already
    def limited(*, limit: int | None, overrides: tuple[str, ...], **options: Any) -> Any:
        further = () if limit is None else (f"data.limit={limit}",)
        return command(overrides=(*overrides, *further), **options)

    source = config_option("A YAML file, or the name of a shipped config.", "-c", "--config", required=True)
    return source(set_option(limit_option()(common_options(device=True)(limited))))
