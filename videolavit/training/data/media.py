"""Reading a video as clips with their frames, the way the runtime reads it.

Contract: the video is brought to the model's frame rate and re-encoded by `runtime.motion`; clips start where those for
understanding do (reference semantics §11.4), and their grids are those of `runtime.motion.sources.understanding_clips`.
Frames are decoded from the re-encoded packets, as key frames are in use. After the end of a short video motion is zero
and the last frame stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from av.packet import Packet

from runtime.errors import MediaError
from runtime.geometry import Geometry
from runtime.images import SUFFIXES as PICTURE_SUFFIXES
from runtime.images import VIDEO_SUFFIXES, load_image
from runtime.motion.clips import understanding_starts
from runtime.motion.grid import grid_shape, macroblock_grid
from runtime.motion.mpeg4 import MotionSettings, VectorDecoder, motion_vectors, reencode, rgb

PICTURES = frozenset(PICTURE_SUFFIXES)
VIDEOS = VIDEO_SUFFIXES | {".gif"}


@dataclass(frozen=True)
class VideoClips:
    """Frames [C * T, H, W, 3] uint8 and grids [C * T, 2, rows, columns] float32 of C clips."""

    frames: np.ndarray
    grid: np.ndarray
    count: int


def read_clips(path: Path, geometry: Geometry, clips: int) -> VideoClips:
    """At most `clips` clips spread over the video at `path`. Raises MediaError when there is not a single frame."""
    settings = MotionSettings(fps=geometry.fps, rescale=True)
    packets = list(reencode(path, settings))
    if not packets:
        raise MediaError(f"{path}: no frame can be decoded; the file is damaged, cut short, or too short")
    keyframes = [index for index, packet in enumerate(packets) if packet.is_keyframe]
    starts = understanding_starts(keyframes, len(packets), clips, geometry.frames)
    parts = [_decoded(packets[start : start + geometry.frames], geometry.frames) for start in starts]
    frames, grids = zip(*parts, strict=True)
    return VideoClips(np.concatenate(frames), np.concatenate(grids), len(parts))


def _decoded(packets: list[Packet], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames [T, H, W, 3] and grid [T, 2, rows, columns] of the packets of one clip of `length` frames."""
    frames: list[np.ndarray] = []
    grids: list[np.ndarray] = []
    for frame in VectorDecoder(pixels_of_p_frames=True).decode(packets):
        vectors = motion_vectors(frame)
        first = not frames
        frames.append(rgb(frame))
        if first:
            grids.append(np.zeros((2, *grid_shape(frame.width, frame.height)), np.float32))
        else:
            grids.append(macroblock_grid(vectors, frame.width, frame.height, rescale=True))
    missing = length - len(frames)
    frames += frames[-1:] * missing
    grids += [np.zeros_like(grids[0])] * missing
    return np.stack(frames), np.stack(grids)


def read_picture(path: Path, moves: bool, geometry: Geometry) -> np.ndarray:
    """The picture at `path`, or if it moves the key frame of the first clip of `read_clips`: [H, W, 3] uint8."""
    return read_clips(path, geometry, 1).frames[0] if moves else load_image(path)


@contextmanager
def in_memory(content: bytes, name: str, suffix: str) -> Iterator[Path]:
    """A path under which `content` can be read as a file; errors about it say `name` instead.

    On Linux the file is in memory only. Elsewhere it is a temporary file that is gone afterwards.
    """
    with _file(content, suffix) as path:
        try:
            yield path
        except MediaError as error:
            raise MediaError(str(error).replace(str(path), name)) from error


@contextmanager
def _file(content: bytes, suffix: str) -> Iterator[Path]:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("videolavit")
        try:
            with os.fdopen(os.dup(descriptor), "wb") as stream:
                stream.write(content)
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        with NamedTemporaryFile(suffix=suffix) as stream:
            stream.write(content)
            stream.flush()
            yield Path(stream.name)
