"""A predictor without a network, and processes that draw maps with it: `python map_process.py kill|memory SCENE…`."""

import resource
import sys
import time

import torch

from kdpipe.pipeline.models.views import padded_logits
from kdpipe.pipeline.prediction.maps import predict
from kdpipe.pipeline.prediction.model import Card, Predictor

NAMES = ["Background", "Forest", "Water & ice"]


def first_band(images_NCHW):
    """Logits for which each pixel's class is its first band, modulo three."""
    classes = torch.arange(len(NAMES), dtype=torch.uint8)[:, None, None]
    return (images_NCHW[:, :1] % len(NAMES) == classes).float() * 4


def card(**changes):
    values = {
        "run": "tiny", "step": 2, "network": "stub", "checkpoint_sha256": "0" * 64, "classes": NAMES,
        "palette": [(0, 0, 0), (0, 158, 115), (86, 180, 233)], "ignore_index": 255, "bands": (1, 2, 3), "stretch": None,
        "mean": (0, 0, 0), "std": (1, 1, 1), "sizes": "any", "kdpipe": "0",
    }  # fmt: skip
    return Card(**{**values, **changes})


def predictor(logits=first_band, *, model=None, origin="stub.ckpt", **changes):
    """A predictor of `logits`, or of a network for images in 0..1; `changes` go to the card."""

    def of_model(images_NCHW):
        with torch.inference_mode():
            return padded_logits(model, images_NCHW.float() / 255)

    return Predictor(origin, card(**changes), "cpu", "none", logits if model is None else of_model)


def slowly(images):
    """Slow enough to be killed; prints a line for each batch."""
    print("predicted", flush=True)
    time.sleep(0.05)
    return first_band(images)


def main(what, *arguments):
    torch.set_num_threads(1)
    if what == "kill":
        predict(predictor(slowly), [arguments[0]], "out", window=64, overlap=32)
    else:  # the peak so far in MB, after each scene
        for i, scene in enumerate(arguments):
            predict(predictor(), [scene], f"out{i}", window=256, overlap=64)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
