"""
What a training step costs with the cache, with the live teacher and without one: ratios, measured side by side in one run.

    python tests/benchmarks/steps.py [CONFIG] [--steps 12] [--json FILE] [--set KEY=VALUE …]

The cache must be complete. The three modes take turns, a few steps each, so that a busy machine slows all of them alike.
"""

import argparse
import json
import statistics
import tempfile
import threading
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kdpipe.configs import load_config
from kdpipe.pipeline import training
from kdpipe.pipeline.models.teacher import resolve_device
from kdpipe.pipeline.training import train, with_mode

ROUNDS = 2
MODES = ("none", "cached", "online")


class Quiet:
    def say(self, line: str) -> None:
        pass

    def bar(self, *args: object) -> nullcontext:
        return nullcontext(lambda steps=1, **figures: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="demo")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    config = load_config(
        options.config, [*options.overrides, f"train.max_steps={options.steps}", "train.epochs=1000", "data.val=[]"]
    )
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        training.WEIGHTS_DIR, training.LOGS_DIR = Path(folder) / "weights", Path(folder) / "logs"
        for _ in range(ROUNDS):
            for mode in MODES:
                run = train(
                    with_mode(config, mode),
                    resolve_device(None),
                    overwrite=True,
                    progress=Quiet(),
                    stop=threading.Event(),
                )
                if run.seconds_per_step is not None:
                    seconds[mode].append(run.seconds_per_step)
    medians = {mode: statistics.median(values) for mode, values in seconds.items()}
    table = Table(title=f"Seconds a step, {options.config}", title_justify="left")
    for column in ("mode", "seconds", "of a step without teacher", "of a cached step"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for mode, value in medians.items():
        table.add_row(mode, f"{value:.3f}", f"{value / medians['none']:.2f} ×", f"{value / medians['cached']:.2f} ×")
    Console().print(table)
    if options.json:
        Path(options.json).write_text(json.dumps(medians, indent=1) + "\n")


if __name__ == "__main__":
    main()
