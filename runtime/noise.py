"""All randomness of a run, from one seed.

Contract: every random number the runtime uses comes from one `Noise` in the order the reference consumes
them (reference semantics, end of §14), as float32, so that a seed means the same clip on every backend up
to rounding. A test, or the torch reference, may substitute any object with these methods.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Noise:
    """Seeded source of noise. `seed` is any integer from 0 to 2**63 - 1, or what another source spawned."""

    def __init__(self, seed: int | np.random.SeedSequence) -> None:
        self._seeds = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
        self._generator = np.random.Generator(np.random.PCG64(self._seeds))

    def spawn(self, count: int) -> list[Noise]:
        """New sources that depend on the seed and on how many were made before, and take nothing of this one."""
        return [Noise(seeds) for seeds in self._seeds.spawn(count)]

    def normal(self, *shape: int) -> np.ndarray:
        """Standard normal, float32, of `shape`."""
        return self._generator.standard_normal(shape, dtype=np.float32)

    def gumbel(self, *shape: int) -> np.ndarray:
        """Gumbel(0, 1) = -log(Exp(1)), float32, of `shape`; used for the keep decision (§6.3)."""
        tiny = np.finfo(np.float32).tiny
        return -np.log(np.maximum(self._generator.standard_exponential(shape, dtype=np.float32), tiny))

    def choice(self, probabilities: np.ndarray) -> np.ndarray:
        """One index per row of `probabilities` [B, N] (each row sums to 1): [B] int64."""
        cumulative = np.cumsum(probabilities, axis=-1, dtype=np.float64)
        draws = self._generator.random((len(probabilities), 1)) * cumulative[:, -1:]
        return np.asarray((cumulative <= draws).sum(axis=-1), dtype=np.int64)


class Streams:
    """Draws for several rows, each from a source of its own: a row's are the same whatever stands beside it."""

    def __init__(self, sources: Sequence[Noise]) -> None:
        self._sources = tuple(sources)

    def choice(self, probabilities: np.ndarray) -> np.ndarray:
        """One index per row of `probabilities` [B, N], of which there are as many as sources: [B] int64."""
        rows = zip(self._sources, probabilities, strict=True)
        return np.concatenate([source.choice(row[None]) for source, row in rows])
