"""`kdpipe`: its commands in the order of the work, and how their errors end the process."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

import click

from kdpipe.pipeline.commands.caches import pack, unpack
from kdpipe.pipeline.commands.completion import completion
from kdpipe.pipeline.commands.maps import export, predict
from kdpipe.pipeline.commands.options import EXIT_FINDINGS, EXIT_USAGE, complain
from kdpipe.pipeline.commands.results import compare, evaluate, forecast, report
from kdpipe.pipeline.commands.setup import demo, init, inspect, sample_data, suggest_map
from kdpipe.pipeline.commands.stages import precompute_teacher, train_student, verify_cache
from kdpipe.pipeline.devices import ask_for_huge_pages, keep_freed_memory
from kdpipe.pipeline.text import printable

SECTIONS = {
    "Set up": (init, inspect, suggest_map, sample_data, demo, completion),
    "The pipeline": (precompute_teacher, verify_cache, train_student),
    "Results": (evaluate, forecast, compare, report),
    "Maps": (predict, export),
    "Caches": (pack, unpack),
}
EXIT_STOPPED = 130  # 128 + SIGINT


class Commands(click.Group):
    """A group that lists its commands by section, in their order, rather than by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        longest = max(map(len, self.commands))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                rows = [
                    (str(command.name).ljust(longest), command.get_short_help_str(formatter.width))
                    for command in commands
                ]
                formatter.write_dl(rows)


@click.group(
    cls=Commands,
    commands=[command for commands in SECTIONS.values() for command in commands],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="kdpipe")
def cli() -> None:
    """Distil a large land-cover teacher into a student you can deploy, and pay for the teacher once."""


def main() -> None:
    """
    Run `kdpipe`. A user's mistake ends in one paragraph and its exit code, any other error in a traceback.

    SIGTERM ends a command as Ctrl-C does, and its exit code is the same.
    """
    answer_sigterm(_interrupt)
    ask_for_huge_pages()
    keep_freed_memory()
    try:
        cli(standalone_mode=False)
    except (KeyboardInterrupt, click.exceptions.Abort) as err:  # click turns the first into the second
        is_end_of_input = isinstance(err.__cause__, EOFError)
        complain("aborted" if is_end_of_input else "stopped at once; finished tiles and saved checkpoints are kept")
        sys.exit(EXIT_STOPPED)
    except click.ClickException as err:
        err.show()
        sys.exit(EXIT_USAGE)
    except Exception as err:
        from kdpipe.configs.errors import KdpipeError  # imports pydantic, which --help does without
        from kdpipe.configs.os_errors import told

        if isinstance(err, BrokenPipeError) and err.filename is None:  # as in `kdpipe inspect … | head`
            _leave_pipe()
        # What the system says of a path that no code below had in mind.
        found = told(err, "working with") if isinstance(err, OSError) and err.errno is not None else err
        if not isinstance(found, KdpipeError):
            raise
        if "--debug" in sys.argv:
            click.echo(printable(traceback.format_exc()), err=True)
        complain(str(found))
        sys.exit(found.exit_code)
    finally:
        answer_sigterm(signal.SIG_IGN)


def answer_sigterm(answer: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Say what SIGTERM does, as `signal.signal` takes it, where a command does not answer it itself."""
    signal.signal(signal.SIGTERM, answer)


def _interrupt(number: int, frame: FrameType | None) -> None:
    answer_sigterm(signal.SIG_IGN)  # `timeout` and others send it twice
    raise KeyboardInterrupt


def _leave_pipe() -> None:
    """End, as nobody reads the output any more; the rest of it goes nowhere, or Python would complain of it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(EXIT_FINDINGS)
