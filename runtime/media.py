"""A file a user asks about: a picture, or a video as key frames and motion.

Contract: what a file is is decided by its content, not its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.geometry import Geometry
from runtime.images import is_picture, load_image
from runtime.motion.sources import MotionSettings, understanding_clips


@dataclass(frozen=True)
class Media:
    """What a question is about.

    Attributes:
        pictures: the picture, or a video's key frames; [H, W, 3] uint8 each.
        motions: for a video, one grid [T, 2, rows, columns] per key frame in x10 scale; else None.
    """

    pictures: tuple[np.ndarray, ...]
    motions: tuple[np.ndarray, ...] | None


def load_media(path: Path, geometry: Geometry, max_clips: int) -> Media:
    """Read `path` for understanding (reference semantics §11). Raises MediaError in one line."""
    if is_picture(path):
        return Media((load_image(path),), None)
    clips = understanding_clips(path, MotionSettings(fps=geometry.fps, rescale=True), max_clips, geometry.frames)
    return Media(tuple(c.keyframe for c in clips), tuple(c.grid for c in clips))
