"""What a caller may give an engine, whatever runs it.

Contract: every check raises UsageError with a line that names the engine, the input, what was given and what it must
be; none changes a value, except that a one-element input may be a scalar or an array of one element.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from runtime.bundle import TensorEntry
from runtime.errors import UsageError

Shape = tuple[int, ...]


class InputCheck:
    """The declared inputs of one engine. A dimension that has a name has one size in all inputs of a call."""

    def __init__(self, engine: str, declared: Sequence[TensorEntry]) -> None:
        self._engine = engine
        self._declared = {entry.name: entry for entry in declared}

    def complete(self, given: Iterable[str]) -> None:
        """Raise UsageError when a declared input is not among those given."""
        given = set(given)
        missing = [name for name in self._declared if name not in given]
        if missing:
            raise UsageError(f"engine {self._engine}: input {', '.join(missing)} is missing")

    def array(self, name: str, array: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """`array`, contiguous and in the declared rank. `sizes` collects what the named dimensions turned out to be."""
        if name not in self._declared:
            raise UsageError(f"engine {self._engine}: has no input {name}, only {', '.join(self._declared)}")
        entry = self._declared[name]
        array = np.asarray(array)
        if array.dtype.name != entry.dtype:
            raise UsageError(f"engine {self._engine}: input {name} is {array.dtype}, it must be {entry.dtype}")
        rank = len(entry.shape)
        if array.size == 1 and array.ndim + rank == 1:
            array = array.reshape((1,) * rank)
        self.shape(name, array.shape, sizes)
        return array if array.flags.c_contiguous else array.copy()

    def shape(self, name: str, shape: Shape, sizes: dict[str, int]) -> None:
        declared = self._declared[name].shape
        fits = len(shape) == len(declared)
        for size, dimension in zip(shape, declared, strict=False):
            wanted = sizes.setdefault(dimension, size) if isinstance(dimension, str) else dimension
            fits = fits and wanted == size
        if not fits:
            free = {k: v for k, v in sizes.items() if k in declared}
            known = f" where {', '.join(f'{k} is {v}' for k, v in free.items())}" if free else ""
            wanted_shape = ", ".join(map(str, declared))
            raise UsageError(
                f"engine {self._engine}: input {name} is {list(shape)}, it must be [{wanted_shape}]{known}"
            )


def check_start(rows: int, capacity: int, positions: int) -> None:
    """Whether a language model of `positions` can have a cache of `rows` x `capacity`. Raises UsageError."""
    if not 1 <= capacity <= positions:
        raise UsageError(
            f"language model: {capacity} positions are wanted, the model has {positions}; "
            "shorten the prompt or ask for fewer new tokens"
        )
    if rows < 1:
        raise UsageError(f"language model: rows is {rows}, it must be at least 1")


def check_forward(embeds: np.ndarray, counts: np.ndarray, lengths: np.ndarray, width: int, capacity: int) -> None:
    """Whether embeds [B, S, D] with `counts` real positions may follow `lengths` in the cache. Raises UsageError."""
    rows = len(lengths)
    if not rows:
        raise UsageError("language model: start must come before forward")
    if embeds.dtype != np.float32 or embeds.ndim != 3 or (embeds.shape[0], embeds.shape[2]) != (rows, width):
        raise UsageError(
            f"language model: embeds is {embeds.dtype} {list(embeds.shape)}, it must be float32 [{rows}, S, {width}]"
        )
    steps = embeds.shape[1]
    if counts.dtype.kind not in "iu" or counts.shape != (rows,) or counts.min() < 1 or counts.max() > steps:
        raise UsageError(f"language model: counts {counts.tolist()} must be {rows} integers from 1 to {steps}")
    if lengths.any() and steps > 1 and (rows > 1 or counts[0] != steps):
        raise UsageError(
            f"language model: {rows} rows with a past take one position each, not {steps}; "
            "only a single row without padding takes more"
        )
    longest = int(lengths.max())
    if longest + steps > capacity:
        raise UsageError(
            f"language model: {longest} + {steps} positions do not fit the cache of {capacity}; "
            "start with a larger capacity"
        )


def check_rewind(lengths: np.ndarray, held: np.ndarray) -> np.ndarray:
    """`lengths` [B] as int32, when a cache with `held` [B] positions can be shortened to them. Raises UsageError."""
    wanted = np.array(lengths)
    if wanted.dtype.kind not in "iu" or wanted.shape != held.shape or (wanted < 0).any() or (wanted > held).any():
        raise UsageError(
            f"language model: rows of {held.tolist()} positions cannot be shortened to {wanted.tolist()}; "
            "give one integer a row, from 0 to what it has"
        )
    return wanted.astype(np.int32)


def describe(shapes: Mapping[str, Shape]) -> str:
    """Shapes as a person reads them: `latents [2, 4, 16, 16], timestep [1]`."""
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
