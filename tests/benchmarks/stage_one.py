"""
The speed of stage one against bare loops over the same network, and against a script written without kdpipe.

    python tests/benchmarks/stage_one.py dubai/linknet_kd [--tiles 45] [--rounds 3] [--json FILE] [--set KEY=VALUE …]

In each round four processes take turns of two seconds while the others are stopped: a machine's pace drifts by a fifth within a
minute, which would distort loops that run one after the other. Timing begins once the teacher is loaded. A run of kdpipe costs 0.3 s
beside its tiles (digests, the last tile's encoding), so few tiles show less than many.

- `bare` runs the network, as smp and torch provide it, on tiles decoded in memory, in kdpipe's batches and precision: no softmax,
  nothing read, nothing kept.
- `prepared` is that loop over the network as kdpipe runs it: batch norms folded, channels last, in pages of 2 MB.
- `naive` reads, predicts and saves one tile after the other, as float16 soft targets with `np.save`, in torch's own precision.

A GPU is soon done with the tiles there are; more than that are the same tiles again under other names.
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
    import numpy as np
    import torch

    from kdpipe.pipeline.teacher.frozen import computing_in
    from kdpipe.pipeline.teacher.loading import load_teacher

    model = load_teacher(config.teacher).to(device)
    batches = [
        np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2)) for images_NHWC in decoded(config, tiles, device)
    ]
    with torch.inference_mode(), computing_in(config.teacher.precision, device):
        for images_N3HW in first_ones(batches, device):
            logits_of(model, images_N3HW, device)
        wait_for(device)
        stop_here()
        for images_N3HW in batches:
            logits_of(model, images_N3HW, device)
        wait_for(device)
    stop_here()


def prepared(config, tiles, device, folder):
    batches = decoded(config, tiles, device)
    teacher = warm_teacher(config, batches, device)
    stop_here()
    for images_NHWC in batches:
        teacher.logits(images_NHWC)
    wait_for(device)
    stop_here()


def naive(config, tiles, device, folder):
    import numpy as np
    import rasterio
    import torch
    from rasterio.errors import NotGeoreferencedWarning

    from kdpipe.data.rasters import read_image
    from kdpipe.pipeline.teacher.loading import load_teacher

    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    model = load_teacher(config.teacher).to(device)
    class_map = torch.tensor(config.class_map_matrix(), dtype=torch.float32, device=device)

    def logits_of_file(path):
        with rasterio.open(path) as raster:
            return logits_of(model, raster.read([1, 2, 3])[None], device)

    with torch.no_grad():
        for image in first_ones([read_image(tile.image) for tile in tiles], device, [tile.image for tile in tiles]):
            logits_of_file(image)
        wait_for(device)
        stop_here()
        for i, tile in enumerate(tiles):
            logits = logits_of_file(tile.image)
            probs = torch.softmax(logits / config.distill.temperature, dim=1)
            soft = torch.einsum("nthw,ts->nshw", probs, class_map)[0]
            np.save(folder / f"{i}.npy", soft.half().cpu().numpy())
    stop_here()


def logits_of(model, images_N3HW, device):
    """A script's logits of images, uint8 `(N, 3, H, W)`."""
    import torch

    x = torch.from_numpy(images_N3HW).to(device).float() / 255
    height, width = x.shape[2:]
    x = torch.nn.functional.pad(x, (0, -width % 32, 0, -height % 32), mode="reflect")
    return model(x)[..., :height, :width]


def decoded(config, tiles, device):
    """kdpipe's batches of the tiles, uint8 `(N, H, W, 3)`."""
    from kdpipe.pipeline.precompute.batches import load_batch, make_batches, teacher_batch_size
    from kdpipe.pipeline.precompute.subjects import subjects

    batches = list(make_batches(subjects(config, tiles, None), {}, teacher_batch_size(config, device)))
    return [load_batch(batch).images_NHWC for batch in batches]


def first_ones(arrays, device, items=None):
    """The items to run before the clock starts, on a GPU one of each shape: the set-up of the first call is not a tile's cost."""
    found = {array.shape: item for array, item in zip(arrays, items or arrays, strict=True)}
    return list(found.values()) if device.type == "cuda" else (items or arrays)[:1]


def wait_for(device):
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def kdpipe(config, tiles, device, folder):
    """`precompute` from its first tile on: lists, lock and manifest are timed, loading the teacher is not."""
    from kdpipe.pipeline.precompute import plan
    from kdpipe.pipeline.precompute import run as stage

    teacher = warm_teacher(config, decoded(config, tiles, device), device)
    plan.list_tiles = lambda data, split: tiles
    stage.open_teacher = lambda config, recipe, device: teacher
    config = config.model_copy(update={"cache": config.cache.model_copy(update={"path": str(folder / "cache.zarr")})})
    stop_here()
    summary = stage.precompute(config, device)
    stop_here()
    assert summary.computed == len(tiles)


def warm_teacher(config, batches, device):
    """kdpipe's teacher after its first predictions."""
    from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
    from kdpipe.pipeline.teacher.frozen import open_teacher

    teacher = open_teacher(config, complete_recipe(config, None, None), device)
    for images_NHWC in first_ones(batches, device):
        teacher.logits(images_NHWC)
        for encode in teacher.encoded(images_NHWC) if device.type == "cuda" else []:
            encode()
    wait_for(device)
    return teacher


def own_precision(options):
    """The precision that `teacher.precision: auto` resolves to on the device and these tiles."""
    from kdpipe.configs import load_config
    from kdpipe.data.tiles import list_tiles
    from kdpipe.pipeline.devices import resolve_device
    from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
    from kdpipe.pipeline.teacher.precision import resolve

    config, device = load_config(options.config, options.overrides), resolve_device(options.device)
    recipe = resolve(config, complete_recipe(config, None, None), list_tiles(config.data, "train"), None, device)
    (record,) = recipe.teachers
    return record.precision


def run_arm(arm: str, options: argparse.Namespace) -> None:
    """Run one loop in this process, which stops itself before its first tile and after its last."""
    from kdpipe.configs import load_config
    from kdpipe.data.tiles import list_tiles
    from kdpipe.pipeline.devices import ask_for_huge_pages, keep_freed_memory, resolve_device

    if arm in ("prepared", "kdpipe"):  # as the command does first of all
        ask_for_huge_pages()
        keep_freed_memory()
    config = load_config(options.config, options.overrides)
    device = resolve_device(options.device)
    tiles = list_tiles(config.data, "train")
    tiles = tiles[:: max(1, len(tiles) // options.tiles)][: options.tiles]
    again = range(-(-options.tiles // len(tiles)))
    tiles = [replace(tile, id=f"{tile.id}_{i}") if i else tile for i in again for tile in tiles][: options.tiles]
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
    parser.add_argument(
        "--arm", choices=ARMS, help="run only this loop, in this process, which stops itself between turns"
    )
    options = parser.parse_args()
    if options.arm:
        return run_arm(options.arm, options)
    rounds, precision = [], own_precision(options)
    print(f"precision {precision}", flush=True)
    for turn in range(options.rounds):
        # Memory placement differs between processes by chance; each round draws it again.
        rounds.append(
            in_turns({arm: [*sys.argv, "--arm", arm, "--set", f"teacher.precision={precision}"] for arm in ARMS})
        )
        print(
            f"round {turn + 1}: " + ", ".join(f"{arm} {seconds:.1f} s" for arm, seconds in rounds[-1].items()),
            flush=True,
        )
    result = {f"of_{arm}": statistics.median(r[arm] / r["kdpipe"] for r in rounds) for arm in ARMS if arm != "kdpipe"}
    print(
        f"stage one is {result['of_bare']:.3f} x as fast as the bare loop, {result['of_prepared']:.3f} x as fast as that loop over the "
        f"network as kdpipe runs it, and {result['of_naive']:.2f} x as fast as the naive script"
    )
    if options.json:
        Path(options.json).write_text(
            json.dumps({**result, "tiles": options.tiles, "precision": precision, "seconds": rounds}, indent=1) + "\n"
        )
    return None


if __name__ == "__main__":
    main()
