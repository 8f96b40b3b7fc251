"""What a run tells its watcher while it works.

Contract: the pipeline calls one observer with `Progress`; who shows it, and how, is not the pipeline's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from runtime.memory import Peak


@dataclass(frozen=True)
class Progress:
    """Stage `stage` has done `done` of `total` steps (`total` None: not known beforehand)."""

    stage: str
    done: int
    total: int | None = None


Observer = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """The observer of those who do not watch."""


class Stopwatch:
    """Seconds spent per stage, added up over repeats; and of a run, when what a person waits for was there.

    Attributes: `seconds` and `peaks` (most bytes of the process) per stage, `reached` from `begin` to the first time of
    each event.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.begin()

    def begin(self) -> None:
        """A run starts now."""
        self._began = time.perf_counter()
        self.reached: dict[str, float] = {}

    def reach(self, event: str) -> None:
        self.reached.setdefault(event, time.perf_counter() - self._began)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        peak = Peak()
        try:
            with peak:
                yield
        finally:
            self.peaks[name] = max(self.peaks.get(name, 0), peak.bytes)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
