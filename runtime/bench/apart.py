"""A call in a process of its own.

Contract: `apart` gives back what the function returns and raises the project's errors that it raised. The process is a
fresh one, so its peak memory is that of the call, and all of it is given back. `peak_memory` reads that peak.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from runtime.engines import peak_rss
from runtime.errors import EnvironmentProblem, VideoLavitError

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    """An error as its parts: those with arguments of their own do not survive the way between processes."""

    kind: type[VideoLavitError]
    message: str
    values: dict[str, object]


def apart(what: str, function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)`, both picklable, in a fresh process.

    Raises the VideoLavitError that the function raises, and EnvironmentProblem naming `what` when the process dies.
    """
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            result = pool.submit(_result_or_failure, function, arguments).result()
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            f"{what}: the process that measured it was ended, most likely for want of memory; "
            "free some, or leave it out with --stages"
        ) from error
    if isinstance(result, _Failure):
        failure = result.kind.__new__(result.kind, result.message)
        failure.args = (result.message,)
        failure.__dict__.update(result.values)
        raise failure
    return result


def _result_or_failure(function: Callable[..., T], arguments: tuple[Any, ...]) -> T | _Failure:
    try:
        return function(*arguments)
    except VideoLavitError as error:
        return _Failure(type(error), str(error), vars(error))


def peak_memory() -> int:
    """Largest resident memory of this process so far, bytes, without what the process that started it had."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return peak_rss()
    # On Linux `peak_rss` starts at the size of the parent, because it counts from before the new program was loaded.
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(line.split()[1]) * 1024 if line else peak_rss()
