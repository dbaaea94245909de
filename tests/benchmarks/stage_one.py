"""
How fast is stage one against bare loops of the same network, and against the script one would write without kdpipe?

    python tests/benchmarks/stage_one.py dubai/linknet_kd [--tiles 45] [--rounds 3] [--json FILE] [--set KEY=VALUE …]

In each round four processes take turns of two seconds, those that wait are stopped: a machine's pace drifts by a fifth within a
minute, which one loop after the other would measure. Only what comes after the teacher is loaded is timed. A run of kdpipe costs
0.3 s beside its tiles (digests, the last tile's encoding), so that few tiles show less than many.

- `bare` asks the network, as smp and torch have it, about tiles that lie decoded in memory: no softmax, nothing read, nothing kept.
- `prepared` is that loop over the network as kdpipe asks it: batch norms folded, channels last, in pages of 2 MB.
- `naive` reads, asks and saves one tile after the other, as float16 soft targets with `np.save`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import warnings
from pathlib import Path

from turns import in_turns, stop_here

ARMS = ("bare", "prepared", "kdpipe", "naive")


def bare(config, tiles, device, folder):
    import numpy as np
    import torch

    from kdpipe.data.rasters import read_image
    from kdpipe.pipeline.models.teacher import load_teacher

    model = load_teacher(config.teacher).to(device)
    images = [np.ascontiguousarray(read_image(tile.image).transpose(2, 0, 1)) for tile in tiles]
    with torch.no_grad():
        logits_of(model, images[0], device)  # what is set up at the first call is no tile's cost
        stop_here()
        for image in images:
            logits_of(model, image, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    stop_here()


def prepared(config, tiles, device, folder):
    import torch

    from kdpipe.data.rasters import read_image

    teacher = asked_teacher(config, tiles, device)
    images = [read_image(tile.image)[None] for tile in tiles]
    stop_here()
    for image_NHWC in images:
        teacher.logits(image_NHWC)
    if device.type == "cuda":
        torch.cuda.synchronize()
    stop_here()


def naive(config, tiles, device, folder):
    import numpy as np
    import rasterio
    import torch
    from rasterio.errors import NotGeoreferencedWarning

    from kdpipe.pipeline.models.teacher import load_teacher

    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    model = load_teacher(config.teacher).to(device)
    class_map = torch.tensor(config.class_map_matrix(), dtype=torch.float32, device=device)

    def logits_of_file(path):
        with rasterio.open(path) as raster:
            return logits_of(model, raster.read([1, 2, 3]), device)

    with torch.no_grad():
        logits_of_file(tiles[0].image)
        stop_here()
        for i, tile in enumerate(tiles):
            logits = logits_of_file(tile.image)
            probs = torch.softmax(logits / config.distill.temperature, dim=1)
            soft = torch.einsum("nthw,ts->nshw", probs, class_map)[0]
            np.save(folder / f"{i}.npy", soft.half().cpu().numpy())
    stop_here()


def logits_of(model, image, device):
    """As a script asks a network about an image, uint8 `(3, H, W)`."""
    import torch

    x = torch.from_numpy(image)[None].to(device).float() / 255
    height, width = x.shape[2:]
    x = torch.nn.functional.pad(x, (0, -width % 32, 0, -height % 32), mode="reflect")
    return model(x)[..., :height, :width]


def kdpipe(config, tiles, device, folder):
    """`precompute` from its first tile on: the lists, the lock and the manifest are in its time, loading the teacher is not."""
    from kdpipe.pipeline import precompute as stage

    teacher = asked_teacher(config, tiles, device)
    stage.list_tiles = lambda data, split: tiles
    stage.open_teacher = lambda config, recipe, device: teacher
    config = config.model_copy(update={"cache": config.cache.model_copy(update={"path": str(folder / "cache.zarr")})})
    stop_here()
    summary = stage.precompute(config, device)
    stop_here()
    assert summary.computed == len(tiles)


def asked_teacher(config, tiles, device):
    """The teacher as kdpipe has it, after a first answer."""
    from kdpipe.data.rasters import read_image
    from kdpipe.pipeline.models.teacher import open_teacher
    from kdpipe.pipeline.recipe import complete_recipe

    teacher = open_teacher(config, complete_recipe(config, None, None), device)
    teacher.logits(read_image(tiles[0].image)[None])
    return teacher


def run_arm(arm: str, options: argparse.Namespace) -> None:
    """The whole loop in this process, which stops itself before its first tile and after its last."""
    from kdpipe.configs import load_config
    from kdpipe.data.tiles import list_tiles
    from kdpipe.pipeline.malloc import ask_for_huge_pages, keep_freed_memory
    from kdpipe.pipeline.models.teacher import resolve_device

    if arm in ("prepared", "kdpipe"):  # the command does so before anything else
        ask_for_huge_pages()
        keep_freed_memory()
    config = load_config(options.config, options.overrides)
    device = resolve_device(options.device)
    tiles = list_tiles(config.data, "train")
    tiles = tiles[:: max(1, len(tiles) // options.tiles)][: options.tiles]
    with tempfile.TemporaryDirectory() as folder:
        globals()[arm](config, tiles, device, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="demo")
    parser.add_argument("--tiles", type=int, default=45)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device")
    parser.add_argument("--json")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--arm", choices=ARMS, help="run this one in this process, which stops itself: for the turns")
    options = parser.parse_args()
    if options.arm:
        return run_arm(options.arm, options)
    rounds = []
    for turn in range(options.rounds):
        # Which of two processes has the better memory is chance, and drawn again in each round.
        rounds.append(in_turns({arm: [*sys.argv, "--arm", arm] for arm in ARMS}))
        print(
            f"round {turn + 1}: " + ", ".join(f"{arm} {seconds:.1f} s" for arm, seconds in rounds[-1].items()),
            flush=True,
        )
    result = {f"of_{arm}": statistics.median(r[arm] / r["kdpipe"] for r in rounds) for arm in ARMS if arm != "kdpipe"}
    print(
        f"stage one is {result['of_bare']:.3f} x as fast as the bare loop, {result['of_prepared']:.3f} x as fast as that loop over the "
        f"network as kdpipe asks it, and {result['of_naive']:.2f} x as fast as the naive script"
    )
    if options.json:
        Path(options.json).write_text(
            json.dumps({**result, "tiles": options.tiles, "seconds": rounds}, indent=1) + "\n"
        )
    return None


if __name__ == "__main__":
    main()
