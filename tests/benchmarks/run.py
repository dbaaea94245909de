"""
All benchmarks one after the other, and one table of what was reached: `make bench`.

    python tests/benchmarks/run.py [CONFIG] [--out FOLDER] [--only NAME …]

Every figure is a ratio of things that were measured side by side in one run, or a number of bytes. CONFIG is the Dubai tiles
with their real teacher where `../shared` has them, else the demo, whose tiles and teacher `kdpipe demo` has made.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
REAL = Path("../shared/data/dubai")
HEAVY_STUDENT = ["student.architecture=unet", "student.encoder=resnet18", "train.crop=512", "train.batch_size=2"]


def settings(overrides: list[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def benchmarks(config: str, folder: Path) -> dict[str, list[str]]:
    """Script and arguments of each, by name; each writes NAME.json."""
    cache = [f"cache.path={folder}/cache.zarr"]
    # A GPU is through with few tiles and steps before its clock says anything.
    tiles, steps = ("540", "100") if torch.cuda.is_available() else ("24", "6")
    crop = [] if config.startswith("dubai") else ["train.crop=128"]  # the demo's tiles are small
    return {
        "stage_one": ["stage_one.py", config, "--tiles", tiles, "--rounds", "3"],
        "size": ["size.py", config, "--plot", f"{folder}/size.png"],
        "steps": ["steps.py", config, "--d4", "--steps", steps, *settings([*cache, *HEAVY_STUDENT, *crop])],
        "memory": ["memory.py"],
        "many_tiles": ["many_tiles.py", f"{folder}/many", "--tiles", "10000"],
        "views": ["views.py", config],
    }


def rows(found: dict[str, dict]) -> list[tuple[str, str, str]]:
    """What, reached, to reach."""
    table = []
    if "stage_one" in found:
        table += [
            (
                "stage one against a bare loop of the same network, tiles/s",
                f"{found['stage_one']['of_bare']:.3f}",
                ">= 0.95",
            ),
            ("the same, over the network as kdpipe asks it", f"{found['stage_one']['of_prepared']:.3f}", ""),
            ("stage one against the naive script, tiles/s", f"{found['stage_one']['of_naive']:.2f} x", ">= 1.5 x"),
        ]
    if "steps" in found:
        seconds, gflop = found["steps"]["seconds"], found["steps"]["gflop"]
        table += [
            (
                "cached step against one without distillation",
                f"{seconds['cached'] / seconds['none']:.3f} x",
                "<= 1.03 x",
            ),
            (
                f"online step against cached, student of {gflop['student']:.0f} GFLOP",
                f"{seconds['online'] / seconds['cached']:.2f} x",
                ">= 1.5 x",
            ),
            (
                "the same, teacher asked from eight sides",
                f"{seconds['online, d4'] / seconds['cached']:.2f} x",
                ">= 4 x",
            ),
        ]
    if "many_tiles" in found:
        commands = found["many_tiles"]["commands"]
        done = commands["precompute-teacher, nothing to do"]
        table.append(
            (
                "nothing to do, 10,000 tiles / 100, the whole command",
                f"{done['10000']['seconds']:.1f} / {done['100']['seconds']:.1f} s",
                "<= 3 s",
            )
        )
    if "size" in found:
        for temperature, content in found["size"].items():
            for bits, limit in ((8, 1.0), (6, 0.5)):
                reached = content["ways"][f"{bits} bits: cache.bits {bits}"]["bytes_per_pixel"]
                table.append(
                    (f"bytes a pixel, |Δp| <= 1/{2**bits - 1}, T {temperature}", f"{reached:.2f}", f"<= {limit:g}")
                )
            reads = content["reads"]["8"]
            faster = reads["zarr_median_ms"] / reads["kdpipe_median_ms"]
            table.append(("random 512 px crop against zarr-python's defaults", f"{faster:.1f} x faster", ">= 4 x"))
    if "memory" in found:
        memory = found["memory"]
        tiles = list(memory["tiles_mb"].values())
        table += [
            ("peak memory of 128 tiles against 8", f"{tiles[-1] / tiles[0]:.2f} x", "flat"),
            ("memory of a scene asked in windows", f"{memory['bytes_per_scene_px']:.1f} B a pixel", "flat"),
        ]
    if "views" in found:
        figures, views = found["views"]["figures"], found["views"]["options"]["views"]
        tile, crop = figures["tile"], figures["crop"]
        table += [
            (f"stage one of {views} recorded crops a tile against whole tiles", f"{crop['seconds'] / tile['seconds']:.2f} x", ""),
            ("bytes of these crops against whole tiles", f"{crop['bytes'] / tile['bytes']:.2f} x", ""),
            ("a step from recorded crops against one from whole tiles", f"{crop['step_seconds'] / tile['step_seconds']:.2f} x", ""),
        ]  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="dubai/linknet_kd" if REAL.is_dir() else "demo")
    parser.add_argument("--out", type=Path, help="keep the JSON files and plots here")
    parser.add_argument("--only", nargs="+", default=[])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.out or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        chosen = {
            name: b
            for name, b in benchmarks(options.config, folder).items()
            if not options.only or name in options.only
        }
        if "steps" in chosen:
            precompute = [sys.executable, "-m", "kdpipe.pipeline", "precompute-teacher", "-c", options.config]
            subprocess.run([*precompute, *settings([f"cache.path={folder}/cache.zarr"])], check=True)
        found = {}
        for name, (script, *arguments) in chosen.items():
            print(f"--- {name}", flush=True)
            done = subprocess.run([sys.executable, HERE / script, *arguments, "--json", f"{folder}/{name}.json"])
            if done.returncode == 0:
                found[name] = json.loads((folder / f"{name}.json").read_text())
    table = Table(title=f"Benchmarks, {options.config}", title_justify="left")
    for column in ("what", "reached", "to reach"):
        table.add_column(column)
    for row in rows(found):
        table.add_row(*row)
    Console().print(table)
    if failed := [name for name in chosen if name not in found]:
        raise SystemExit(f"these ended with an error, see above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
