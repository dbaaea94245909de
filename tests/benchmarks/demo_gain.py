"""
What the demo's student gains from the teacher, over several seeds.

    python tests/benchmarks/demo_gain.py FOLDER [--seeds 42 43 44] [--json FILE]

Runs `kdpipe demo` below FOLDER, unless an earlier one has left its teacher and cache there, and then both of its students for
each seed: mIoU on the validation tiles after the last step, and the mean difference, paired by seed. Ten minutes on two cores, and
three for each seed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

from kdpipe.pipeline.demo import STUDENTS

KDPIPE = [sys.executable, "-m", "kdpipe.pipeline"]


def miou_of(folder: Path, seed: int, label: str) -> float:
    """Train one of the demo's students; its mIoU."""
    result = folder / f"{label}-{seed}.json"
    command = [
        "train-student",
        "-c",
        "demo",
        "--set",
        f"seed={seed}",
        "--set",
        f"name={label}-{seed}",
        *STUDENTS[label],
    ]
    subprocess.run([*KDPIPE, *command, "--overwrite", "--json", str(result)], cwd=folder, check=True)
    found: float = json.loads(result.read_text())["final"]["miou"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder, target = options.folder.absolute(), options.json and options.json.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "demo_output/cache.zarr/manifest.json").exists():
        subprocess.run([*KDPIPE, "demo"], cwd=folder, check=True)
    found = {label: {seed: miou_of(folder, seed, label) for seed in options.seeds} for label in STUDENTS}
    gains = [100 * (found["with"][seed] - found["without"][seed]) for seed in options.seeds]
    for seed, gain in zip(options.seeds, gains, strict=True):
        print(
            f"seed {seed}: {100 * found['with'][seed]:.1f} with, {100 * found['without'][seed]:.1f} without, {gain:+.1f}"
        )
    print(f"mean of {len(gains)} seeds: {mean(gains):+.1f} points of mIoU")
    if target:
        target.write_text(json.dumps({"miou": found, "gain": mean(gains)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
