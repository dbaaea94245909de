"""Small stand-ins for networks, teachers and progress."""

from contextlib import nullcontext

import torch

from kdpipe.pipeline.progress import Silent
from kdpipe.pipeline.teacher.cuda import Clock
from kdpipe.pipeline.teacher.frozen import FrozenTeacher


class Plain(torch.nn.Module):
    """A student in which samples do not meet: no batch norm."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.head = torch.nn.Conv2d(8, 6, 1)

    def forward(self, x):
        return self.head(torch.relu(self.encoder(x)))


class CostlessTeacher(FrozenTeacher):
    """Answers by the `cached_values` of a subclass, without a network; `by` takes the place of `open_teacher`."""

    def __init__(self):
        self._transfers = None
        self._clock = Clock(torch.device("cpu"))

    def by(self, config, recipe, device):
        self._recipe = recipe
        return self


class Lines:
    """A progress that keeps what is said."""

    def __init__(self):
        self.said = []

    def say(self, line):
        self.said.append(line)

    def bar(self, *args):
        return nullcontext(lambda steps=1, **figures: None)


class StopAfter(Silent):
    """A progress that asks to stop after some tiles."""

    def __init__(self, tiles, stop):
        self.left, self.stop = tiles, stop

    def bar(self, *args, **kwargs):
        from contextlib import nullcontext

        def advance(steps=1, **figures):
            self.left -= steps
            if self.left <= 0:
                self.stop.set()

        return nullcontext(advance)
