"""A thread that waits for what was sent, while DDP's goes on."""

from __future__ import annotations

import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable


class Arrival(ABC):
    """What the receiver waits for."""

    @abstractmethod
    def advance(self) -> None:
        """Starts what comes after a first phase, as soon as that is there."""

    @abstractmethod
    def end(self) -> None:
        """Waits for all of it and hands it over."""

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Hands over, in its place, what ``advance`` or ``end`` has raised."""


class Receiver:
    """A thread that waits for what was sent, in the order of sending; what comes after a first phase starts first."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=_receive, args=(self._queue,), name="hvd_qgenx.receiver", daemon=True).start()
        weakref.finalize(self, self._queue.put, None)

    def put(self, item: Arrival) -> None:
        self._queue.put(item)


def _receive(arriving: queue.SimpleQueue) -> None:
    under_way: deque[Arrival] = deque()
    while True:
        try:
            item = arriving.get(block=not under_way)
        except queue.Empty:
            ended = under_way.popleft()
            _guarded(ended, ended.end)
            del ended
            continue
        if item is None:
            return
        if _guarded(item, item.advance):
            under_way.append(item)
        del item


def _guarded(item: Arrival, action: Callable[[], None]) -> bool:
    """Whether the action came to its end."""
    try:
        action()
    except BaseException as error:  # whatever it is, DDP's thread must learn of it
        item.fail(error)
        return False
    return True
