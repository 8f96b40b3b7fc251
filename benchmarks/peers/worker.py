"""A peer in a process of its own, called from another one.

Contract: only one peer works at a time; the others wait for a message, which costs nothing. Seconds are taken where the
work is done. A peer whose library is missing, or that ends, is a `PeerProblem` in one line.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from typing import Any

from peers.protocol import Setting
from runtime.bench.timing import REST
from runtime.memory import peak_rss


class PeerProblem(Exception):
    """A peer that cannot be measured; says why."""


class Worker:
    """A prepared peer. Attribute `name`."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, name, setting), daemon=True)
        self._process.start()
        other.close()
        try:
            self._receive()
        except PeerProblem:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> tuple[Any, float]:
        """What the peer's method gives, and the seconds it took. Raises PeerProblem."""
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise PeerProblem(f"{self.name}: its process has ended") from error
        result = self._receive()
        time.sleep(REST)  # the threads of a library that waits actively go to sleep
        return result

    def peak(self) -> int:
        """Largest resident memory so far, bytes."""
        return self.call("peak")[0]

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except EOFError:
            self._process.join(timeout=10)
            raise PeerProblem(f"{self.name}: its process ended with status {self._process.exitcode}") from None
        if kind == "problem":
            raise PeerProblem(f"{self.name}: {value}")
        return value


def load(name: str) -> Any:
    """Module of a peer, which imports no library yet."""
    return importlib.import_module(f"peers.{name}")


def convert(name: str, setting: Setting) -> str | None:
    """Let a peer write its form of the model; why it cannot, in one line."""
    _quiet()
    try:
        load(name).Peer().convert(setting)
    except ImportError as error:
        return _missing(name, error)
    except Exception as error:
        return f"the model cannot be converted: {_line(error)}"
    return None


def _serve(connection: Connection, name: str, setting: Setting) -> None:
    _quiet()
    peer = load(name).Peer()
    try:
        peer.prepare(setting)
        connection.send(("ready", None))
        while True:
            method, arguments = connection.recv()
            if method == "peak":
                connection.send(("done", (peak_rss(), 0.0)))
                continue
            started = time.perf_counter()
            result = getattr(peer, method)(*arguments)
            connection.send(("done", (result, time.perf_counter() - started)))
    except EOFError:  # the other side is through
        return
    except ImportError as error:
        connection.send(("problem", _missing(name, error)))
    except Exception as error:  # whatever a library raises ends this peer, not the benchmark
        connection.send(("problem", _line(error)))


def _quiet() -> None:
    """Libraries say what goes wrong, not what they do."""
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)


def _missing(name: str, error: ImportError) -> str:
    return (
        f"{load(name).LIBRARY} cannot be imported ({_line(error)}); run: "
        "pip install -r benchmarks/requirements-peers.txt"
    )


def _line(error: Exception) -> str:
    """An error in one line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"
