"""Engines: what they look like to the pipeline, and which of them are in memory.

Contract: the pipeline knows two protocols and no library. `EngineSet` loads a bundle's engines when they are first
asked for and, under a memory budget, lets go of those that the task in hand needs latest (`runtime.residency`), or were
not asked for longest where no task was announced. A released engine goes on working for
whoever still holds it and is freed with the last reference, so ask the set again at each stage and keep none: what
`hold` was told belongs to the engine object and is gone with it.
"""

from __future__ import annotations

import importlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, cast

import numpy as np

from runtime import memory
from runtime.bundle import Bundle, EngineEntry
from runtime.errors import BundleError
from runtime.residency import MemoryPlan, Order, Stage, estimate, make_plan, room_for


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
        most_rows: rows that a cache can have; None where any number is taken.
    """

    lengths: np.ndarray
    most_rows: int | None

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
        memory_budget: bytes of engines to keep in memory; None keeps all. An engine counts as what the process grew by
            when it was loaded and run, before that and on a GPU as what its files say (`runtime.residency.estimate`).
        threads, provider: see EngineOptions.
        resident_memory: says how many bytes the process has in memory now, or None where that is not known.

    Attributes: `bundle`, `options`, `memory_budget`, `loads` (every load so far, in order).
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        memory_budget: int | None = None,
        threads: int | None = None,
        provider: str = "cpu",
        resident_memory: Callable[[], int | None] = memory.resident,
    ) -> None:
        self.bundle = bundle
        self.options = EngineOptions(provider=provider, threads=threads)
        self.memory_budget = memory_budget
        self.loads: list[EngineLoad] = []
        self._resident: OrderedDict[_Key, Engine | LanguageModelEngine] = OrderedDict()  # least recently used first
        self._order = Order()
        on_host = provider == "cpu" and all(entry.backend == "onnx" for entry in bundle.manifest.engines.values())
        self._memory = resident_memory if on_host else _unknown
        self._sizes = {name: estimate(entry, provider) for name, entry in bundle.manifest.engines.items()}
        self._grown: dict[str, int] = {}  # bytes the process grew by while an engine was in use since it was loaded
        self._using: str | None = None
        self._before: int | None = None  # bytes of the process when that use began

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

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes every engine of the bundle takes: the larger of what was estimated and of what was measured."""
        self._account()
        return dict(self._sizes)

    def expect(self, stages: Sequence[Stage], task: str | None = None) -> MemoryPlan:
        """A task is about to run `stages`, with the engines of `task` where there are any; what memory it will take."""
        engines = self.bundle.manifest.engines
        found = [tuple(f"{task}/{name}" if f"{task}/{name}" in engines else name for name in one) for one in stages]
        known = [stage for one in found if (stage := tuple(name for name in one if name in engines))]
        self._order = Order(known)
        return make_plan(known, self.sizes, self.memory_budget)

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
        there = key in self._resident
        self._order.reach(name)
        if there and self._order.now(name) and self._using is not None and self._order.now(self._using):
            pass  # the engines of a stage take turns: what the one loaded last grows by stays its own
        elif name != self._using:
            self._account()
            self._make_room(name)
            self._using = name
            self._before = self._memory()
        if not there:
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

    def _make_room(self, name: str) -> None:
        """Release engines until `name` fits the budget beside the rest; one larger than the budget stays alone."""
        others = [one for one, _ in self._resident if one != name]
        released = room_for(self._sizes[name], others, self._sizes, self.memory_budget, self._order)
        for key in [key for key in self._resident if key[0] in released]:
            del self._resident[key]
        for one in released:
            self._grown.pop(one, None)

    def _account(self) -> None:
        """Count what the process grew by as memory of the engine in use."""
        now = self._memory()
        if self._using is None or self._before is None or now is None:
            return
        grown = self._grown.get(self._using, 0) + max(0, now - self._before)
        self._grown[self._using] = grown
        self._sizes[self._using] = max(self._sizes[self._using], grown)
        self._before = now

    def _load(self, name: str, kind: str) -> Engine | LanguageModelEngine:
        entry = self.bundle.manifest.engines[name]
        started = time.perf_counter()
        backend = importlib.import_module(_BACKENDS[entry.backend])
        backend.prepare(entry, self.options)  # so that a library is nobody's memory
        self._before = self._memory()
        engine = getattr(backend, _LOADERS[kind])(self.bundle, entry, self.options)
        self.loads.append(EngineLoad(name, time.perf_counter() - started, _size(entry), memory.peak_rss()))
        return engine


def _size(entry: EngineEntry) -> int:
    return sum(file.bytes for file in entry.files)


def _unknown() -> None:
    """What a process has of its own says nothing of the memory of a GPU."""
