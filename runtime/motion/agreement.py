"""How much two readings of a video's motion agree.

Contract: the readings are frames of the same video at the same rate; only frames with motion in both count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from runtime.errors import MediaError
from runtime.motion.grid import to_pixels
from runtime.motion.sources import MotionFrame


@dataclass(frozen=True)
class Agreement:
    """Figures over all macroblocks of all frames compared.

    Attributes:
        correlation_x, correlation_y: Pearson correlation of each component; nan if one reading does not move.
        within_one_pixel: share of macroblocks whose components both differ by at most a pixel per frame.
        blocks: macroblocks compared.
    """

    correlation_x: float
    correlation_y: float
    within_one_pixel: float
    blocks: int


def agreement(first: Iterable[MotionFrame], second: Iterable[MotionFrame], rescale: bool) -> Agreement:
    """Compare two readings, both with grids of the scale `rescale`; MediaError if no frame has motion in both."""

    def pixels(frame: MotionFrame, grid: np.ndarray) -> np.ndarray:
        return to_pixels(grid, frame.width, frame.height, rescale).reshape(2, -1)

    pairs = [
        (pixels(one, one.grid), pixels(other, other.grid))
        for one, other in zip(first, second, strict=False)
        if one.grid is not None and other.grid is not None
    ]
    if not pairs:
        raise MediaError("the two readings have no frame with motion in common; compare readings of the same video")
    a, b = (np.concatenate([pair[side] for pair in pairs], axis=1) for side in (0, 1))  # [2, N] each
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y = (float(np.corrcoef(a[i], b[i])[0, 1]) for i in (0, 1))
    close = (np.abs(a - b) <= 1).all(axis=0)
    return Agreement(x, y, float(close.mean()), a.shape[1])
