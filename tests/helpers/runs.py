"""Runs of stage two in the folder of a test: a student that trains in a moment, and what checkpoints hold."""

from pathlib import Path

import torch


class Small(torch.nn.Module):
    """A student with what a run must keep apart and in order: batch statistics, dropout, an encoder of its own learning rate."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8))
        self.head = torch.nn.Conv2d(8, 6, 1)

    def forward(self, x):
        return self.head(torch.nn.functional.dropout(self.encoder(x), 0.2, self.training))


def checkpoint(name="tiny", file="last.ckpt"):
    return torch.load(Path("model_weights/tests") / name / file, weights_only=True)


def weights(name="tiny"):
    return checkpoint(name)["state_dict"]


def assert_same_weights(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
