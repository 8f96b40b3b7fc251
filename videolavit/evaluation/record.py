"""What is measured, and what measuring leaves.

Contract: a part turns its items, numbered from 0, into records; a record holds checks (right or wrong) and values
(numbers); a measure says which of them make a figure, and what figure is aimed at.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from videolavit.evaluation.context import Context, Settings

SUMMARIES = frozenset(("all", "both", "answer"))  # checks that are wrong where another one is


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One figure of a part.

    Attributes:
        key: of the records' checks if `unit` is `share`, else of their values.
        unit: `share`, or that of the value, such as `dB`.
        target: least figure aimed at; a mean must lie above it, a share at or above. None: only reported.
    """

    key: str
    label: str
    unit: str = "share"
    target: float | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One thing measured.

    Attributes:
        index: of the item in its part.
        seed: of the noise; with `prompt` it makes the same thing again.
        prompt: what was asked.
        expected, seen: in words, for people.
        strips: for the sheet: a name, and a few small frames [n, h, w, 3] uint8.
    """

    part: str
    index: int
    seed: int
    prompt: str
    expected: str
    seen: str
    checks: dict[str, bool] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    strips: tuple[tuple[str, np.ndarray], ...] = ()

    @property
    def wrong(self) -> list[str]:
        """The checks that are wrong, without those that are wrong because of them."""
        return [key for key, right in self.checks.items() if not right and key not in SUMMARIES]


class Part(ABC):
    """One kind of task.

    Attributes:
        name: on the command line.
        title, about: for the report.
        every: one item is measured for this many of `-n`.
        measures: figures, in order.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str]
    every: ClassVar[int] = 1
    measures: ClassVar[tuple[Measure, ...]]

    def items(self, wanted: int, settings: Settings) -> int:
        """How many items are measured when `wanted` are asked for."""
        return max(1, wanted // self.every)

    @abstractmethod
    def run(self, context: Context, index: int) -> list[Record]:
        """Measure item `index`."""
