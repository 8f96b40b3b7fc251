"""Engines: what they look like to the pipeline, and which of them are in memory.

Contract: the pipeline knows two protocols and no library. `EngineSet` loads a bundle's engines when they are first
asked for and, under a memory budget, lets go of those not asked for longest. A released engine goes on working for
whoever still holds it and is freed with the last reference, so ask the set again at each stage and keep none: what
`hold` was told belongs to the engine object and is gone with it.
"""

from __future__ import annotations

import importlib
import os
import resource
import sys
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, cast

import numpy as np

from runtime.bundle import Bundle, EngineEntry
from runtime.errors import BundleError


class Engine(Protocol):
    """One network. Called like the module it replaces: keyword arrays in, named arrays out."""

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run once. Raises UsageError for an input that is missing, unknown, or of the wrong type or shape."""
        ...

    def hold(self, **inputs: np.ndarray) -> None:
        """Keep inputs on the device for the calls that follow; those calls leave them out. Replaces by name."""
        ...

    def close(self) -> None:
        """Free the network; the engine cannot be called again."""
        ...


class LanguageModelEngine(Protocol):
    """The language model with its KV cache (reference semantics §10).

    Attributes:
        lengths: [B] int32 positions each row has in the cache.
    """

    lengths: np.ndarray

    def start(self, rows: int, capacity: int) -> None:
        """An empty cache for `rows` sequences of up to `capacity` positions. Raises UsageError beyond the model's."""
        ...

    def forward(self, embeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Append positions to the cache and return logits [B, V] float32 at each row's last real one.

        embeds [B, S, D] float32 is right-padded, counts [B] int gives the real positions per row. While the cache is
        empty any S and counts are taken; after that S = 1, or one row without padding. Raises UsageError otherwise.
        """
        ...

    def rewind(self, lengths: np.ndarray) -> None:
        """Forget all but the first `lengths` [B] positions of the rows; the next ones follow there. Costs no time.

        Raises UsageError for more positions than a row has.
        """
        ...

    def close(self) -> None:
        """Free the network and its cache."""
        ...


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How engines run.

    Attributes:
        provider: device of ONNX Runtime engines: `cpu`, `cuda`, or `auto` for `cuda` where it works and else `cpu`.
        threads: compute threads of an engine; None takes every processor this process may use.
    """

    provider: str = "cpu"
    threads: int | None = None


@dataclass(frozen=True)
class EngineLoad:
    """One load: engine, seconds, bytes of its files, and the process's peak resident bytes right after."""

    name: str
    seconds: float
    bytes: int
    peak_rss: int


def processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_rss() -> int:
    """Largest resident memory of this process so far, bytes."""
    with suppress(OSError):  # not every system has this file
        # What follows below starts, in a new process, at the size of the one that started it; this does not.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# Backend of the manifest -> module with load_engine(bundle, entry, options) and load_language_model(the same)
_BACKENDS = {
    "onnx": "runtime.backends.onnxruntime",
    "tensorrt": "runtime.backends.tensorrt",
    "tensorrt-rtx": "runtime.backends.tensorrt",
}
_LOADERS = {"engine": "load_engine", "language model": "load_language_model"}
_Key = tuple[str, str]  # (manifest name, kind of loader)


class EngineSet:
    """The engines of one bundle, loaded when needed; a context manager.

    Args:
        memory_budget: bytes of engines to keep in memory, counted by the size of their files; None keeps all.
        threads, provider: see EngineOptions.

    Attributes: `bundle`, `options`, `memory_budget`, `loads` (every load so far, in order).
    """

    def __init__(
        self, bundle: Bundle, *, memory_budget: int | None = None, threads: int | None = None, provider: str = "cpu"
    ) -> None:
        self.bundle = bundle
        self.options = EngineOptions(provider=provider, threads=threads)
        self.memory_budget = memory_budget
        self.loads: list[EngineLoad] = []
        self._resident: OrderedDict[_Key, Engine | LanguageModelEngine] = OrderedDict()  # least recently used first

    def get(self, name: str, task: str | None = None) -> Engine:
        """Engine `name`; the one of `task` ("understanding/NAME") where the bundle has its own. Raises BundleError."""
        return cast(Engine, self._get(name, task, "engine"))

    def language_model(self, task: str | None = None) -> LanguageModelEngine:
        """The language model, of `task` where the bundle has its own. Raises BundleError."""
        return cast(LanguageModelEngine, self._get("language_model", task, "language model"))

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the engines in memory, least recently used first."""
        return tuple(name for name, _ in self._resident)

    def close(self) -> None:
        """Close every engine in memory."""
        while self._resident:
            self._resident.popitem()[1].close()

    def __enter__(self) -> EngineSet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _get(self, name: str, task: str | None, kind: str) -> Engine | LanguageModelEngine:
        name = self._resolve(name, task)
        key = (name, kind)
        if key not in self._resident:
            self._make_room(_size(self.bundle.manifest.engines[name]))
            self._resident[key] = self._load(name, kind)
        self._resident.move_to_end(key)
        return self._resident[key]

    def _resolve(self, name: str, task: str | None) -> str:
        engines = self.bundle.manifest.engines
        for candidate in ([f"{task}/{name}"] if task else []) + [name]:
            if candidate in engines:
                return candidate
        wanted = f"{name} for {task}" if task else name
        raise BundleError(
            f"{self.bundle.path}: has no engine {wanted}, only {', '.join(sorted(engines))}; "
            "export the bundle with the task that needs it"
        )

    def _make_room(self, size: int) -> None:
        """Release engines until `size` more bytes fit the budget; one that is larger than the budget stays alone."""
        if self.memory_budget is None:
            return
        engines = self.bundle.manifest.engines
        while self._resident and size + sum(_size(engines[n]) for n, _ in self._resident) > self.memory_budget:
            self._resident.popitem(last=False)

    def _load(self, name: str, kind: str) -> Engine | LanguageModelEngine:
        entry = self.bundle.manifest.engines[name]
        started = time.perf_counter()
        backend = importlib.import_module(_BACKENDS[entry.backend])
        engine = getattr(backend, _LOADERS[kind])(self.bundle, entry, self.options)
        self.loads.append(EngineLoad(name, time.perf_counter() - started, _size(entry), peak_rss()))
        return engine


def _size(entry: EngineEntry) -> int:
    return sum(file.bytes for file in entry.files)
