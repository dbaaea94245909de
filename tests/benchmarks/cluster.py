"""
The cost of a dask cluster in stage one beside computing, and how speed grows with the number of workers.

    python tests/benchmarks/cluster.py [TILES] [--pause SECONDS]

Small tiles, a small teacher, first in one process, then on workers of one thread each. CPU seconds are each process's own, however
loaded the machine is. `--pause` adds so many seconds to every prediction in which the worker needs no core, as with an accelerator of
its own: one machine then stands for several.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.dask_processes import DaskProcesses
from helpers.files import tree, write_image

from kdpipe.configs import load_config
from kdpipe.pipeline.cluster.client import Cluster
from kdpipe.pipeline.models.smp import create_smp_model
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.progress import Silent


def cpu_seconds(pid):
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def main(tiles, pause, side=64):
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="kdpipe-cluster-"))
    os.chdir(folder)
    for i in range(tiles):
        write_image(folder / f"T/images/t{i:05d}.png", side, side, seed=i)
    torch.save(create_smp_model("unet", "mobilenet_v2", 8, key="teacher").state_dict(), folder / "teacher.pth")
    config = load_config(
        "demo",
        ["data.train=[T]", "data.val=[]", "data.unlabelled=[]", "data.allow_missing_masks=true", "teacher.encoder=mobilenet_v2",
         "teacher.checkpoint=teacher.pth"],
    )  # fmt: skip

    def run(name, **options):
        cache = config.cache.model_copy(update={"path": f"{name}.zarr"})
        start = time.perf_counter()
        summary = precompute(config.model_copy(update={"cache": cache}), torch.device("cpu"), **options)
        assert summary.computed == tiles
        return time.perf_counter() - start

    run("warm")
    before = cpu_seconds(os.getpid())
    wall = run("single")
    single = cpu_seconds(os.getpid()) - before
    print(f"one process: {1e3 * wall / tiles:.1f} ms a tile, {1e3 * single / tiles:.1f} ms of CPU")
    dask = DaskProcesses(folder)
    try:
        dask.start_scheduler()
        for count in (1, 2, 4, 8) if pause else (1, 2):
            while len(dask.workers) < count:
                dask.start_worker(f"w{len(dask.workers)}", slow=pause)
            dask.wait_for_workers()
            with Cluster(Silent(), "cpu", address=dask.address) as cluster:
                run(f"warm{count}", workers=cluster)
                pids = {"client": [os.getpid()], "scheduler": [dask.scheduler], "workers": dask.workers}
                before = {name: sum(map(cpu_seconds, group)) for name, group in pids.items()}
                wall = run(f"dask{count}", workers=cluster)
                used = {name: sum(map(cpu_seconds, group)) - before[name] for name, group in pids.items()}
            assert tree(folder / f"dask{count}.zarr") == tree(folder / "single.zarr")
            cpu = ", ".join(f"{name} {1e3 * seconds / tiles:.1f}" for name, seconds in used.items())
            print(f"{count} workers: {1e3 * wall / tiles:.1f} ms, {tiles / wall:.2f} tiles/s; ms of CPU a tile: {cpu}")
    finally:
        dask.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", nargs="?", type=int, default=200)
    parser.add_argument("--pause", type=float, default=0.0)
    options = parser.parse_args()
    main(options.tiles, options.pause)
