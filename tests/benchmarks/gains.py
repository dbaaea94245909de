"""
What students gain on scenes that nobody has seen: arms over seeds on two real data sets, for docs/results.md.

    python tests/benchmarks/gains.py SPLIT [--arms ARM …] [--seeds N …] [--jobs 2] [--out FOLDER] [--set KEY=VALUE …] [--list]

Runs that are finished are not run again, so the command can be stopped at any time and given again. Each run computes with one thread;
`--jobs` of them are at work at once. All arms of a split take equally many steps of equally many crops, but the long ones, which take
three times as many and are run by `--arms` alone. FOLDER, by default demo_output/gains, holds the caches, the runs, and for each split
`kdpipe compare --by root` as a page and as JSON. `../shared` holds the data. `--set` is for trials: it changes every run.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from kdpipe.pipeline.runs import layout

SHARED = Path(__file__).parents[3] / "shared"
OHIO, DUBAI = SHARED / "data/ohio", SHARED / "data/dubai"
TEACHER_OF_DUBAI = SHARED / "pretrain_weights/u-efficientnet-b4_s0_CELoss_pretrained.pth"
SEEDS = (52, 53, 54, 55, 56)  # none was used to choose a setting

RECIPE = ["distill.loss={kl: 1, dice: 1}"]
AVERAGED = ["train.average=mean"]
SHIFTED = [
    "train.colour_shift=0.5"
]  # half of the crops as another scene would have them; chosen before a run had used it
THREE_TIMES = ["train.epochs=90", "train.restart_epochs=90"]  # on Ohio: 2430 steps in place of 810


@dataclass(frozen=True)
class Split:
    """A configuration with its data: `shared` settings, and those of a student that sees only tiles with labels."""

    config: str
    shared: list[str]
    labelled_alone: list[str]
    teacher: list[str] = field(default_factory=list)  # settings of a teacher to train first


def _ohio(unlabelled: tuple[str, str], held_out: str) -> Split:
    """The labels of three tiles of scene a, two scenes whose labels the teacher alone sees, and one that nobody sees."""
    teacher = [f"data.train=[{', '.join(f'{OHIO}/scene_{s}' for s in ('a', *unlabelled))}]", "data.val=[]"]
    name = f"teacher-without-{held_out}"
    return Split(
        "ohio/rgb_kd",
        [
            "data.train=[few_labels/scene_a]",
            "data.allow_missing_masks=true",
            f"data.val=[{OHIO}/scene_{held_out}]",
            f"data.unlabelled=[{', '.join(f'{OHIO}/scene_{s}' for s in unlabelled)}]",
            "train.crops_per_tile=31",  # 93 of tiles with labels and one of each without, about half of an epoch each
            f"teacher.checkpoint=model_weights/ohio/{name}/last.ckpt",
            f"cache.path=caches/ohio-{held_out}.zarr",
            "train.val_every_epochs=1000",
        ],
        ["data.train=[few_labels/labelled/scene_a]", "data.unlabelled=[]", "train.crops_per_tile=72"],
        [f"name={name}", *teacher, "train.val_every_epochs=1000"],
    )


SPLITS = {
    "ohio-c": _ohio(("b", "d"), "c"),
    "ohio-b": _ohio(("c", "d"), "b"),
    "dubai": Split(
        "dubai/few_labels_kd",
        [
            "data.train=[few_labels/Train]",
            "data.val=[scene2/Val, scene6/Val]",
            f"data.unlabelled=[{DUBAI}/Unlabelled]",
            f"teacher.checkpoint={TEACHER_OF_DUBAI}",
            "train.val_every_epochs=1000",
        ],
        [
            "data.train=[few_labels/scene1/Train]",
            "data.unlabelled=[]",
            "train.crops_per_tile=10",
            "train.epochs=90",
            "train.restart_epochs=90",
        ],
    ),
}

# Settings of each arm, and whether it sees the unlabelled tiles. All have T 1, alpha 0.7, KL alone and the last step's weights unless
# they say otherwise.
ARMS: dict[str, tuple[list[str], bool]] = {
    "none": (["distill.mode=none"], False),
    "none-averaged": (["distill.mode=none", *AVERAGED], False),
    "cached": ([], False),
    "t2": (["distill.temperature=2"], False),
    "averaged": (AVERAGED, False),
    "recipe": ([*AVERAGED, *RECIPE], False),
    "unlabelled": ([*AVERAGED, *RECIPE], True),
    "shifted": ([*AVERAGED, *RECIPE, *SHIFTED], True),
    "none-shifted": (["distill.mode=none", *SHIFTED], False),
    "long": ([*AVERAGED, *RECIPE, *THREE_TIMES], True),
    "long-none": (["distill.mode=none", *THREE_TIMES], False),
}


def settings_of(split: Split, arm: str, seed: int) -> list[str]:
    """The settings of a run. Arms of another temperature or other tiles have caches of their own."""
    own, sees_unlabelled = ARMS[arm]
    path = next(
        value for value in [*split.shared, "cache.path=caches/few_labels.zarr"] if value.startswith("cache.path=")
    )
    suffix = ("" if sees_unlabelled else "-labelled") + ("-t2" if arm == "t2" else "")
    return [
        *split.shared,
        *([] if sees_unlabelled else split.labelled_alone),
        path.replace(".zarr", f"{suffix}.zarr"),
        "distill.loss=kl",
        "train.average=null",
        *own,
        f"seed={seed}",
    ]


def link_ohio(folder: Path) -> None:
    """Folders of links: scene a with the masks of three tiles, and these three alone."""
    tiles = sorted(path.name for path in (OHIO / "scene_a/images").glob("*"))
    few = tiles[3::15]  # the first of such choices in which each class occurs
    for root, kind, names in (
        ("few_labels/scene_a", "images", tiles),
        ("few_labels/scene_a", "masks", few),
        ("few_labels/labelled/scene_a", "images", few),
        ("few_labels/labelled/scene_a", "masks", few),
    ):
        link(folder / root / kind, [OHIO / "scene_a" / kind / name for name in names])


def link_dubai(folder: Path) -> None:
    """Folders of links: the masks of scene 1 alone, scene 1 alone, and the scenes of the validation tiles apart."""
    for root, kind, source, pattern in (
        ("few_labels/Train", "images", "Train/images", "*"),
        ("few_labels/Train", "masks", "Train/masks", "t1_*"),
        ("few_labels/scene1/Train", "images", "Train/images", "t1_*"),
        ("few_labels/scene1/Train", "masks", "Train/masks", "t1_*"),
        *((f"scene{s}/Val", kind, f"Val/{kind}", f"t{s}_*") for s in (2, 6) for kind in ("images", "masks")),
    ):
        link(folder / root / kind, (DUBAI / source).glob(pattern))


def link(folder: Path, files: Iterable[Path]) -> None:
    """Links in a folder to files."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if not (folder / file.name).is_symlink():
            (folder / file.name).symlink_to(file)


def kdpipe(folder: Path, *arguments: str, log: str) -> None:
    """Run a command in `folder` with one thread; what it says goes into a log, whose name an error gives."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / f"{log}.log").open("a") as file:
        done = subprocess.run(
            [sys.executable, "-m", "kdpipe.pipeline", *arguments], cwd=folder, env=environment, stdout=file, stderr=file
        )
    if done.returncode:
        raise SystemExit(f"kdpipe {arguments[0]} ended with exit code {done.returncode}; see {folder / log}.log")


def with_settings(settings: list[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", choices=SPLITS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS)[:7])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("demo_output/gains"))
    parser.add_argument("--set", dest="more", action="append", default=[])
    parser.add_argument("--list", action="store_true", help="print the settings of each run and do nothing")
    options = parser.parse_args()
    split, folder = SPLITS[options.split], options.out.absolute()
    runs = {
        (arm, seed): [*settings_of(split, arm, seed), *options.more] for seed in options.seeds for arm in options.arms
    }
    if options.list:
        for (arm, seed), settings in runs.items():
            print(arm, seed, *settings)
        return
    folder.mkdir(parents=True, exist_ok=True)
    (link_dubai if options.split == "dubai" else link_ohio)(folder)
    if split.teacher:
        name = split.teacher[0].removeprefix("name=")
        if not (folder / layout.WEIGHTS_DIR / "ohio" / name / "done").exists():
            teacher = with_settings([*split.teacher, *options.more])
            kdpipe(folder, "train-student", "-c", "ohio/teacher", "--resume", *teacher, log=name)
            (folder / layout.WEIGHTS_DIR / "ohio" / name / "done").touch()
    caches: dict[str, list[str]] = {}
    for (arm, _), settings in runs.items():
        if not arm.startswith("none"):
            caches.setdefault(next(value for value in reversed(settings) if value.startswith("cache.path=")), settings)
    for path, settings in caches.items():
        kdpipe(folder, "precompute-teacher", "-c", split.config, *with_settings(settings), log=Path(path).stem)

    def run(arm: str, seed: int) -> Path:
        name = f"{options.split}-{arm}-{seed}"
        weights = folder / layout.WEIGHTS_DIR / split.config.split("/")[0] / name
        if not (weights / "done").exists():
            settings = with_settings([*runs[arm, seed], f"name={name}"])
            kdpipe(folder, "train-student", "-c", split.config, "--resume", *settings, log=name)
            (weights / "done").touch()
            print(name, flush=True)
        return weights

    with ThreadPoolExecutor(options.jobs) as jobs:
        found = list(jobs.map(lambda key: run(*key), runs))
    if len(options.arms) > 1:
        page = folder / f"compare-{options.split}"
        compared = [*map(str, found), "--by", "root", "--out", str(page), "--json", f"{page}.json"]
        kdpipe(folder, "compare", *compared, log=page.name)
        print((folder / f"{page.name}.log").read_text())


if __name__ == "__main__":
    main()
