"""Steps of a benchmark, each in a process of its own, with what they used."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from usage import cpu_seconds, peak_kib

from runtime.apart import apart


def measured(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Run in a fresh process: what it returns, its seconds, CPU seconds and peak resident memory in GiB.

    Raises what `runtime.apart.apart` raises.
    """
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
