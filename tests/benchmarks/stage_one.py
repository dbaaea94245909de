"""
How fast is stage one against a bare loop of the same network, and against the script one would write without kdpipe?

    python tests/benchmarks/stage_one.py dubai/linknet_kd [--tiles 45] [--rounds 3] [--json FILE] [--set KEY=VALUE …]

In each round one process runs `bare` and `kdpipe` one after the other, and another `naive`: the same network in another process can
differ by a tenth, by where its memory lies. The order turns from round to round, so that a busy machine slows all of them alike;
only what comes after the teacher is loaded is timed. A run costs 0.3 s beside its tiles (digests, the last tile's encoding), so
that few tiles show less than many. `bare` asks the same network for its logits over tiles that lie decoded in
memory: no reading, no softmax, nothing kept. `naive` reads, asks and saves one tile after the other, as float16 soft targets with
`np.save`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ARMS = ("bare", "kdpipe", "naive")
PROCESSES = ["bare", "kdpipe"], ["naive"]


def bare(config, tiles, teacher, device, folder):
    import torch

    from kdpipe.data.rasters import read_image

    images = [read_image(tile.image)[None] for tile in tiles]
    start = time.perf_counter()
    for image_NHWC in images:
        teacher.logits(image_NHWC)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def naive(config, tiles, teacher, device, folder):
    import numpy as np
    import rasterio
    import torch
    from rasterio.errors import NotGeoreferencedWarning

    from kdpipe.pipeline.models.teacher import load_teacher

    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    model = load_teacher(config.teacher).to(device)
    class_map = torch.tensor(config.class_map_matrix(), dtype=torch.float32, device=device)
    start = time.perf_counter()
    with torch.no_grad():
        for i, tile in enumerate(tiles):
            with rasterio.open(tile.image) as raster:
                image = raster.read([1, 2, 3])
            x = torch.from_numpy(image)[None].to(device).float() / 255
            height, width = x.shape[2:]
            x = torch.nn.functional.pad(x, (0, -width % 32, 0, -height % 32), mode="reflect")
            probs = torch.softmax(model(x)[..., :height, :width] / config.distill.temperature, dim=1)
            soft = torch.einsum("nthw,ts->nshw", probs, class_map)[0]
            np.save(folder / f"{i}.npy", soft.half().cpu().numpy())
    return time.perf_counter() - start


def kdpipe(config, tiles, teacher, device, folder):
    """`precompute` from its first tile on: the lists, the lock and the manifest are in its time, loading the teacher is not."""
    from kdpipe.pipeline import precompute as stage

    stage.list_tiles = lambda data, split: tiles
    stage.open_teacher = lambda config, recipe, device: teacher
    stage.views_per_epoch = lambda config, tiles: 0.0  # which is asked once a run, of all tiles
    config = config.model_copy(update={"cache": config.cache.model_copy(update={"path": str(folder / "cache.zarr")})})
    start = time.perf_counter()
    summary = stage.precompute(config, device)
    assert summary.computed == len(tiles)
    return time.perf_counter() - start


def run_arms(arms: list[str], options: argparse.Namespace) -> None:
    """One measurement of each in this process; prints seconds and CPU seconds of the whole loop, by arm."""
    from kdpipe.configs import load_config
    from kdpipe.data.tiles import list_tiles
    from kdpipe.pipeline.malloc import keep_freed_memory
    from kdpipe.pipeline.models.teacher import open_teacher, resolve_device
    from kdpipe.pipeline.recipe import complete_recipe

    if arms != ["naive"]:  # the command does so before anything else
        keep_freed_memory()
    config = load_config(options.config, options.overrides)
    device = resolve_device(options.device)
    tiles = list_tiles(config.data, "train")
    tiles = tiles[:: max(1, len(tiles) // options.tiles)][: options.tiles]
    teacher = open_teacher(config, complete_recipe(config, None, None), device)
    from kdpipe.data.rasters import read_image

    teacher.logits(read_image(tiles[0].image)[None])  # what is set up at the first call is no tile's cost
    found = {}
    for arm in arms:
        with tempfile.TemporaryDirectory() as folder:
            cpu = time.process_time()
            seconds = globals()[arm](config, tiles, teacher, device, Path(folder))
            found[arm] = {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "tiles": len(tiles)}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="demo")
    parser.add_argument("--tiles", type=int, default=45)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device")
    parser.add_argument("--json")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="measure these in this process")
    options = parser.parse_args()
    if options.arms:
        return run_arms(options.arms, options)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for turn in range(options.rounds):
        for arms in PROCESSES if turn % 2 == 0 else [arms[::-1] for arms in reversed(PROCESSES)]:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--arms", *arms], stdout=subprocess.PIPE, text=True, check=True
            )
            for arm, measured in json.loads(done.stdout.splitlines()[-1]).items():
                found[arm].append(measured)
    seconds = {arm: statistics.median(run["seconds"] for run in runs) for arm, runs in found.items()}
    tiles = found["bare"][0]["tiles"]
    # Of each round, since the machine's pace changes between rounds.
    rounds = [{arm: found[arm][turn]["seconds"] for arm in ARMS} for turn in range(options.rounds)]
    of_bare = statistics.median(r["bare"] / r["kdpipe"] for r in rounds)
    of_naive = statistics.median(r["naive"] / r["kdpipe"] for r in rounds)
    for arm in ARMS:
        print(f"{arm:8} {tiles / seconds[arm]:8.2f} tiles/s")
    print(f"stage one is {of_bare:.3f} x as fast as the bare loop, and {of_naive:.2f} x as fast as the naive script")
    if options.json:
        result = {
            "tiles_per_second": {arm: tiles / s for arm, s in seconds.items()},
            "of_bare": of_bare,
            "of_naive": of_naive,
        }
        Path(options.json).write_text(json.dumps({**result, "runs": found}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
