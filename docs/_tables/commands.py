"""The commands as Markdown: an overview, then usage, help and options of each."""

import inspect

import click
from _tables.markdown import cell, in_cell, plain

from kdpipe.pipeline.commands.main import cli

LONGEST_SUMMARY = 200  # of a command, in characters


def section(_given: str = "") -> str:
    """A table of all commands, and a section for each, in the order of `kdpipe --help`."""
    group = click.Context(cli, info_name="kdpipe")
    found = {name: command for name in cli.list_commands(group) if (command := cli.get_command(group, name))}
    rows = [
        f"| [`{name}`](#{name}) | {cell(command.get_short_help_str(LONGEST_SUMMARY))} |"
        for name, command in found.items()
    ]
    overview = "\n".join(["| command | what it does |", "| --- | --- |", *rows])
    return "\n\n".join([overview, *(_command(group, name, command) for name, command in found.items())])


def _command(group: click.Context, name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name, parent=group)
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    records = [option.get_help_record(context) for option in command.params if isinstance(option, click.Option)]
    rows = [f"| `{in_cell(record[0])}` | {cell(_meaning(record[1]))} |" for record in records if record]
    options = "\n".join(["| option | meaning |", "| --- | --- |", *rows])
    return "\n\n".join([f"## {name}", f"`{usage}`", *_paragraphs(command.help or ""), options])


def _meaning(text: str) -> str:
    """The help of an option with what click adds in brackets, `[default: 12; x>=0]`, in words."""
    text, bracket, added = text.rstrip("]").partition("  [")
    return f"{text} ({added.replace('x>=', 'at least ')})" if bracket else text


def _paragraphs(text: str) -> list[str]:
    """Paragraphs of a help text; click marks with a backspace those that keep their lines."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return [
        f"```text\n{inspect.cleandoc(paragraph[1:])}\n```" if paragraph.startswith("\b") else plain(paragraph)
        for paragraph in paragraphs
    ]
