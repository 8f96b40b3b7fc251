"""Records to figures with intervals and verdicts.

Contract: a measure that no record has a check or value for gives a figure of nothing: `count` 0 and no verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import numpy as np

from videolavit.evaluation.record import Measure, Part, Record
from videolavit.evaluation.statistics import bootstrap, wilson


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measure's figure.

    Attributes:
        value: share of right checks, or mean of the values.
        low, high: 95 % interval.
        count: of checks or values.
    """

    part: str
    measure: Measure
    value: float
    low: float
    high: float
    count: int

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without a target or without a count."""
        target = self.measure.target
        if target is None or not self.count:
            return None
        return self.value >= target if self.measure.unit == "share" else self.value > target

    @property
    def sure(self) -> bool:
        """Whether the whole interval is on the value's side of the target."""
        target = self.measure.target
        return target is not None and bool(self.low >= target if self.reached else self.high < target)


def figures(part: Part, records: Sequence[Record]) -> list[Figure]:
    """The figures of `part`, in the order of its measures, from the records of all parts."""
    own = [record for record in records if record.part == part.name]
    return [_figure(part.name, measure, own) for measure in part.measures]


def _figure(part: str, measure: Measure, records: Sequence[Record]) -> Figure:
    key = measure.key
    if measure.unit == "share":
        checks = [record.checks[key] for record in records if key in record.checks]
        value = sum(checks) / len(checks) if checks else nan
        low, high = wilson(sum(checks), len(checks))
        return Figure(part=part, measure=measure, value=value, low=low, high=high, count=len(checks))
    values = [record.values[key] for record in records if key in record.values]
    low, high = bootstrap(values)
    value = float(np.mean(values)) if values else nan
    return Figure(part=part, measure=measure, value=value, low=low, high=high, count=len(values))
