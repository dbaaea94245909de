"""
How fast is stage one against bare loops of the same network, and against the script one would write without kdpipe?

    python tests/benchmarks/stage_one.py dubai/linknet_kd [--tiles 45] [--rounds 3] [--json FILE] [--set KEY=VALUE …]

In each round four processes take turns of two seconds, those that wait are stopped: a machine's pace drifts by a fifth within a
minute, which one loop after the other would measure. Only what comes after the teacher is loaded is timed. A run of kdpipe costs
0.3 s beside its tiles (digests, the last tile's encoding), so that few tiles show less than many.

- `bare` asks the network, as smp and torch have it, about tiles that lie decoded in memory, in kdpipe's batches and precision: no
  softmax, nothing read, nothing kept.
- `prepared` is that loop over the network as kdpipe asks it: batch norms folded, channels last, in pages of 2 MB.
- `naive` reads, asks and saves one tile after the other, as float16 soft targets with `np.save`, in torch's own precision.

More tiles than there are, for a GPU that is soon through them, are the same ones again under other names.
"""

import argparse
import json
import statistics
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

from turns import in_turns, stop_here

ARMS = ("bare", "prepared", "kdpipe", "naive")


def bare(config, tiles, device, folder):
    import torch

    from kdpipe.pipeline.models.teacher import _exactly, load_teacher

    model = load_teacher(config.teacher).to(device)
    batches = decoded(config, tiles, device)
    with torch.inference_mode(), _exactly(config.teacher.precision, device):
        logits_of(model, batches[0], device)  # what is set up at the first call is no tile's cost
        wait_for(device)
        stop_here()
        for images_N3HW in batches:
            logits_of(model, images_N3HW, device)
        wait_for(device)
    stop_here()


def prepared(config, tiles, device, folder):
    teacher = asked_teacher(config, tiles, device)
    batches = decoded(config, tiles, device)
    wait_for(device)
    stop_here()
    for images_N3HW in batches:
        teacher.logits(images_N3HW.transpose(0, 2, 3, 1))
    wait_for(device)
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
            return logits_of(model, raster.read([1, 2, 3])[None], device)

    with torch.no_grad():
        logits_of_file(tiles[0].image)
        stop_here()
        for i, tile in enumerate(tiles):
            logits = logits_of_file(tile.image)
            probs = torch.softmax(logits / config.distill.temperature, dim=1)
            soft = torch.einsum("nthw,ts->nshw", probs, class_map)[0]
            np.save(folder / f"{i}.npy", soft.half().cpu().numpy())
    stop_here()


def logits_of(model, images_N3HW, device):
    """As a script asks a network about images, uint8 `(N, 3, H, W)`."""
    import torch

    x = torch.from_numpy(images_N3HW).to(device).float() / 255
    height, width = x.shape[2:]
    x = torch.nn.functional.pad(x, (0, -width % 32, 0, -height % 32), mode="reflect")
    return model(x)[..., :height, :width]


def decoded(config, tiles, device):
    """The batches that kdpipe makes of the tiles, read."""
    from kdpipe.pipeline.batches import load_batch, make_batches, teacher_batch_size
    from kdpipe.pipeline.subjects import subjects

    batches, _ = make_batches(subjects(config, tiles, None), {}, teacher_batch_size(config, device))
    return [load_batch(batch).images_NHWC.transpose(0, 3, 1, 2) for batch in batches]


def wait_for(device):
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


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
    from kdpipe.pipeline.models.teacher import open_teacher
    from kdpipe.pipeline.recipe import complete_recipe

    teacher = open_teacher(config, complete_recipe(config, None, None), device)
    teacher.logits(decoded(config, tiles[:1], device)[0].transpose(0, 2, 3, 1))
    return teacher


def in_own_precision(config, tiles, device):
    """The configuration with what `teacher.precision: auto` is on the device and these tiles."""
    from kdpipe.pipeline.precision import resolved
    from kdpipe.pipeline.recipe import complete_recipe

    recipe = resolved(config, complete_recipe(config, None, None), tiles, None, device)
    (record,) = recipe.teachers
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"precision": record.precision})})


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
    again = range(-(-options.tiles // len(tiles)))
    tiles = [replace(tile, id=f"{tile.id}_{i}") if i else tile for i in again for tile in tiles][: options.tiles]
    config = in_own_precision(config, tiles, device)
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
