"""One of two processes that train a student together; `python ddp_rank.py RANK PORT FOLDER` writes its results into FOLDER."""

import os
import sys
import threading
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.doubles import Plain, StopAfter

from kdpipe.configs import load_config
from kdpipe.configs.errors import Interrupted
from kdpipe.pipeline.losses import distillation_loss
from kdpipe.pipeline.training import run as training
from kdpipe.pipeline.training.loop import Loop

SUMS = (
    "labelled",
    "one rank without labels",
    "no labels",
    "padded",
    "with auxiliary head",
    "weighted",
    "other losses",
    "soft regions",
)
MEANS = ("means", "means with one rank without labels", "means with one rank without data")  # over the ranks
CASES = SUMS + MEANS
SIDE, CLASSES = 24, 6
WEIGHTS = torch.tensor([0.1, 0.5, 1, 2, 4, 10])


def squared(logits, targets, counts):
    """A distillation loss of one's own."""
    return (logits.softmax(dim=1) - targets).square().sum(dim=1)[counts].mean()


LOSSES = {
    "weighted": {"labelled_loss": {"ce": 1.0, "focal": 2.0}, "class_weights_C": WEIGHTS},
    "other losses": {"labelled_loss": {"focal": 3.0, "jaccard": 1.0, "tversky": 0.5}},
    "soft regions": {"soft_losses": {"kl": 1.0, "dice": 2.0, "jaccard": 0.5}},
} | {name: {"labelled_loss": {"lovasz": 1.0}, "own_loss": squared} for name in MEANS}


def case_batch(name):
    """A batch of four samples; rank 0 has the first two."""
    g = torch.Generator().manual_seed(CASES.index(name))
    images = torch.randn(4, 3, SIDE, SIDE, generator=g)
    mask = torch.randint(0, CLASSES, (4, SIDE, SIDE), generator=g)
    mask[0, :, :17] = 255  # the ranks have different numbers of labelled pixels, and of classes
    mask[3][mask[3] == 2] = 1
    inside = torch.ones(4, SIDE, SIDE, dtype=torch.bool)
    targets = torch.softmax(3 * torch.randn(4, CLASSES, SIDE, SIDE, generator=g), dim=1)
    if name.endswith("one rank without labels"):
        mask[2:] = 255
    if name.endswith("one rank without data"):
        mask[:2], inside[:2] = 255, False
    if name == "no labels":
        mask[:] = 255
    if name == "padded":
        inside[0, 5:], mask[0, 5:] = False, 255
    return images, mask, inside, targets * inside[:, None], torch.rand(4, generator=g) * 1e-3


def gradients(student, name, part):
    images, mask, inside, targets, entropy_error = (tensor[part] for tensor in case_batch(name))
    logits = student(images)
    terms = distillation_loss(
        logits, mask, inside, targets, entropy_error, alpha=0.6, temperature=2.0, ignore_index=255,
        auxiliary_NCHW=logits * 0.5 if name == "with auxiliary head" else None, **LOSSES.get(name, {}),
    )  # fmt: skip
    terms.total.backward()
    found = [parameter.grad.numpy().copy() for parameter in student.parameters()]
    student.zero_grad()
    return found, terms


def fresh(*arguments, **options):
    torch.manual_seed(5)
    return Plain()


def with_unused(*arguments, **options):
    """A student as `starting_student` returns some: not all of its parameters get a gradient."""
    student = fresh()
    student.unused = torch.nn.Conv2d(8, 8, 1)
    return student


def main(rank, port, folder):
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    rank_zero_only.rank = rank
    torch.set_num_threads(1)
    training.starting_student = with_unused
    seen = []
    original = Loop._train_batch

    def noted(self, batch):
        seen.append((self.position.batches, batch["image"].double().sum(dim=(1, 2, 3)).tolist()))
        return original(self, batch)

    Loop._train_batch = noted
    config = load_config(folder / "config.yaml", ("train.devices=2",))
    os.chdir(folder)
    stop = threading.Event()
    try:  # only rank 0 is asked to stop; both stop after the same step
        training.train(config, torch.device("cpu"), progress=StopAfter(3, stop) if rank == 0 else None, stop=stop)
        stopped_at = -1
    except Interrupted as err:
        stopped_at = int(str(err).split("after step ")[1].split(" ")[0])
    summary = training.train(config, torch.device("cpu"), resume=True)
    found = {}
    student = torch.nn.parallel.DistributedDataParallel(fresh())
    for name in CASES:
        grads, terms = gradients(student, name, slice(2 * rank, 2 * rank + 2))
        found |= {f"{name}/{i}": grad for i, grad in enumerate(grads)}
        found |= {f"{name}/{term}": getattr(terms, term).detach().numpy() for term in ("total", "hard", "soft")}
    np.savez(
        folder / f"rank{rank}.npz",
        samples=np.array([sums for _, sums in seen]),
        batches=np.array([number for number, _ in seen]),
        losses=np.array(summary.losses),
        miou=summary.final["miou"],
        stopped_at=stopped_at,
        **found,
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
