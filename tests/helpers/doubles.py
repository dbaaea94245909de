"""Small stand-ins for networks, teachers and progress."""

from contextlib import nullcontext

import torch

from kdpipe.pipeline.progress import Silent
from kdpipe.pipeline.teacher.cuda import Clock
from kdpipe.pipeline.teacher.frozen import FrozenTeacher


class Plain(torch.nn.Module):
    """A student without batch norm, so that samples do not affect each other."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.head = torch.nn.Conv2d(8, 6, 1)

    def forward(self, x):
        return self.head(torch.relu(self.encoder(x)))


class CostlessTeacher(FrozenTeacher):
    """A teacher without a network: a subclass defines `cached_values`, and `by` replaces `open_teacher`."""

    def __init__(self):
        self._models = []
        self._transfers = None
        self._clock = Clock(torch.device("cpu"))

    def by(self, config, recipe, device, *say):
        self._recipe = recipe
        return self


class Lines:
    """Progress that keeps its messages."""

    def __init__(self):
        self.said = []

    def say(self, line):
        self.said.append(line)

    def bar(self, *args, **kwargs):
        return nullcontext(lambda steps=1, **figures: None)


class StopAfter(Silent):
    """Progress that sets `stop` after some tiles."""

    def __init__(self, tiles, stop):
        self.left, self.stop = tiles, stop

    def bar(self, *args, **kwargs):
        def advance(steps=1, **figures):
            self.left -= steps
            if self.left <= 0:
                self.stop.set()

        return nullcontext(advance)
