"""Bicubic resize of numpy fields, equal to the tensor resize the model was trained with.

Contract: cubic kernel with a = -0.75, pixel centres at half integers, edges clamped, no antialiasing, also when
shrinking (reference semantics §4.5, §5, §11.3). Pictures for the model are resized by Pillow instead, see
`runtime.images`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_A = -0.75


def bicubic(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize the last two axes of `x` [..., H, W] float32 to `size` (h, w); an array of that size is returned as is."""
    h, w = size
    if x.shape[-2:] == (h, w):
        return x
    rows = _weights(x.shape[-2], h)  # [h, H]
    columns = _weights(x.shape[-1], w)  # [w, W]
    return rows @ x.astype(np.float32, copy=False) @ columns.T  # [..., h, w]


@lru_cache(maxsize=32)
def _weights(source: int, target: int) -> np.ndarray:
    """Interpolation matrix [target, source]. Rounded to float32 where the kernel this must equal is."""
    step = np.float32(source) / np.float32(target)
    position = _fused(step, np.arange(target) + 0.5, -0.5)
    first = np.floor(position)
    t = position - first  # [target], in [0, 1)
    taps = np.stack([_outer(t + 1), _inner(t), _inner(1 - t), _outer((1 - t) + 1)], axis=1)  # [target, 4]
    index = np.clip(first[:, None].astype(np.int64) + np.arange(-1, 3), 0, source - 1)
    matrix = np.zeros((target, source), np.float32)
    np.add.at(matrix, (np.arange(target)[:, None], index), taps)  # clamped taps share a cell
    matrix.setflags(write=False)
    return matrix


def _inner(d: np.ndarray) -> np.ndarray:
    """Cubic convolution kernel at distances in [0, 1]."""
    return _fused(_fused(_A + 2, d, -(_A + 3)) * d, d, 1)


def _outer(d: np.ndarray) -> np.ndarray:
    """Cubic convolution kernel at distances in [1, 2]."""
    return _fused(_fused(_fused(_A, d, -5 * _A), d, 8 * _A), d, -4 * _A)


def _fused(a: np.ndarray | np.float32 | float, b: np.ndarray, c: float) -> np.ndarray:
    """a * b + c, rounded to float32 once."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)
