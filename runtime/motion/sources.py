"""Motion of a video file, frame by frame or clip by clip.

Contract: every call re-encodes the file once in a stream (reference semantics §11) and holds a bounded number of
frames, however long the video is; `understanding_clips` re-encodes a second time if the video is too long to hold in
compressed form. Unusable files raise MediaError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Literal

import numpy as np
from av.packet import Packet

from runtime.errors import MediaError
from runtime.motion.clips import consecutive_clips, understanding_starts
from runtime.motion.grid import grid_shape, macroblock_grid
from runtime.motion.mpeg4 import MotionSettings, VectorDecoder, motion_vectors, reencode, rgb

HELD_BYTES = 48 << 20  # most re-encoded packets to hold while the clips are not chosen yet


@dataclass(frozen=True)
class MotionFrame:
    """One frame of the re-encoded video.

    Attributes:
        index: position at the motion frame rate, from 0.
        time_s: seconds from the start of the video.
        kind: `I` (a key frame, no motion) or `P`.
        grid: float32 [2, rows, columns], or None for an I frame.
        image: uint8 [H, W, 3] RGB, or None if pixels were not asked for.
        width, height: of the frame, pixels.
    """

    index: int
    time_s: float
    kind: Literal["I", "P"]
    grid: np.ndarray | None
    image: np.ndarray | None
    width: int
    height: int


@dataclass(frozen=True)
class MotionClip:
    """A key frame and the motion of the frames that follow it.

    Attributes:
        index: number of the clip, from 0.
        frame_index: position of its key frame at the motion frame rate.
        time_s: seconds from the start of the video.
        keyframe: uint8 [H, W, 3] RGB.
        grid: float32 [T, 2, rows, columns]; zero at the key frame and after the video's end.
    """

    index: int
    frame_index: int
    time_s: float
    keyframe: np.ndarray
    grid: np.ndarray


def frames(path: Path | str, settings: MotionSettings, images: bool = False) -> Iterator[MotionFrame]:
    """Every frame of the video at `settings.fps`, with pixels if `images`."""
    index = -1
    for index, frame in enumerate(VectorDecoder(pixels_of_p_frames=images).decode(reencode(path, settings))):
        vectors = motion_vectors(frame)
        yield MotionFrame(
            index=index,
            time_s=float(index / settings.rate),
            kind="I" if frame.key_frame else "P",
            grid=None if frame.key_frame else macroblock_grid(vectors, frame.width, frame.height, settings.rescale),
            image=rgb(frame) if images else None,
            width=frame.width,
            height=frame.height,
        )
    if index < 0:
        raise _too_short(Path(path), 1, settings)


def understanding_clips(
    path: Path | str, settings: MotionSettings, max_clips: int = 8, frames_per_clip: int = 24
) -> list[MotionClip]:
    """At most `max_clips` clips spread over the video, chosen as for understanding (§11.4).

    Motion after the end of a short video is zero.
    """
    held: list[Packet] | None = []
    held_bytes = 0
    keyframes: list[int] = []
    total = 0
    for packet in reencode(path, settings):
        if packet.is_keyframe:
            keyframes.append(total)
        total += 1
        if held is not None:
            held.append(packet)
            held_bytes += packet.size
            if held_bytes > HELD_BYTES:
                held = None
    if not total:
        raise _too_short(Path(path), 1, settings)
    starts = understanding_starts(keyframes, total, max_clips, frames_per_clip)
    if held is not None:
        cuts = iter([(start, held[start : start + frames_per_clip]) for start in starts])
    else:
        cuts = _cut(reencode(path, settings), starts, frames_per_clip)
    return [_clip(i, start, packets, settings, frames_per_clip) for i, (start, packets) in enumerate(cuts)]


def _cut(packets: Iterator[Packet], starts: Sequence[int], frames_per_clip: int) -> Iterator[tuple[int, list[Packet]]]:
    """(start, packets) of each clip; clips may overlap where I frames are close, and the rest is not read."""
    open_clips: list[tuple[int, list[Packet]]] = []
    for index, packet in enumerate(islice(packets, starts[-1] + frames_per_clip)):
        if index in starts:
            open_clips.append((index, []))
        for _, clip in open_clips:
            clip.append(packet)
        if open_clips and len(open_clips[0][1]) == frames_per_clip:
            yield open_clips.pop(0)
    yield from open_clips


def reconstruction_clips(
    path: Path | str, settings: MotionSettings, frames_per_clip: int = 24, start_s: float = 0.0
) -> Iterator[MotionClip]:
    """Consecutive whole clips from `start_s` seconds on, one at a time (§12.7).

    Clips start at I frames whose group of pictures has full length; if the video has none, at any I frame.

    Raises:
        MediaError: no clip of `frames_per_clip` frames fits into the video after `start_s`.
    """
    first = ceil(start_s * settings.rate)
    found = False
    for regular in (True, False):
        packets = ((packet.is_keyframe, packet) for packet in reencode(path, settings))
        for i, (start, clip) in enumerate(consecutive_clips(packets, frames_per_clip, first, regular)):
            found = True
            yield _clip(i, start, clip, settings, frames_per_clip)
        if found:
            return
    raise _too_short(Path(path), first + frames_per_clip, settings)


def _clip(index: int, start: int, packets: Sequence[Packet], settings: MotionSettings, length: int) -> MotionClip:
    """Decode `packets`, which start at the I frame number `start`, to a clip of `length` frames."""
    decoded = VectorDecoder(pixels_of_p_frames=False).decode(packets)
    first = next(decoded)
    grid = np.zeros((length, 2, *grid_shape(first.width, first.height)), np.float32)
    for target, frame in zip(grid[1:], decoded, strict=False):  # the first frame has no motion
        target[:] = macroblock_grid(motion_vectors(frame), frame.width, frame.height, settings.rescale)
    return MotionClip(
        index=index,
        frame_index=start,
        time_s=float(start / settings.rate),
        keyframe=rgb(first),
        grid=grid,
    )


def _too_short(path: Path, frames_needed: int, settings: MotionSettings) -> MediaError:
    return MediaError(
        f"{path}: is too short, or nothing in it can be decoded; {frames_needed} frames at "
        f"{float(settings.rate):g} frames per second are needed ({float(frames_needed / settings.rate):.2f} s)"
    )
