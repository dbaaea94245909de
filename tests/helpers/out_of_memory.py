"""Errors of devices and processes that run out of memory."""

import os

import torch
from torch import nn

CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.68 GiB of which 1.20 GiB is free. "
    "Including non-PyTorch memory, this process has 22.40 GiB memory in use."
)


class Exhausted(nn.Module):
    """A network whose forward pass runs out of memory."""

    def __init__(self, err):
        super().__init__()
        self.encoder, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)
        self.err, self.training_too = err, True

    def forward(self, x):
        if self.training and not self.training_too:
            return self.head(self.encoder(x))
        raise self.err


LIMITED = """
import resource, sys
import kdpipe.pipeline.training.run, kdpipe.pipeline.precompute.run
from kdpipe.pipeline.commands.main import main
held = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv.pop(1)) * 10**6,) * 2)
main()
"""


PLAIN_MALLOC = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
