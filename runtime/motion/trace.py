"""A stream's own vectors, added up between the moments at which the model looks.

Contract: a stream's vectors tell how far each cell moved since the picture it was predicted from, at the stream's own
rate; the model needs how far it moved since the last sampled moment. `VectorTrace` follows every cell back through the
pictures in between. Fields are float32 [2, rows, columns]: x and y displacement in pixels of each cell of `CELL` x
`CELL` pixels of the upright frame, two cells to a macroblock side.
"""

from __future__ import annotations

from collections import deque
from fractions import Fraction

import numpy as np

from runtime.geometry import MACROBLOCK
from runtime.motion.grid import grid_shape

CELL = 8  # pixels; the smallest block whose vector FFmpeg reports
_BLOCK = 16  # pixels; the largest
_PAST = -1  # `source` of a vector that points into an earlier picture


def field_shape(width: int, height: int) -> tuple[int, int]:
    """(rows, columns) of cells of a frame: whole macroblocks."""
    rows, columns = grid_shape(width, height)
    return rows * (MACROBLOCK // CELL), columns * (MACROBLOCK // CELL)


def cell_field(vectors: np.ndarray, width: int, height: int) -> np.ndarray:
    """Field of one picture; zero where a cell has no vector from the past.

    Args:
        vectors: structured array with the fields of FFmpeg's motion vectors (see `grid.macroblock_grid`); dst_x and
            dst_y are block centres.
        width, height: of the picture, pixels.
    """
    rows, columns = field_shape(width, height)
    field = np.zeros((2, rows + 1, columns + 1), np.float32)  # the last row and column take what lies outside
    past = vectors[vectors["source"] == _PAST] if len(vectors) else vectors
    if len(past):
        # A vector points from the block to where it came from; the block moved the other way.
        moved = np.stack([past["motion_x"], past["motion_y"]]) / -past["motion_scale"].astype(np.float32)
        wide, high = past["w"] // CELL, past["h"] // CELL  # cells
        column = (past["dst_x"].astype(np.int64) - past["w"] // 2) // CELL
        row = (past["dst_y"].astype(np.int64) - past["h"] // 2) // CELL
        for down in range(_BLOCK // CELL):
            for right in range(_BLOCK // CELL):
                taken = (down < high) & (right < wide)
                y, x = row[taken] + down, column[taken] + right
                outside = (y < 0) | (y >= rows) | (x < 0) | (x >= columns)
                y[outside], x[outside] = rows, columns
                field[:, y, x] = moved[:, taken]
    return np.ascontiguousarray(field[:, :rows, :columns])


class VectorTrace:
    """Displacement of every cell since the last sampled moment; moments only go forward.

    Attributes:
        end: time of the last picture added, seconds; `sample` is exact up to there.
    """

    def __init__(self) -> None:
        self.end: Fraction | None = None
        self._steps: deque[tuple[Fraction, Fraction, np.ndarray]] = deque()  # start, end, field
        self._position = Fraction(0)
        self._moved: np.ndarray | None = None

    def add(self, time: Fraction, field: np.ndarray) -> None:
        """Add the picture at `time` and its displacement since the picture added before."""
        if self._moved is None:
            self._moved = np.zeros_like(field)
        if self.end is not None and time > self.end:
            self._steps.append((self.end, time, field))
        self.end = time if self.end is None else max(self.end, time)

    def sample(self, time: Fraction) -> np.ndarray:
        """Displacement from the moment sampled before to `time`; a moment between two pictures gets its share."""
        if self._moved is None:
            raise ValueError("no picture was added to the trace yet")
        moved = self._moved
        while self._steps and self._steps[0][0] < time:
            start, end, field = self._steps[0]
            until = min(end, time)
            share = (until - max(start, self._position)) / (end - start)
            if share > 0:
                moved = _follow(field * np.float32(share), moved)
            self._position = max(self._position, until)
            if until < end:
                break
            self._steps.popleft()
        self._position = max(self._position, time)
        self._moved = np.zeros_like(moved)
        return moved


def _follow(step: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    """`step`, plus `earlier` at the place each cell came from."""
    rows, columns = step.shape[1:]
    y, x = np.mgrid[:rows, :columns]
    came_from_x = np.rint(x - step[0] / CELL).astype(np.int64).clip(0, columns - 1)
    came_from_y = np.rint(y - step[1] / CELL).astype(np.int64).clip(0, rows - 1)
    return step + earlier[:, came_from_y, came_from_x]


def macroblock_motion(field: np.ndarray) -> np.ndarray:
    """Macroblock displacement [2, rows, columns], pixels: medians over 3x3 cells, then over each macroblock's cells.

    Encoders choose vectors that compress well, not true motion; the median drops the strays.
    """
    rows, columns = field.shape[1:]
    padded = np.pad(field, ((0, 0), (1, 1), (1, 1)), mode="edge")
    neighbours = [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    smooth = np.partition(np.stack(neighbours), 4, axis=0)[4]  # [2, rows, columns]
    side = MACROBLOCK // CELL
    blocks = smooth.reshape(2, rows // side, side, columns // side, side)
    return np.median(blocks, axis=(2, 4)).astype(np.float32)
