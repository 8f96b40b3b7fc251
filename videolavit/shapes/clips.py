"""Clips of scenes with the motion vectors that a real encoder finds in them.

Contract: motion is what `runtime.motion` reads of the same frames, at the tokenizer's scale, so the model trains on
what it meets in use. Vectors depend on the size of the pictures they are searched in: one macroblock is 16 pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from runtime.motion.grid import macroblock_grid
from runtime.motion.mpeg4 import MotionSettings, VectorDecoder, encode, motion_vectors
from videolavit.shapes.drawing import SIDE, render
from videolavit.shapes.scene import FRAMES, Scene

MOTION_SIDES = (128, 256)  # pixels; 8x8 and 16x16 macroblocks


@dataclass(frozen=True)
class ShapesClip:
    """Frames [24, 128, 128, 3] uint8 and their motion grid [24, 2, rows, columns] float32."""

    frames: np.ndarray
    grid: np.ndarray


def clip(scene: Scene, motion_side: int = 256) -> ShapesClip:
    """The first clip of `scene`; motion is read from pictures of `motion_side` pixels."""
    return clips(scene, motion_side)[0]


def clips(scene: Scene, motion_side: int = 256) -> list[ShapesClip]:
    """All clips of `scene`, one after the other."""
    frames = render(scene, SIDE)
    grid = motion_grid(frames if motion_side == SIDE else render(scene, motion_side))
    return [ShapesClip(frames[at : at + FRAMES], grid[at : at + FRAMES]) for at in range(0, scene.frames, FRAMES)]


def motion_grid(frames: np.ndarray) -> np.ndarray:
    """Motion of frames [T, H, W, 3] uint8: [T, 2, rows, columns] float32, the grid of macroblocks."""
    settings = MotionSettings()
    height, width = frames.shape[1:3]
    decoder = VectorDecoder(pixels_of_p_frames=False)
    grids = []
    for frame in decoder.decode(encode(_pictures(frames, settings.rate), settings)):
        grids.append(macroblock_grid(motion_vectors(frame), width, height, settings.rescale))
    return np.stack(grids)


def _pictures(frames: np.ndarray, rate: Fraction) -> Iterator[av.VideoFrame]:
    for index, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, picture.time_base = index, 1 / rate
        yield picture
