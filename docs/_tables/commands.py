"""The commands as Markdown: an overview, then usage, help and options of each."""

import inspect

import click
from _tables.markdown import cell, in_cell, plain

from kdpipe.pipeline.commands.main import SECTIONS

LONGEST_SUMMARY = 200  # of a command, in characters


def section(_given: str = "") -> str:
    """A table of all commands by their sections in `kdpipe --help`, then a part for each command."""
    rows = [
        f"| {'' if place else title} | [`{command.name}`](#{command.name}) | {cell(_summary(command))} |"
        for title, commands in SECTIONS.items()
        for place, command in enumerate(commands)
    ]
    overview = "\n".join(["| | command | what it does |", "| --- | --- | --- |", *rows])
    return "\n\n".join([overview, *(_command(command) for commands in SECTIONS.values() for command in commands)])


def _summary(command: click.Command) -> str:
    return command.get_short_help_str(LONGEST_SUMMARY)


def _command(command: click.Command) -> str:
    context = click.Context(command, info_name=f"kdpipe {command.name}")
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    records = [option.get_help_record(context) for option in command.params if isinstance(option, click.Option)]
    rows = [f"| `{in_cell(record[0])}` | {cell(_meaning(record[1]))} |" for record in records if record]
    options = "\n".join(["| option | meaning |", "| --- | --- |", *rows])
    return "\n\n".join([f"## {command.name}", f"`{usage}`", *_paragraphs(command.help or ""), options])


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
