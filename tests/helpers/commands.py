"""Runs `kdpipe` in the process of the tests."""

import gc
import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from kdpipe.configs import dump_config
from kdpipe.pipeline.commands import main as cli


def run_command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """
    The result of `kdpipe ARGUMENTS`, as `subprocess.run` returns it, from its `main` in this process, which has imported torch.

    An error that `main` does not turn into an exit code is raised, so that a traceback fails the test.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["kdpipe", *map(str, arguments)])
        # Each would change the whole process, which other tests share.
        patch.setattr(cli, "keep_freed_memory", lambda: False)
        patch.setattr(cli, "ask_for_huge_pages", lambda: None)
        patch.setattr(cli, "answer_sigterm", lambda answer: None)
        for name in ("freeze", "disable"):
            patch.setattr(gc, name, lambda: None)
        if cwd is not None:
            patch.chdir(cwd)
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def arguments(config, command, *options, folder):
    """`kdpipe COMMAND -c CONFIG OPTIONS` as a list, with the config in a file in `folder`."""
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    return [command, "-c", str(path), *options]
