"""
What a CUDA device is asked for again and again, as one call: the thousand kernels of a network take a processor longer to start than a
fast device to compute, and longer yet beside threads that encode.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEPT = 8  # graphs, of as many shapes; they compute in the same memory


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    input: Tensor
    outputs: Sequence[Tensor]


class Replay:
    """
    A function of one CUDA tensor that gives several, replayed as a graph from the second call with a shape on.

    The first runs as it is, and sets up what a graph cannot hold. At the second the graph's answer is compared with the function's, to
    the last bit; where it is another, or there is no graph, because the function waits for the device or memory is short, the
    function goes on as it is. What is given is written over by the next call.
    """

    def __init__(self, function: Callable[[Tensor], Sequence[Tensor]]) -> None:
        self._function = function
        self._seen: set[tuple[int, ...]] = set()
        self._graphs: OrderedDict[tuple[int, ...], _Graph] = OrderedDict()
        self._pool: Any = None
        self._refused = False

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """`function(x)`, asked of the current stream."""
        shape = tuple(x.shape)
        if self._refused or shape not in self._seen:
            self._seen.add(shape)
            return self._function(x)
        if shape not in self._graphs:
            graph = self._captured(x)
            if graph is None:
                self._refused = True
                return self._function(x)
            self._graphs[shape] = graph
            if len(self._graphs) > KEPT:
                torch.cuda.current_stream().synchronize()  # it may still be in the oldest one
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(shape)
        graph = self._graphs[shape]
        graph.input.copy_(x)
        graph.graph.replay()
        return graph.outputs

    def _captured(self, x: Tensor) -> _Graph | None:
        expected = self._function(x)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, own = torch.cuda.CUDAGraph(), torch.empty_like(x)
        stream = torch.cuda.current_stream()
        try:
            # Other threads go on to allocate and copy meanwhile, in streams of theirs. A capture that fails leaves its stream the current
            # one, which the outer context mends.
            with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = self._function(own)
            own.copy_(x)
            graph.replay()
            same = all(torch.equal(found, wanted) for found, wanted in zip(outputs, expected, strict=True))
        except RuntimeError:
            same = False
        return _Graph(graph, own, outputs) if same else None
