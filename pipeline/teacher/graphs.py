"""
What a CUDA device is asked for again and again, as one call: the thousand kernels of a network take a processor longer to start than a
fast device to compute, and longer yet beside threads that encode.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

KEPT = 8  # graphs, of as many shapes; they compute in the same memory
RECOVERS = "2.12"  # the first torch whose allocator goes on as before where a capture failed (pytorch/pytorch#180395)


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    input: Tensor
    outputs: Sequence[Tensor]


class Replay:
    """
    Calls a function of one CUDA tensor that gives several, from the second time with a shape on as a graph of what it does.

    The first runs as it is, and sets up what a graph cannot hold. At the second the graph's answer is compared with the function's, to
    the last bit; where it is another, or there is no graph, because the function waits for the device or memory is short, the
    function is called as it is from then on. What is given is written over by the next call.

    `stream` is that in which graphs are recorded, and nothing else is done: torch's own is one that other streams may share.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._seen: set[tuple[int, ...]] = set()
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._pool: Any = None
        self._refused = TorchVersion(torch.__version__) < RECOVERS

    def __call__(self, function: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> Sequence[Tensor]:
        """`function(x)`, asked of the current stream; `function` is the same in every call."""
        shape = tuple(x.shape)
        if shape not in self._graphs and shape in self._seen and len(self._graphs) < KEPT and not self._refused:
            graph = self._captured(function, x)
            if graph is None:
                self.drop()
            else:
                self._graphs[shape] = graph
        if shape in self._graphs:
            graph = self._graphs[shape]
            graph.input.copy_(x)
            graph.graph.replay()
            return graph.outputs
        self._seen.add(shape)
        try:
            return function(x)
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
        self.drop()  # they hold as much as one answer needs
        return function(x)

    def drop(self) -> None:
        """Give back the graphs' memory, and make no more."""
        self._refused = True
        if self._graphs:
            torch.cuda.synchronize()  # one may be under way
            self._graphs.clear()
            torch.cuda.empty_cache()

    def _captured(self, function: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> _Graph | None:
        expected = function(x)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, own = torch.cuda.CUDAGraph(), torch.empty_like(x)
        try:
            # Other threads go on to allocate and copy meanwhile, in streams of theirs. A capture that fails leaves its stream the current
            # one, which the outer context mends.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                outputs = function(own)
            own.copy_(x)
            graph.replay()
            same = all(torch.equal(found, wanted) for found, wanted in zip(outputs, expected, strict=True))
        except RuntimeError:
            same = False
        return _Graph(graph, own, outputs) if same else None
