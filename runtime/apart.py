"""A call in a process of its own.

Contract: `apart` gives back what the function returns and raises the project's errors that it raised. The process is a
fresh one, so its peak memory is that of the call, and all of it is given back. Whatever ends the caller early, Ctrl-C
included, ends the process too, and what it had in temporary folders is removed.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, NoReturn, TypeVar

from runtime.errors import EnvironmentProblem, VideoLavitError

T = TypeVar("T")
PATIENCE = 10  # seconds a process has to remove what it wrote


@dataclass(frozen=True)
class _Failure:
    """An error as its parts: those with arguments of their own do not survive the way between processes."""

    kind: type[VideoLavitError]
    message: str
    values: dict[str, object]


@dataclass(frozen=True)
class _Crash:
    """The traceback of an error that is our own fault."""

    text: str


def apart(what: str, function: Callable[..., T], *arguments: Any, fix: str = "free some, or leave this out") -> T:
    """`function(*arguments)`, both picklable, in a fresh process.

    Raises the VideoLavitError that the function raises, and, when the process dies, EnvironmentProblem that names
    `what` and says `fix` about memory.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        raise EnvironmentProblem(f"{what}: its process was ended, most likely for want of memory; {fix}") from None
    finally:
        if sys.exc_info()[0] is not None:
            process.terminate()
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
        receiver.close()
    if isinstance(result, _Crash):
        raise RuntimeError(f"{what} failed:\n{result.text}")
    if isinstance(result, _Failure):
        failure = result.kind.__new__(result.kind, result.message)
        failure.args = (result.message,)
        failure.__dict__.update(result.values)
        raise failure
    return result


def _serve(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; the caller says what is to happen
    signal.signal(signal.SIGTERM, _leave)
    try:
        result = function(*arguments)
    except VideoLavitError as error:
        result = _Failure(type(error), str(error), vars(error))
    except Exception:
        result = _Crash(traceback.format_exc())
    sender.send(result)


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    # As an exception, so that temporary folders are removed on the way out.
    sys.exit(143)
