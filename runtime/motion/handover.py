"""A bounded queue from a thread that produces to one that consumes; when it is full the oldest item goes.

Contract: `put` never waits unless told to, so a producer that must keep up with a live stream is never held back;
what is dropped is counted. Ending or failing the producer ends or fails the consumer after the items still held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from threading import Condition
from typing import Generic, TypeVar

T = TypeVar("T")

_TICK = 0.2  # seconds; waits are cut in pieces so that Ctrl-C is heard on every platform


class Handover(Generic[T]):
    """Attributes:
    dropped: items that were dropped because the consumer was late.
    """

    def __init__(self, max_items: int, max_bytes: int, drop: bool) -> None:
        """`drop`: drop the oldest item when full; otherwise `put` waits."""
        self.dropped = 0
        self._max_items, self._max_bytes, self._drop = max_items, max_bytes, drop
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._changed = Condition()
        self._ended = False
        self._error: Exception | None = None

    def put(self, item: T, size: int) -> bool:
        """Add `item` of `size` bytes; False if the queue has ended."""
        with self._changed:
            while not self._ended and self._full(size) and self._items:
                if self._drop:
                    self._bytes -= self._items.popleft()[1]
                    self.dropped += 1
                else:
                    self._changed.wait(_TICK)
            if self._ended:
                return False
            self._items.append((item, size))
            self._bytes += size
            self._changed.notify_all()
            return True

    def _full(self, size: int) -> bool:
        return len(self._items) >= self._max_items or self._bytes + size > self._max_bytes

    def end(self, error: Exception | None = None) -> None:
        """No more items; the consumer gets `error` after the last one. The first call counts."""
        with self._changed:
            if not self._ended:
                self._ended, self._error = True, error
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                while not self._items and not self._ended:
                    self._changed.wait(_TICK)
                if not self._items:
                    if self._error is not None:
                        raise self._error
                    return
                item, size = self._items.popleft()
                self._bytes -= size
                self._changed.notify_all()
            yield item
