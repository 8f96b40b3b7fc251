"""One comparison: what was compared, how far apart the two are, and how far they may be.

Contract: differences are taken in float64 over all values. The bound is the caller's, but no more than `RELATIVE` of
the largest magnitude expected. A measurement whose shapes differ, or which holds a value that is not finite, has an
infinite error. Where the reference stores -1e30 for minus infinity, minus infinity is expected.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

RELATIVE = 1e-4
MINUS_INFINITY = -1e29  # stored scores below this stand for minus infinity
OFF_BY_ONE = 0.005  # share of the values of a picture that may be one level off


@dataclass(frozen=True)
class Measurement:
    """Attributes:
    what: the quantity.
    error: largest absolute difference, or for `unit` other than "" how many of what that names differ.
    tolerance: largest error allowed.
    scale: largest magnitude of the expected values; 0 where that means nothing.
    """

    what: str
    error: float
    tolerance: float
    scale: float = 0.0
    unit: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # not so for NaN


def close(what: str, actual: Any, expected: Any, tolerance: float) -> Measurement:
    """Largest absolute difference of two arrays; `tolerance` is lowered to RELATIVE of the scale."""
    found = within(what, actual, expected, tolerance)
    return replace(found, tolerance=min(tolerance, RELATIVE * found.scale)) if found.scale else found


def within(what: str, actual: Any, expected: Any, tolerance: float) -> Measurement:
    """Largest absolute difference of two arrays, with `tolerance` as it is."""
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if a.shape != e.shape:
        return Measurement(f"{what} (shape {a.shape}, not {e.shape})", float("inf"), tolerance)
    forbidden = e < MINUS_INFINITY
    if not np.array_equal(forbidden, np.isneginf(a)):
        return Measurement(f"{what} (other ids are forbidden)", float("inf"), tolerance)
    a, e = a[~forbidden], e[~forbidden]
    error = float(np.abs(a - e).max()) if a.size else 0.0
    scale = float(np.abs(e).max()) if e.size else 0.0
    return Measurement(what, error if np.isfinite(error) else float("inf"), tolerance, scale)


def relative(what: str, actual: Any, expected: Any, tolerance: float) -> Measurement:
    """As `close`, with the tolerance as a share of the largest expected magnitude."""
    return close(what, actual, expected, tolerance * float(np.abs(np.asarray(expected, np.float64)).max()))


def equal(what: str, actual: Any, expected: Any) -> Measurement:
    """How many entries of two arrays or lists of integers or strings differ; none may."""
    a, e = np.asarray(actual), np.asarray(expected)
    if a.shape != e.shape:
        return Measurement(f"{what} (shape {a.shape}, not {e.shape})", float("inf"), 0, unit="values")
    return Measurement(what, float((a != e).sum()), 0, unit="values")


def pictures(what: str, actual: np.ndarray, expected: np.ndarray) -> Measurement:
    """Share of uint8 values that are one level off; no value may be further off."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return Measurement(f"{what} (shape {actual.shape}, not {expected.shape})", float("inf"), OFF_BY_ONE)
    off = np.abs(actual.astype(np.int64) - expected)
    return Measurement(what, float((off > 0).mean()) if off.max() <= 1 else float("inf"), OFF_BY_ONE, unit="share")
