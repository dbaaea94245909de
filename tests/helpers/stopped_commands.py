"""
Commands of `kdpipe` as processes of a group of their own, forked from one that has imported everything, so that each starts in a moment.

Run as a program, it forks a command for each line of JSON that it reads, prints its id, and then how it ended. A command can be made to
stay at a moment: it touches a file there and sleeps.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def _stay(owner, name, mark, seconds, calls=1):
    """Have the function `name` of `owner` sleep from its `calls`-th call on, before it does what it does."""
    original, seen = getattr(owner, name), []

    def slow(*arguments, **options):
        seen.append(1)
        if len(seen) >= calls:
            Path(mark).touch()
            time.sleep(seconds)
        return original(*arguments, **options)

    setattr(owner, name, slow)


def _stay_at(moment, mark):
    import torch

    from kdpipe.pipeline.evaluation import evaluate
    from kdpipe.pipeline.prediction import model
    from kdpipe.pipeline.teacher.frozen import FrozenTeacher
    from kdpipe.pipeline.training import run, validation
    from kdpipe.pipeline.training.loop import Loop

    # What cannot be left sleeps for a second, what must be left at once for longer than a test waits.
    places = {
        "set-up": (run, "list_tiles", 60, 1),
        "step": (Loop, "_train_batch", 1, 2),
        "checkpoint": (torch, "save", 1, 2),
        "validation": (validation, "padded_logits", 60, 1),
        "prediction": (FrozenTeacher, "cached_values", 60, 4),
        "scores": (evaluate, "_count", 60, 1),
        "window": (model, "averaged_logits", 1, 2),
    }
    if moment in places:
        owner, name, seconds, calls = places[moment]
        _stay(owner, name, mark, seconds, calls)


def _be(argv, moment, mark, output, folder):
    os.setsid()
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    _stay_at(moment, mark)
    from kdpipe.pipeline.commands.main import main

    sys.argv = ["kdpipe", *argv]
    main()


def _launch():
    import torch

    import kdpipe.pipeline.commands.actions.maps
    import kdpipe.pipeline.commands.actions.precompute
    import kdpipe.pipeline.commands.actions.results
    import kdpipe.pipeline.commands.actions.train  # noqa: F401

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _be(**json.loads(line))
            sys.exit(0)
        print(pid, flush=True)
        sys.stdin.readline()  # until then its number is nobody else's, even if it has ended
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class StoppedCommands:
    """Starts commands one after another, each in a group of its own, and sends them signals."""

    def __init__(self):
        self._launcher = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._launcher.stdout.readline().strip() == "ready"

    def stopped(self, argv, folder, moment="", mark="mark", number=signal.SIGTERM):
        """
        The exit code of `kdpipe ARGV` in `folder`, its seconds from a signal to its end, and its output.

        The signal is sent once the file `mark` is there, as `timeout` sends it: to the process, and to its group. Ctrl-C is sent to
        the group alone.
        """
        output, mark = folder / "output.txt", folder / mark
        request = {"argv": argv, "moment": moment, "mark": str(mark), "output": str(output), "folder": str(folder)}
        self._launcher.stdin.write(json.dumps(request) + "\n")
        self._launcher.stdin.flush()
        pid = int(self._launcher.stdout.readline())
        deadline = time.monotonic() + 120
        while not mark.exists() and time.monotonic() < deadline and _runs(pid):
            time.sleep(0.005)
        assert mark.exists(), output.read_text()
        start = time.monotonic()
        if number != signal.SIGINT:  # a terminal sends it once, and a second one ends a command at once
            os.kill(pid, number)
        os.killpg(pid, number)
        self._launcher.stdin.write("\n")
        self._launcher.stdin.flush()
        code = int(self._launcher.stdout.readline())
        return code, time.monotonic() - start, output.read_text()

    def close(self):
        self._launcher.stdin.close()
        self._launcher.wait()
        self._launcher.stdout.close()


def _runs(pid):
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


if __name__ == "__main__":
    _launch()
