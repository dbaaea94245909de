"""
Copies between main memory and a CUDA device beside what the device computes: from and to pinned memory, in streams of their own;
and the time it took, without waiting for it.

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
class OnItsWay:
    """What is being copied; `arrived` is recorded once it is all there."""

    tensors: Sequence[Tensor]
    arrived: Any  # a torch.cuda.Event

    def arrays(self) -> list[NDArray[Any]]:
        """Of what was copied to main memory, once it is there; other threads go on meanwhile."""
        self.arrived.synchronize()
        return [tensor.numpy() for tensor in self.tensors]


class Transfers:
    """
    One stream there and one back, one for what is done beside the networks, and one in which graphs are recorded.

    `send` is for any thread, the rest for one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Made together, so that they are not one and the same: torch has 32, which it hands out in turn.
        streams = [torch.cuda.Stream(device) for _ in range(4)]  # type: ignore[no-untyped-call]
        self._there, self._beside, self._back, self.recording = streams
        self._handed_on: torch.cuda.Event | None = None
        self._fetched: torch.cuda.Event | None = None

    def send(self, array: NDArray[Any]) -> OnItsWay:
        """Begin to copy an array to the device."""
        with torch.cuda.stream(self._there):
            sent = torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)
            return OnItsWay([sent], self._there.record_event())

    def take(self, sent: OnItsWay) -> Tensor:
        """What was sent, for the stream that computes, which waits for it, and for what was handed on before."""
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(sent.arrived)
        if self._handed_on is not None:
            computing.wait_event(self._handed_on)
        (tensor,) = sent.tensors
        tensor.record_stream(computing)  # its memory is not given to others before this stream has read it
        return tensor

    @contextmanager
    def beside(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """
        Copies of what the current stream computes, for what is asked for in the context, which runs beside what that stream does next.

        It may write over what was fetched before: that has been copied.
        """
        self._beside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._beside):
            copies = [tensor.clone() for tensor in tensors]
            for tensor in tensors:
                tensor.record_stream(self._beside)
            self._handed_on = self._beside.record_event()
            if self._fetched is not None:
                self._beside.wait_event(self._fetched)
            yield copies

    def fetch(self, tensors: Sequence[Tensor]) -> OnItsWay:
        """Begin to copy what the current stream computes to main memory, once it has done so."""
        self._back.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._back):
            fetched = []
            for tensor in tensors:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                fetched.append(host.copy_(tensor, non_blocking=True))
                tensor.record_stream(self._back)
            # Blocking: threads that wait for it leave their cores to those that compress.
            self._fetched = self._back.record_event(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
            return OnItsWay(fetched, self._fetched)


class Clock:
    """
    How long a device took for what was asked of it in `timed`.

    CUDA says so itself, later, as a process that asks it does not wait; elsewhere it is the time that passes.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """What is asked of the current stream in the context."""
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
                self._sum_up()

    def taken(self) -> float:
        """Seconds that the device took since this was last called, for what it is through with."""
        with self._lock:
            self._sum_up()
            seconds, self._seconds = self._seconds, 0.0
            return seconds

    def _sum_up(self) -> None:
        while self._running and self._running[0][1].query():  # type: ignore[no-untyped-call]
            start, end = self._running.popleft()
            self._seconds += start.elapsed_time(end) / 1000
