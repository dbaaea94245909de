"""
All benchmarks, and one table of their results against the targets: `make bench`.

    python tests/benchmarks/run.py [CONFIG] [--out FOLDER] [--only NAME …] [--check]

Figures are bytes, or compare things that were measured side by side in one run. CONFIG is by default the Dubai tiles with their real
teacher where `../shared` has them, else the demo, whose tiles and teacher `kdpipe demo` makes. FOLDER/summary.json holds the table.
With `--check` the exit code is 1 if a target is missed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
REAL = Path("../shared/data/dubai")
STUDENTS = {  # of 44 and of 16 GFLOP at 512 px
    "steps": ["student.architecture=unet", "student.encoder=resnet18"],
    "steps_small": ["student.architecture=segformer", "student.encoder=mit_b0"],
}


@dataclass(frozen=True)
class Row:
    """A figure and its target, if it has one."""

    what: str
    reached: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is met, which NaN never does; None without a target."""
        if self.at_least is not None:
            return self.reached >= self.at_least
        return None if self.at_most is None else self.reached <= self.at_most

    def cells(self) -> tuple[str, str, str, str]:
        """The row as text, with enough digits to tell a missed target from a met one."""
        to_reach = ""
        if self.met is not None:
            to_reach = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        verdict = {True: "yes", False: "no", None: ""}[self.met]
        return (
            self.what,
            f"{self.reached:.3f} {self.unit}".strip(),
            f"{to_reach} {self.unit if to_reach else ''}".strip(),
            verdict,
        )


def settings(overrides: list[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def benchmarks(config: str, folder: Path) -> dict[str, list[list[str]]]:
    """The commands of each benchmark, by name, as arguments of Python; the last one takes `--json FILE`."""
    cache = [f"cache.path={folder}/cache.zarr"]
    # A GPU needs more tiles and steps for a stable figure.
    tiles, steps = ("540", "100") if torch.cuda.is_available() else ("24", "12")
    side = 512 if config.startswith("dubai") else 128  # the demo's tiles are small
    training = [*cache, f"train.crop={side}", "train.batch_size=2"]
    if torch.cuda.is_available():
        training.append("train.workers=8")  # the cores have nothing else to do
    precompute = ["-m", "kdpipe.pipeline", "precompute-teacher", "-c", config, *settings(cache)]
    scripts = {
        "startup": ["startup.py"],
        "stage_one": ["stage_one.py", config, "--tiles", tiles, "--rounds", "3"],
        "size": ["size.py", config, "--temperature", "1", "2"],
        **{
            name: ["steps.py", config, "--d4", "--steps", steps, *settings([*training, *student])]
            for name, student in STUDENTS.items()
        },
        "recipes": [
            "steps.py",
            config,
            "--recipes",
            "--steps",
            steps,
            *settings([*training, *STUDENTS["steps_small"]]),
        ],
        "memory": ["memory.py"],
        "many_tiles": ["many_tiles.py", f"{folder}/many", "--tiles", "10000"],
        "views": ["views.py", config],
        "remote": ["remote.py", f"{folder}/remote"],
        "peers": ["peers.py", f"{folder}/peers", config],
        "open_index": ["open_index.py", f"{folder}/index"],
        "demo_gain": ["demo_gain.py", f"{folder}/demo"],
    }
    return {
        name: [*([precompute] if name in STUDENTS or name == "recipes" else []), [str(HERE / script), *arguments]]
        for name, (script, *arguments) in scripts.items()
    }


def run(name: str, commands: list[list[str]], folder: Path) -> dict | None:
    """The results that a benchmark wrote to NAME.json; None if one of its commands failed."""
    print(f"--- {name}", flush=True)
    file = folder / f"{name}.json"
    *before, last = commands
    for command in [*before, [*last, "--json", str(file)]]:
        if subprocess.run([sys.executable, *command]).returncode:
            return None
    return json.loads(file.read_text())


def rows(found: dict[str, dict]) -> list[Row]:
    table = [
        Row(f"kdpipe {command}: CPU time beyond importing click and pydantic", seconds, "s", at_most=0.5)
        for command, seconds in found.get("startup", {"more": {}})["more"].items()
    ]
    if "stage_one" in found:
        stage_one = found["stage_one"]
        table += [
            Row("stage one against a bare loop of the same network, tiles/s", stage_one["of_bare"], "x", at_least=0.95),
            Row(
                "stage one against that loop with the network as kdpipe prepares it, tiles/s",
                stage_one["of_prepared"],
                "x",
                at_least=0.95,
            ),
            Row("stage one against the naive script, tiles/s", stage_one["of_naive"], "x", at_least=1.5),
        ]
    for name in [name for name in STUDENTS if name in found]:
        of, student = found[name]["of"], f"student of {found[name]['gflop']['student']:.0f} GFLOP"
        table += [
            Row(f"cached step against one without distillation, {student}", of["none"]["cached"], "x", at_most=1.03),
            Row(f"online step against cached, {student}", of["cached"]["online"], "x", at_least=1.5),
            Row(
                f"online step against cached, {student}, teacher with TTA d4",
                of["cached"]["online, d4"],
                "x",
                at_least=4,
            ),
        ]
    table += [
        Row(f"cached step with {arm.partition(', ')[2]} against one without", ratio, "x", at_most=1.03)
        for arm, ratio in found.get("recipes", {"of": {"cached": {}}})["of"]["cached"].items()
        if ", " in arm
    ]
    if "many_tiles" in found:
        done = found["many_tiles"]["commands"]["precompute-teacher, nothing to do"]
        few, many = sorted(done, key=int)
        table += [
            Row(f"nothing to do, {int(many):,} tiles, the whole command", done[many]["seconds"], "s", at_most=3),
            Row(f"nothing to do, {int(few):,} tiles", done[few]["seconds"], "s"),
        ]
    for temperature, content in found.get("size", {}).items():
        for bits, limit in ((8, 1.0), (6, 0.5)):
            reached = content["ways"][f"{bits} bits: cache.bits {bits}"]["bytes_per_pixel"]
            table.append(Row(f"bytes a pixel, |Δp| <= 1/{2**bits - 1}, T {temperature}", reached, "B", at_most=limit))
        for bits in ("8", "6"):
            reads = content["reads"][bits]
            faster = reads["zarr_median_ms"] / reads["kdpipe_median_ms"]
            what = f"random crop of up to 512 px against zarr-python's defaults, {bits} bits, T {temperature}"
            table.append(Row(what, faster, "x", at_least=4))
            of_folder = reads["pack_median_ms"] / reads["kdpipe_median_ms"]
            table.append(
                Row(
                    f"crop from a pack against one from the folder, {bits} bits, T {temperature}",
                    of_folder,
                    "x",
                    at_most=1.05,
                )
            )
    if "memory" in found:
        memory = found["memory"]
        tiles = memory["tiles_mb"]
        few, *_, many = sorted(tiles, key=int)
        table += [
            Row(f"peak memory of {many} tiles against {few}", tiles[many] / tiles[few], "x", at_most=1.1),
            Row(
                "peak memory of a scene four times as high, in windows", memory["high_against_first"], "x", at_most=1.1
            ),
            Row("peak memory of a scene twice as wide, in windows", memory["wide_against_first"], "x"),
        ]
    if "remote" in found:
        ours, theirs = (found["remote"]["figures"][way] for way in ("obstore", "s3fs"))
        for reader in ("one reader", "7 readers"):
            of_s3fs = ours[f"crops of a folder, {reader}, a second"] / theirs[f"crops of a folder, {reader}, a second"]
            table.append(Row(f"crops from S3 through obstore against s3fs, {reader}", of_s3fs, "x", at_least=2))
        receipts = ours["receipts at once, a second"]
        table += [
            Row(
                "receipts from S3 at once against one after another",
                receipts / ours["receipts one after another, a second"],
                "x",
            ),
            Row("receipts of 1,000,000 tiles from S3, at this pace", 1e6 / receipts / 60, "min", at_most=10),
        ]
    if "peers" in found:
        ways = found["peers"]["ways"]
        for way in [way for way in ways if way not in ("kdpipe", "pack")]:
            least = 0.5 if way == "memmap" else 1
            table += [
                Row(f"random crops from kdpipe against {way}, {kind}", ratio, "x", at_least=least)
                for kind, ratio in ways[way]["of_kdpipe"].items()
            ]
            smaller = ways["kdpipe"]["bytes_per_pixel"] / ways[way]["bytes_per_pixel"]
            table.append(Row(f"bytes of kdpipe against {way}, equal values", smaller, "x", at_most=1))
    if "open_index" in found:
        opened = found["open_index"]
        what = f"open {opened['tiles']:,} tiles and read a window"
        table += [
            Row(what, opened["seconds"], "s", at_most=1),
            Row(f"{what}, memory that a process does not share", opened["private_mb"], "MB", at_most=50),
            Row("index", opened["bytes_a_tile"], "B a tile", at_most=120),
        ]
    if "demo_gain" in found:
        gain, count = found["demo_gain"]["gain"], len(found["demo_gain"]["miou"]["with"])
        table.append(Row(f"mIoU that the demo's student gains, mean of {count} seeds", gain, "points", at_least=3))
    if "views" in found:
        figures, views = found["views"]["figures"], found["views"]["options"]["views"]
        tile, crop = figures["tile"], figures["crop"]
        table += [
            Row(
                f"stage one of {views} recorded crops a tile against whole tiles",
                crop["seconds"] / tile["seconds"],
                "x",
            ),
            Row("bytes of these crops against whole tiles", crop["bytes"] / tile["bytes"], "x"),
            Row(
                "a step from recorded crops against one from whole tiles",
                crop["step_seconds"] / tile["step_seconds"],
                "x",
            ),
        ]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="dubai/linknet_kd" if REAL.is_dir() else "demo")
    parser.add_argument("--out", type=Path, help="keep the JSON files and plots here, and the table as summary.json")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.out or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        known = benchmarks(options.config, folder)
        if unknown := [name for name in options.only if name not in known]:
            parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
        found = {name: run(name, known[name], folder) for name in known if name in (options.only or known)}
        failed = [name for name, content in found.items() if content is None]
        table = rows({name: content for name, content in found.items() if content is not None})
        summary = [{**asdict(row), "met": row.met} for row in table]
        (folder / "summary.json").write_text(
            json.dumps({"config": options.config, "failed": failed, "rows": summary}, indent=1) + "\n"
        )
    show(f"Benchmarks, {options.config}", table)
    missed = [row.what for row in table if row.met is False]
    complaints = []
    if failed:
        complaints.append(f"these ended with an error, see above: {', '.join(failed)}")
    if options.check and missed:
        complaints.append(f"missed: {'; '.join(missed)}")
    if complaints:
        raise SystemExit("\n".join(complaints))


def show(title: str, table: list[Row]) -> None:
    shown = Table(title=title, title_justify="left")
    for column in ("what", "reached", "to reach", ""):
        shown.add_column(column)
    for row in table:
        shown.add_row(*row.cells())
    Console().print(shown)


if __name__ == "__main__":
    main()
