"""Motion vectors -> macroblock grid -> the model's motion input, exactly.

Contract (reference semantics §11.2, §11.3): a vector counts at its destination pixel, clipped into the frame; of
several at one pixel the last counts; within a 16x16 macroblock the largest signed value of each component counts, x and
y apart; a macroblock without vectors is zero. Values are displacements since the frame before, as a share of frame
width (x) and height (y), divided by `deviation`.
"""

from __future__ import annotations

import numpy as np

from runtime.geometry import MACROBLOCK
from runtime.resize import bicubic

HOLE = -10000.0
HOLE_LIMIT = -1000.0  # smaller values count as holes
SECOND_KEYFRAME = 12  # index in a clip of the frame that has no vectors because it starts the next group of pictures
_DEVIATION = (0.0993703, 0.1130276)  # of (x, y) displacements, shares of frame width and height
TOKENIZER_SCALE = 10  # the motion tokenizer reads values this much larger than the detokenizer


def deviation(rescale: bool) -> np.ndarray:
    """Divisor [2] float64 of relative displacements: for the motion tokenizer (`rescale`) or the detokenizer."""
    return np.array(_DEVIATION) / (TOKENIZER_SCALE if rescale else 1)


def grid_shape(width: int, height: int) -> tuple[int, int]:
    """(rows, columns) of macroblocks that cover a frame."""
    return -(-height // MACROBLOCK), -(-width // MACROBLOCK)


def macroblock_grid(vectors: np.ndarray, width: int, height: int, rescale: bool) -> np.ndarray:
    """Grid [2, rows, columns] float32 of one frame.

    Args:
        vectors: structured array with the fields of FFmpeg's motion vectors: source (-1 or 1), dst_x, dst_y (pixels),
            motion_x, motion_y (pixels times motion_scale).
        width, height: of the frame, pixels.
        rescale: see `deviation`.
    """
    rows, columns = grid_shape(width, height)
    grid = np.full((2, rows * columns), HOLE, np.float32)
    if len(vectors):
        x = np.clip(vectors["dst_x"].astype(np.int64), 0, width - 1)
        y = np.clip(vectors["dst_y"].astype(np.int64), 0, height - 1)
        cells = (y // MACROBLOCK) * columns + x // MACROBLOCK
        values = _relative(vectors, width, height) / deviation(rescale)[:, None]  # [2, N]
        if np.bincount(cells).max() > 1:
            # Keep the last vector of each pixel: the first of the reversed order.
            _, last = np.unique((y * width + x)[::-1], return_index=True)
            keep = len(cells) - 1 - last
            cells, values = cells[keep], values[:, keep]
        for component, value in zip(grid, values.astype(np.float32), strict=True):
            np.maximum.at(component, cells, value)
    grid[grid < HOLE_LIMIT] = 0
    return (grid + np.float32(0)).reshape(2, rows, columns)  # adding zero makes -0.0 into 0.0


def _relative(vectors: np.ndarray, width: int, height: int) -> np.ndarray:
    """Displacement [2, N] float64 as a share of the frame's width and height."""
    scale = vectors["motion_scale"].astype(np.float64)
    source = vectors["source"].astype(np.float64)
    return np.stack(
        [
            source * vectors["motion_x"] / scale / width,
            source * vectors["motion_y"] / scale / height,
        ]
    )


def to_pixels(grid: np.ndarray, width: int, height: int, rescale: bool) -> np.ndarray:
    """Displacements in pixels per frame [..., 2, rows, columns] of grids of a width x height video."""
    unit = deviation(rescale) * (width, height)
    return (grid * unit[:, None, None]).astype(np.float32)


def model_motion(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Model input [2, T, h, w] from the grids [T, 2, rows, columns] of one clip, resized to `size` (h, w).

    The frame that starts the clip's second group of pictures has no vectors; it becomes the mean of its neighbours
    (§11.3), in clips long enough to have both.
    """
    filled = grid.astype(np.float32)  # a copy: the next line writes
    if len(filled) > SECOND_KEYFRAME + 1:
        filled[SECOND_KEYFRAME] = (filled[SECOND_KEYFRAME - 1] + filled[SECOND_KEYFRAME + 1]) / 2
    return np.ascontiguousarray(bicubic(filled, size).transpose(1, 0, 2, 3))
