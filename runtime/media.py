"""A file a user asks about: a picture, or a video as key frames and motion.

Contract: what a file is is decided by its content, not its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from runtime.geometry import Geometry
from runtime.images import is_picture, load_image
from runtime.motion.connection import is_live
from runtime.motion.mpeg4 import MotionSettings
from runtime.motion.select import SourceName, open_source


@dataclass(frozen=True)
class Media:
    """What a question is about.

    Attributes:
        pictures: the picture, or a video's key frames; [H, W, 3] uint8 each.
        motions: for a video, one grid [T, 2, rows, columns] per key frame in x10 scale; else None.
        exact: the motion is that of the model's training encoder, and known to be.
    """

    pictures: tuple[np.ndarray, ...]
    motions: tuple[np.ndarray, ...] | None
    exact: bool = True


def load_media(
    address: str,
    geometry: Geometry,
    max_clips: int,
    source: SourceName = "mpeg4",
    fallback: Literal["mpeg4"] | None = None,
    sparse: bool = False,
) -> Media:
    """Read a file, or the next clips of a live stream, for understanding (reference semantics §11).

    `source` and `fallback` say where motion comes from (`runtime.motion.select`), `sparse` that of a file only the
    clips are encoded (`MotionSettings`). Raises MediaError in one line.
    """
    if not is_live(address) and is_picture(address):
        return Media((load_image(address),), None)
    settings = MotionSettings(fps=geometry.fps, rescale=True, sparse=sparse)
    motion = open_source(address, source, settings, fallback)
    clips = motion.understanding_clips(max_clips, geometry.frames)
    return Media(tuple(c.keyframe for c in clips), tuple(c.grid for c in clips), motion.exact)
