"""
Time of a training step with the cache, with the live teacher and without a teacher: ratios, measured side by side.

    python tests/benchmarks/steps.py [CONFIG] [--steps N] [--rounds 4] [--d4 | --recipes] [--json FILE] [--set KEY=VALUE …]

The cache must be complete. On a CPU each mode is a process, and they take turns of two seconds (see `turns.py`); a GPU's pace is even, so
there the modes run one after another in this process. The first step is not timed, on a GPU the first ten. Reading and augmenting samples
is part of a step. `--d4` adds the live teacher with test-time augmentation d4; `--recipes` times the cached step with each of `RECIPES`
instead. Steps with a live teacher are long, so fewer than N are
taken. The layout of a process's memory changes its times by up to 5 % at random, so ratios are medians over rounds of new processes.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from turns import in_turns, stop_here

from kdpipe.configs import load_config
from kdpipe.pipeline.devices import ask_for_huge_pages, keep_freed_memory, resolve_device
from kdpipe.pipeline.models.student import build_student
from kdpipe.pipeline.runs import layout
from kdpipe.pipeline.teacher.loading import load_teacher
from kdpipe.pipeline.training.run import train, with_mode

RECIPES = {  # keys that a cached step may take, each against a cached step without it
    "averaged": ["train.average=ema"],
    "kl and dice": ["distill.loss={kl: 1, dice: 1}"],
    "trust": ["distill.trust=entropy"],
    "colour shift": ["train.colour_shift=1"],
    "cutmix": ["train.cutmix=1"],
}
FLOP_SIDE = 512  # px: side of the image for which operations are counted


class Timed:
    """Progress that calls `mark` after step `first` and after step `last`: the timed interval."""

    def __init__(self, first: int, last: int, mark: Callable[[], object]) -> None:
        self._marked, self._done, self._mark = (first, last), 0, mark

    def say(self, line: str) -> None:
        pass

    def bar(self, *args: object) -> nullcontext:
        return nullcontext(self._advance)

    def _advance(self, steps: int = 1, **figures: float) -> None:
        self._done += steps
        if self._done in self._marked:
            self._mark()


def gflop_of(model: torch.nn.Module) -> float:
    """Operations of one forward pass in 1e9; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.eval()(torch.zeros(1, 3, FLOP_SIDE, FLOP_SIDE))
    return counter.get_total_flops() / 1e9


def run_arm(arm: str, options: argparse.Namespace, mark: Callable[[], object]) -> None:
    """Take all steps of one mode in this process."""
    ask_for_huge_pages()
    keep_freed_memory()  # as the command does
    last = untimed() + steps_of(arm, options.steps)
    recipe = RECIPES.get(arm.partition(", ")[2], [])
    more = [*options.overrides, *recipe, f"train.max_steps={last}", "train.epochs=1000", "data.val=[]"]
    config = load_config(options.config, more)
    if arm == "online, d4":
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"tta": "d4"})})
    with tempfile.TemporaryDirectory() as folder:
        layout.WEIGHTS_DIR, layout.LOGS_DIR = Path(folder) / "weights", Path(folder) / "logs"
        config = with_mode(config, arm.partition(",")[0])
        timed = Timed(untimed(), last, mark)
        train(config, resolve_device(None), progress=timed, stop=threading.Event())


def steps_of(arm: str, steps: int) -> int:
    """Number of timed steps of a mode."""
    return max(1, steps // {"online": 3, "online, d4": 12}.get(arm, 1))


def untimed() -> int:
    """Steps before the clock starts: on a GPU those whose batches were loaded already."""
    return 10 if torch.cuda.is_available() else 1


def one_after_the_other(arms: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Seconds of each mode's timed steps in this process; every step ends by waiting for the GPU."""
    marks: dict[str, list[float]] = {arm: [] for arm in arms}
    for arm in arms:
        run_arm(arm, options, lambda arm=arm: marks[arm].append(time.perf_counter()))  # type: ignore[misc]
    return {arm: end - start for arm, (start, end) in marks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="demo")
    parser.add_argument("--steps", type=int, default=100 if torch.cuda.is_available() else 12, help="timed steps")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--d4", action="store_true")
    parser.add_argument("--recipes", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--arm", help="internal: run this mode in this process, which stops itself to take turns")
    options = parser.parse_args()
    if options.arm:
        return run_arm(options.arm, options, stop_here)
    arms = ["none", "cached", "online", *(["online, d4"] if options.d4 else [])]
    if options.recipes:
        arms = ["none", "cached", *(f"cached, {name}" for name in RECIPES)]
    if torch.cuda.is_available():
        rounds = [one_after_the_other(arms, options) for _ in range(options.rounds)]
    else:
        rounds = [in_turns({arm: [*sys.argv, "--arm", arm] for arm in arms}) for _ in range(options.rounds)]
    runs = {arm: [seconds[arm] / steps_of(arm, options.steps) for seconds in rounds] for arm in arms}
    of = {
        base: {arm: statistics.median(a / b for a, b in zip(runs[arm], runs[base], strict=True)) for arm in arms}
        for base in ("none", "cached")
    }
    config = load_config(options.config, options.overrides)
    student = build_student(config.student.architecture, len(config.classes.names), encoder=config.student.encoder)
    gflop = {"student": gflop_of(student)}
    gflop["teacher"] = gflop_of(load_teacher(config.teacher))
    print(f"GFLOP on {FLOP_SIDE} x {FLOP_SIDE} px: student {gflop['student']:.1f}, teacher {gflop['teacher']:.1f}")
    table = Table(title=f"Seconds a step, {options.config}", title_justify="left")
    for column in ("mode", "seconds", "of a step without teacher", "of a cached step"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for arm, seconds in runs.items():
        table.add_row(
            arm, f"{statistics.median(seconds):.3f}", f"{of['none'][arm]:.2f} ×", f"{of['cached'][arm]:.2f} ×"
        )
    Console().print(table)
    if options.json:
        Path(options.json).write_text(json.dumps({"of": of, "gflop": gflop, "seconds": runs}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
