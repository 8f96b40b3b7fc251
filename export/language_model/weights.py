"""Constants of the graph that are made from tensors of the checkpoint.

Contract: a `Weight` says which tensors it needs and how they become one array, in the type they come in: fused matrices
are concatenated, and heads are widened for operators that take certain head widths only. Nothing is read here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.errors import CheckpointError

Assemble = Callable[[Sequence[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Weight:
    """A constant of the graph: `name` there, the tensors it is made from (name -> shape), and how."""

    name: str
    parts: Mapping[str, tuple[int, ...]]
    assemble: Assemble

    def array(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The constant, matrices as [out, in]. Raises CheckpointError for a tensor that is missing or misshapen."""
        return self.assemble([checked(tensors, name, shape) for name, shape in self.parts.items()])


def checked(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Tensor `name`. Raises CheckpointError when it is missing or has another shape."""
    if name not in tensors:
        raise CheckpointError(f"checkpoint: weight {name} is missing; give a complete checkpoint of this model")
    array = np.asarray(tensors[name])
    if array.shape != shape:
        raise CheckpointError(
            f"checkpoint: weight {name} is {list(array.shape)}, the model configuration says {list(shape)}; use the "
            "configuration the checkpoint was trained with"
        )
    return array


def plain(name: str, tensor: str, shape: tuple[int, ...]) -> Weight:
    """One tensor as it is."""
    return Weight(name, {tensor: shape}, lambda arrays: arrays[0])


def fused(name: str, parts: Mapping[str, tuple[int, ...]], head: int = 1, wide: int = 1) -> Weight:
    """Matrices [out, in] one below the other, each of heads of `head` outputs widened to `wide`."""
    return Weight(name, parts, lambda arrays: np.concatenate([widen_heads(array, head, wide) for array in arrays]))


def from_heads(name: str, tensor: str, shape: tuple[int, int], head: int, wide: int) -> Weight:
    """A matrix [out, in] whose inputs are heads of `head`, widened to `wide`."""
    return Weight(name, {tensor: shape}, lambda arrays: widen_heads(arrays[0].T, head, wide).T)


def widen_heads(matrix: np.ndarray, head: int, wide: int) -> np.ndarray:
    """[n head, ...] -> [n wide, ...]: each half of a head is followed by zeros.

    Halves, because the rotary embedding pairs a head's element i with its element i + d/2.
    """
    if wide == head:
        return matrix
    halves = matrix.reshape(-1, head // 2, *matrix.shape[1:])  # [2n, d/2, ...]
    padding = [(0, 0), (0, (wide - head) // 2)] + [(0, 0)] * (matrix.ndim - 1)
    return np.pad(halves, padding).reshape(-1, *matrix.shape[1:])
