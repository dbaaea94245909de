"""Processes that draw maps with a stub, to be killed and measured: `python map_process.py kill|memory SCENE…`."""

import resource
import sys
import time
from types import SimpleNamespace

import torch

from kdpipe.pipeline.prediction.maps import predict

NAMES = ["Background", "Forest", "Water & ice"]


def first_band(images_NCHW):
    """Logits for which each pixel's class is its first band, modulo three."""
    classes = torch.nn.functional.one_hot(images_NCHW[:, 0].long() % len(NAMES), len(NAMES))
    return classes.permute(0, 3, 1, 2).float() * 4


def stub(ask=first_band):
    palette = [(0, 0, 0), (0, 158, 115), (86, 180, 233)]
    card = SimpleNamespace(
        run="tiny", step=2, network="stub", checkpoint_sha256="0" * 64, classes=NAMES, palette=palette, ignore_index=255,
        bands=(1, 2, 3), stretch=None, kdpipe="0",
    )  # fmt: skip
    return SimpleNamespace(origin="stub.ckpt", card=card, device="cpu", tta="none", ask=ask)


def slowly(images):
    """So slow that there is time to kill it; a line for each question."""
    print("asked", flush=True)
    time.sleep(0.05)
    return first_band(images)


def main(what, *arguments):
    torch.set_num_threads(1)
    if what == "kill":
        predict(stub(slowly), [arguments[0]], "out", window=64, overlap=32)
    else:  # the peak so far in MB, after each scene
        for i, scene in enumerate(arguments):
            predict(stub(), [scene], f"out{i}", window=256, overlap=64)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
