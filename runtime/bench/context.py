"""What a stage works with: the bundle's engines, the settings, and the peers.

Contract: `Bench` is made in the stage's own process. Peers are made when they are first asked for, which has to be
after the stage called `alone`: it runs the runtime's own once, and notes the process's peak memory before anything of a
peer is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from runtime.bench.peer import Peer, PeerSpec
from runtime.bench.settings import OURS, BenchSettings
from runtime.bench.timing import Run, Times, Turn, take_turns
from runtime.bench.work import Work
from runtime.bundle import Bundle
from runtime.engines import EngineSet, processors
from runtime.memory import peak_rss

ATTEMPTS = 2  # runs before peak memory is read: what a library allocates at its second call counts too


class Bench:
    """One stage at work.

    Attributes: `bundle`, `manifest`, `settings`, `engines`, `generator` (seeded), `notes`, and after `alone` `peak`
    (bytes).
    """

    def __init__(self, bundle: Bundle, settings: BenchSettings, specs: Sequence[PeerSpec]) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.settings = settings
        self.engines = EngineSet(bundle, threads=settings.threads, provider=settings.provider)
        self.generator = np.random.default_rng(settings.seed)
        self.peak = 0
        self.notes: list[str] = []
        self._specs = tuple(specs)

    @cached_property
    def peers(self) -> tuple[Peer, ...]:
        """Raises EnvironmentProblem when a library of one is missing."""
        return tuple(spec.make(self.settings.threads or processors()) for spec in self._specs)

    def normal(self, *shape: int) -> np.ndarray:
        """Standard normal float32 of `shape`."""
        return self.generator.standard_normal(shape, dtype=np.float32)

    def alone(self, *runs: Run) -> None:
        """Run the runtime's own and note the peak memory."""
        for run in runs:
            for _ in range(ATTEMPTS):
                run()
        self.peak = peak_rss()

    def turn(self, ours: Run, theirs: Callable[[Peer], Run | None], part: str = "this stage") -> Turn:
        """The runtime's own run and those of the peers that have it; a note says who does not do `part`."""
        runs = {peer.name: theirs(peer) for peer in self.peers}
        missing = [f"{name} does not do {part}" for name, run in runs.items() if run is None]
        self.notes += [note for note in missing if note not in self.notes]
        return Turn({OURS: ours, **{name: run for name, run in runs.items() if run is not None}})

    def take_turns(self, *turns: Turn, blocks: int = 1) -> list[dict[str, Times]]:
        return take_turns(turns, self.settings.repeats, self.settings.warm_up, blocks)

    def work(self, engine: str, count: Callable[..., Work], *arguments: Any) -> Work | None:
        """`count(model file, *arguments, options)` of an engine; None where it is not ONNX or not wanted.

        Call it last: it loads the model a second time.
        """
        entry = self.bundle.manifest.engines[engine]
        if not self.settings.count_work or entry.backend != "onnx":
            return None
        return count(self.bundle.file(entry.files[0]), *arguments, self.settings.options)
