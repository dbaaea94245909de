"""
Copies to and from a CUDA device while it computes, and a clock of its computing time. Neither waits for the device.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA streams" and "Use pinned memory buffers".
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class PendingCopy:
    """Tensors that are being copied; the event `arrived` is recorded after the last of them."""

    tensors: Sequence[Tensor]
    arrived: Any  # a torch.cuda.Event

    def arrays(self) -> list[NDArray[Any]]:
        """The tensors in main memory, as arrays; waits for them, and lets other threads run meanwhile."""
        self.arrived.synchronize()
        return [tensor.numpy() for tensor in self.tensors]


class Transfers:
    """
    Copies to and from a CUDA device through pinned memory, each direction in a stream of its own.

    `send` may be called in any thread, the other methods in one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Made together, so that they differ: torch hands out 32 streams in turn.
        streams = [torch.cuda.Stream(device) for _ in range(3)]  # type: ignore[no-untyped-call]
        self._to_device, self._beside, self._to_host = streams

    def send(self, array: NDArray[Any]) -> PendingCopy:
        """Begin to copy an array to the device."""
        with torch.cuda.stream(self._to_device):
            sent = torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)
            return PendingCopy([sent], self._to_device.record_event())

    def receive(self, sent: PendingCopy) -> Tensor:
        """The tensor that `send` copied, for the current stream, which waits for it."""
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(sent.arrived)
        (tensor,) = sent.tensors
        tensor.record_stream(computing)  # keeps its memory until this stream has read it
        return tensor

    @contextmanager
    def beside(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Run the block in a second stream, which reads `tensors` of the current stream and computes beside it."""
        self._beside.wait_stream(torch.cuda.current_stream(self._device))
        for tensor in tensors:
            tensor.record_stream(self._beside)
        with torch.cuda.stream(self._beside):
            yield

    def fetch(self, tensors: Sequence[Tensor]) -> PendingCopy:
        """Begin to copy tensors of the current stream to main memory, once they are computed."""
        self._to_host.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._to_host):
            fetched = []
            for tensor in tensors:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                fetched.append(host.copy_(tensor, non_blocking=True))
                tensor.record_stream(self._to_host)
            # A blocking event, so that threads that wait for it leave their cores to the threads that compress.
            arrived = self._to_host.record_event(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
            return PendingCopy(fetched, arrived)


class Clock:
    """
    The time that a device takes for the work started within `timed`.

    On CUDA it is measured by events and read once they have passed, so that nobody waits for the device; elsewhere it is wall time.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of what is started in the current stream within the context."""
        began = time.perf_counter()
        start, end = (torch.cuda.Event(enable_timing=True) if self._cuda else None for _ in range(2))  # type: ignore[no-untyped-call]
        if start is not None:
            start.record()
        yield
        with self._lock:
            if start is None or end is None:
                self._seconds += time.perf_counter() - began
            else:
                end.record()
                self._running.append((start, end))
                self._add_finished()

    def taken(self) -> float:
        """Seconds of the work that has finished since the last call."""
        with self._lock:
            self._add_finished()
            seconds, self._seconds = self._seconds, 0.0
            return seconds

    def _add_finished(self) -> None:
        while self._running and self._running[0][1].query():  # type: ignore[no-untyped-call]
            start, end = self._running.popleft()
            self._seconds += start.elapsed_time(end) / 1000
