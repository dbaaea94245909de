"""Calls that wait for a disk or a network, many at once, with results in order and few of them in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    call: Callable[[Item], Result], items: Iterable[Item], at_once: int, *, weigh: Callable[[Item], int] = lambda item: 0,
    most: int = 0,
) -> Iterator[Result]:  # fmt: skip
    """
    `call(item)` of each of the items, from `at_once` threads; with one, in this thread and only when asked for.

    Besides what the threads are at, at most as many results wait to be taken, and no more of them are begun than `weigh` up to `most`.
    """
    if at_once == 1:
        yield from map(call, items)
        return
    waiting: deque[tuple[int, Future[Result]]] = deque()
    weight = 0
    threads = ThreadPoolExecutor(at_once)
    try:
        for item in items:
            added = weigh(item)
            while waiting and (len(waiting) >= 2 * at_once or weight + added > most > 0):
                taken, first = waiting.popleft()
                weight -= taken
                yield first.result()
            waiting.append((added, threads.submit(call, item)))
            weight += added
        for _, each in waiting:
            yield each.result()
    finally:
        threads.shutdown(cancel_futures=True)
