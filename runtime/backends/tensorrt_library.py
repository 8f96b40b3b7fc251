"""The TensorRT libraries: TensorRT and TensorRT-RTX have one API under two names.

Contract: nothing is imported before `library` is called; a library that is not there is an EnvironmentProblem with the
command that installs it. What a library logs is kept, so that a failure can say why; nothing is printed.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from runtime.errors import EnvironmentProblem

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # backend of the manifest -> module


@cache
def library(backend: str) -> Any:
    """The module of a backend. Raises EnvironmentProblem."""
    try:
        return importlib.import_module(MODULES[backend])
    except (ImportError, OSError) as error:  # OSError: a shared library it loads by itself
        reason = " ".join(str(error).split())
        ships = ", or use the one that JetPack ships" if backend == "tensorrt" else ""
        raise EnvironmentProblem(
            f"backend {backend}: {MODULES[backend]} cannot be imported ({reason}); "
            f'run `pip install "videolavit[{backend}]"`{ships}'
        ) from error


def version(backend: str) -> str:
    """What a plan records as its library, for example "tensorrt-rtx 1.7.1.116". Raises EnvironmentProblem."""
    return f"{backend} {library(backend).__version__}"


@cache
def log(backend: str) -> Any:
    """The one logger of a library in this process, with `errors`: messages of errors so far, oldest first.

    A library keeps the first logger it is given for as long as the process lives.
    """
    base: Any = library(backend).ILogger

    class Log(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (base.Severity.ERROR, base.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

    return Log()


def last_error(backend: str) -> str:
    """The latest error the library reported, in one line, and forget all."""
    errors = log(backend).errors
    message = errors[-1] if errors else "no reason given"
    errors.clear()
    return str(message)
