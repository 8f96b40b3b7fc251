"""A key frame moved along motion vectors: what motion compensation alone makes of a clip.

Contract: numpy in, numpy out. A vector says how far what is in its cell has come since the frame before, and counts for
all pixels of the cell. Every frame is read from the key frame itself, at places traced back through all vectors since,
so that nothing blurs from frame to frame; what comes into view shows what was nearest.
"""

from __future__ import annotations

import numpy as np

from runtime.motion.grid import deviation

NEAR = 0.12  # share of the frame's side within which decoded vectors belong together
TOUCHING = 1.5  # cells; of coarse grids at least the cells that touch
MOVES = 0.003  # share of the side a frame; shorter vectors stand still


def compensated(keyframe: np.ndarray, motion: np.ndarray, *, tokenized: bool) -> np.ndarray:
    """Frames [T, H, W, 3] uint8, the first of which is the key frame.

    Args:
        keyframe: [H, W, 3] uint8.
        motion: [2, T, h, w] in the detokenizer's scale, H and W multiples of h and w; that of the first frame is not
            looked at.
        tokenized: whether the vectors were tokens. Those of small things then fade towards their edges, which would
            smear them, so that every cell moves as the long ones near it do.
    """
    height, width = keyframe.shape[:2]
    shares = motion * deviation(rescale=False).astype(np.float32)[:, None, None, None]
    if tokenized:
        shares = gathered(shares)
    down, across = height // motion.shape[2], width // motion.shape[3]
    pixels = np.array([width, height], np.float32).reshape(2, 1, 1, 1)
    vectors = shares.repeat(down, axis=2).repeat(across, axis=3) * pixels  # [2, T, H, W]
    here = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1).astype(np.float32)
    source = here  # [H, W, 2]: where in the key frame each pixel comes from, y and x
    content = keyframe.astype(np.float32)
    frames = [keyframe]
    for x, y in vectors.transpose(1, 0, 2, 3)[1:]:
        source = _sampled(source, here - np.stack([y, x], axis=-1))
        frames.append(np.rint(_sampled(content, source)).astype(np.uint8))
    return np.stack(frames)


def gathered(shares: np.ndarray) -> np.ndarray:
    """Vectors [2, T, h, w], shares of the side: of each place the mean of those near it, the long ones counting most.

    They count by the cube of their length, so that a cell moves as what moves near it does. A vector with none
    beside it that moves is left out.
    """
    height, width = shares.shape[2:]
    reach = np.maximum(NEAR * np.array([height, width]), TOUCHING)  # cells up and down, and to both sides
    rows, columns = reach.astype(int)
    places = [
        (row, column)
        for row in range(2 * rows + 1)
        for column in range(2 * columns + 1)
        if np.hypot(*((row - rows, column - columns) / reach)) <= 1
    ]
    around = np.pad(shares, ((0, 0), (0, 0), (rows, rows), (columns, columns)))
    lengths = np.hypot(*around)  # [T, h + 2 rows, w + 2 columns]
    moves = lengths >= MOVES
    weights = np.where(moves, lengths, 0) ** 3
    total, weight = np.zeros_like(shares), np.zeros_like(shares[0])
    count = np.zeros(shares.shape[1:], int)
    for row, column in places:
        here = np.s_[..., row : row + height, column : column + width]
        total += around[here] * weights[here]
        weight += weights[here]
        count += moves[here]
    return np.divide(total, weight, out=np.zeros_like(total), where=np.broadcast_to(count >= 2, total.shape))


def _sampled(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """values [H, W, C] at places [..., 2] (y and x, pixels), bilinear; beyond the border those of the border."""
    last = np.array(values.shape[:2], np.float32) - 1
    inside = np.clip(places, 0, last)
    low = np.floor(inside).astype(np.intp)
    high = np.minimum(low + 1, last.astype(np.intp))
    y, x = np.moveaxis(inside - low, -1, 0)[..., None]  # shares of the pixel below, and of the one to the right
    top = values[low[..., 0], low[..., 1]] * (1 - x) + values[low[..., 0], high[..., 1]] * x
    bottom = values[high[..., 0], low[..., 1]] * (1 - x) + values[high[..., 0], high[..., 1]] * x
    return (top * (1 - y) + bottom * y).astype(np.float32)
