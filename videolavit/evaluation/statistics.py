"""How sure a figure is: intervals of shares and of means.

Contract: 95 % intervals; no observation gives the whole range of a share, and NaN for a mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan, sqrt

import numpy as np

Z = 1.959963984540054  # of a two-sided 95 % interval
RESAMPLES = 2000


def wilson(hits: int, total: int) -> tuple[float, float]:
    """95 % interval of a share of which `hits` of `total` were seen (Wilson 1927)."""
    if not total:
        return 0.0, 1.0
    share = hits / total
    spread = 1 + Z * Z / total
    centre = (share + Z * Z / (2 * total)) / spread
    half = Z / spread * sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values`, by resampling them `RESAMPLES` times; the same for the same seed."""
    if not len(values):
        return nan, nan
    known = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = known[rng.integers(0, len(known), (RESAMPLES, len(known)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
