"""`kdpipe`: its commands in the order of the work, and how their errors end the process."""

from __future__ import annotations

import sys
import traceback

import click

from kdpipe.pipeline.commands.completion import completion
from kdpipe.pipeline.commands.maps import export, predict
from kdpipe.pipeline.commands.options import EXIT_USAGE, complain
from kdpipe.pipeline.commands.results import compare, evaluate, report
from kdpipe.pipeline.commands.setup import demo, init, inspect, sample_data, suggest_map
from kdpipe.pipeline.commands.stages import precompute_teacher, train_student, verify_cache
from kdpipe.pipeline.devices import ask_for_huge_pages, keep_freed_memory

SECTIONS = {
    "Set up": (init, inspect, suggest_map, sample_data, demo, completion),
    "The pipeline": (precompute_teacher, verify_cache, train_student),
    "Results": (evaluate, compare, report),
    "Maps": (predict, export),
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
    """Run `kdpipe`. A user's mistake ends in one paragraph and its exit code, any other error in a traceback."""
    ask_for_huge_pages()
    keep_freed_memory()
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        complain("aborted")
        sys.exit(EXIT_STOPPED)
    except click.ClickException as err:
        err.show()
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        complain("stopped at once; finished tiles and saved checkpoints are kept")
        sys.exit(EXIT_STOPPED)
    except Exception as err:
        from kdpipe.configs.errors import KdpipeError  # imports pydantic, which --help does without

        if not isinstance(err, KdpipeError):
            raise
        if "--debug" in sys.argv:
            traceback.print_exc()
        complain(str(err))
        sys.exit(err.exit_code)
