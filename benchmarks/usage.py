"""What a process has used: CPU seconds and peak memory, children included; and steps in processes of their own."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.apart import apart


def cpu_seconds() -> float:
    """Of this process and the children it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def peak_kib() -> int:
    """Largest resident size of this process or of one child, KiB."""
    # Not ru_maxrss of this process: that starts at the size of whoever started it.
    status = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def measured(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Run in a fresh process: what it returns, its seconds, CPU seconds and peak resident memory."""
    return apart(function.__name__, _measured, function, *arguments)


def _measured(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    started = time.perf_counter()
    result = function(*arguments) or {}
    return {
        "s": time.perf_counter() - started,
        "CPU s": cpu_seconds(),
        "peak RSS GiB": peak_kib() / (1 << 20),
        **result,
    }


def show(step: str, figures: dict[str, Any]) -> None:
    print(f"{step:8}", *(f"{name} {value:.2f}" for name, value in figures.items()), sep="  ", flush=True)
