"""How much memory this process takes.

Contract: numbers are bytes of resident memory, of this process alone; what lies on a GPU is not in them. The peak of a
stretch of work is exact where it is the highest so far, and else the highest of samples taken every `_EVERY` seconds:
the system's own mark is never reset, so that whoever watches the process from outside sees its true peak.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

_EVERY = 0.02  # seconds; a sample costs some ten microseconds
_STATM = Path("/proc/self/statm")


def resident() -> int | None:
    """Resident memory now; None where the system does not say."""
    try:
        return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None


def peak_rss() -> int:
    """Largest resident memory of this process so far."""
    with suppress(OSError):  # not every system has this file
        # What follows below starts, in a new process, at the size of the one that started it; this does not.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Peak:
    """A context manager around work; afterwards `bytes` is its peak."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> Peak:
        self._before = peak_rss()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
        highest = peak_rss()
        if highest > self._before or not self.bytes:
            self.bytes = highest

    def _watch(self) -> None:
        self._sample()
        while not self._stop.wait(_EVERY):
            self._sample()

    def _sample(self) -> None:
        self.bytes = max(self.bytes, resident() or 0)
