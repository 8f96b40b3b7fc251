"""Timing: runs of several contenders in turn, and what is said of their times.

Contract: contenders of one `Turn` alternate run by run (A B A B), so that a machine that is busy for a while is busy
for all of them. Turns alternate in blocks, each begun with warm-up runs that are not counted: what has to be set up
anew when another turn has had the engine, a prompt in a cache for example, happens there. Between contenders is a rest:
threads of a library wait for its next call actively, and would compute against whoever is next.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Run = Callable[[], object]
REST = 0.05  # seconds; ONNX Runtime's threads wait actively for some 0.03 s


@dataclass(frozen=True)
class Turn:
    """Contenders that take turns run by run. `runs`: name -> one run."""

    runs: Mapping[str, Run]


@dataclass(frozen=True)
class Times:
    """Seconds of every counted run, in order."""

    seconds: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seconds)

    @property
    def spread(self) -> float:
        """Standard deviation of the runs; 0 of a single one."""
        return statistics.stdev(self.seconds) if len(self.seconds) > 1 else 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def per(self, units: float) -> Times:
        """Times of one of the `units` that a run has."""
        return Times(tuple(seconds / units for seconds in self.seconds))


def take_turns(turns: Sequence[Turn], repeats: int, warm_up: int, blocks: int = 1) -> list[dict[str, Times]]:
    """Times of every contender of every turn.

    Args:
        repeats: counted runs of each contender, at least 1.
        warm_up: runs of each contender before the counted ones of each block.
        blocks: how often each turn comes by; no more than `repeats`.
    """
    blocks = min(blocks, repeats)
    seconds: list[dict[str, list[float]]] = [{name: [] for name in turn.runs} for turn in turns]
    for block in range(blocks):
        share = repeats // blocks + (block < repeats % blocks)
        for turn, found in zip(turns, seconds, strict=True):
            for run in turn.runs.values():
                for _ in range(warm_up):
                    run()
            for _ in range(share):
                for name, run in turn.runs.items():
                    if len(turn.runs) > 1:
                        time.sleep(REST)
                    started = time.perf_counter()
                    run()
                    found[name].append(time.perf_counter() - started)
    return [{name: Times(tuple(values)) for name, values in found.items()} for found in seconds]
