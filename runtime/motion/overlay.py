"""Motion drawn on the picture: an arrow per macroblock, a border and a label on key frames.

Contract: pictures in and out are uint8 [H, W, 3] RGB of the same size; nothing here changes the motion.
"""

from __future__ import annotations

from math import hypot

import numpy as np
from PIL import Image, ImageDraw

from runtime.geometry import MACROBLOCK
from runtime.motion.grid import to_pixels
from runtime.motion.sources import MotionFrame

ARROW = (255, 232, 0)
SHADOW = (0, 0, 0)
KEYFRAME = (255, 0, 90)
MIN_LENGTH = 1.0  # pixels per frame; less is not drawn
STRETCH = 2.0  # drawn pixels per pixel of motion, so that slow motion shows
MAX_LENGTH = 4 * MACROBLOCK  # drawn pixels; longer arrows would hide the picture


def draw(frame: MotionFrame, rescale: bool) -> np.ndarray:
    """Picture [H, W, 3] of `frame` with its motion: arrows start at a macroblock's centre and point where it moves."""
    picture = Image.fromarray(frame.image)  # type: ignore[arg-type]
    pen = ImageDraw.Draw(picture)
    if frame.grid is None:
        pen.rectangle((0, 0, frame.width - 1, frame.height - 1), outline=KEYFRAME, width=max(3, frame.height // 80))
    else:
        motion = to_pixels(frame.grid, frame.width, frame.height, rescale)  # [2, rows, columns]
        lengths = np.hypot(*motion)
        for row, column in zip(*np.nonzero(lengths >= MIN_LENGTH), strict=True):
            centre = ((column + 0.5) * MACROBLOCK, (row + 0.5) * MACROBLOCK)
            _arrow(pen, centre, motion[:, row, column] * STRETCH)
    label = f"{frame.kind} {frame.index}  {frame.time_s:.2f} s"
    box = pen.textbbox((6, 6), label)
    pen.rectangle((box[0] - 3, box[1] - 3, box[2] + 3, box[3] + 3), fill=KEYFRAME if frame.grid is None else SHADOW)
    pen.text((6, 6), label, fill=(255, 255, 255))
    return np.asarray(picture)


def _arrow(pen: ImageDraw.ImageDraw, start: tuple[float, float], vector: np.ndarray) -> None:
    dx, dy = (float(v) for v in vector)
    length = hypot(dx, dy)
    shrink = min(1.0, MAX_LENGTH / length)
    dx, dy, length = dx * shrink, dy * shrink, length * shrink
    end = (start[0] + dx, start[1] + dy)
    head = min(6.0, max(3.0, length / 2))
    ux, uy = dx / hypot(dx, dy), dy / hypot(dx, dy)
    barbs = [(end[0] - head * (ux + side * uy / 2), end[1] - head * (uy - side * ux / 2)) for side in (1, -1)]
    pen.line((start, end), fill=SHADOW, width=3)
    pen.polygon((end, *barbs), fill=ARROW, outline=SHADOW)
    pen.line((start, end), fill=ARROW, width=1)
