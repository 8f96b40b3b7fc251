"""Motion of a video file, frame by frame or clip by clip.

Contract: every call re-encodes the file once in a stream (reference semantics §11) and holds a bounded number of
frames, however long the video is. Which clips `understanding_clips` takes is known at the end only: if the video is too
long to hold in compressed form until then, the chosen clips are encoded again, and proven to be the same by checksums
of the first pass. Unusable files raise MediaError.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Literal, TypeAlias
from zlib import crc32

import numpy as np
from av.packet import Packet

from runtime.decoding import media_errors, open_video
from runtime.errors import MediaError
from runtime.motion.clips import GROUP, consecutive_clips, understanding_starts
from runtime.motion.grid import grid_shape, macroblock_grid
from runtime.motion.mpeg4 import MotionSettings, VectorDecoder, motion_vectors, reencode, rgb
from runtime.motion.sparse import count_frames, encoded, stretches

MAX_CLIPS = 8  # that the model looks at, unless said otherwise
FRAMES_PER_CLIP = 24
HELD_BYTES = 48 << 20  # most re-encoded packets to hold while the clips are not chosen yet
WORTHWHILE = 0.9  # encode stretches instead of the whole video if they are at most this share of it

Cut: TypeAlias = "tuple[int, list[Packet]]"  # index of the first frame, packets of a clip


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
        exact: whether this is known to be what encoding the whole video gives.
    """

    index: int
    frame_index: int
    time_s: float
    keyframe: np.ndarray
    grid: np.ndarray
    exact: bool = True


def frames(path: Path | str, settings: MotionSettings, images: bool = False) -> Iterator[MotionFrame]:
    """Every frame of the video at `settings.fps`, with pixels if `images`."""
    found = False
    for frame in _decoded(reencode(path, settings), 0, settings, images):
        found = True
        yield frame
    if not found:
        raise _too_short(Path(path), 1, settings)


def sparse_frames(path: Path | str, settings: MotionSettings, images: bool = False) -> Iterator[MotionFrame] | None:
    """The frames of the clips that `understanding_clips` takes with `settings.sparse`, in order; None if it encodes all
    of this video, so that `frames` is as quick."""
    cuts = _sparse_cuts(Path(path), settings, MAX_CLIPS, FRAMES_PER_CLIP)
    if cuts is None:
        return None
    return (frame for start, packets in cuts for frame in _decoded(packets, start, settings, images))


def _decoded(packets: Iterable[Packet], first: int, settings: MotionSettings, images: bool) -> Iterator[MotionFrame]:
    """The frames of `packets`, numbered from `first`."""
    for index, frame in enumerate(VectorDecoder(pixels_of_p_frames=images).decode(packets), first):
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


def understanding_clips(
    path: Path | str, settings: MotionSettings, max_clips: int = MAX_CLIPS, frames_per_clip: int = FRAMES_PER_CLIP
) -> list[MotionClip]:
    """At most `max_clips` clips spread over the video, chosen as for understanding (§11.4).

    Motion after the end of a short video is zero. With `settings.sparse` only the clips are encoded, at the places
    where a video without scene cuts has them; a video that is short, or has no time stamps to tell its length, is
    encoded whole, and its clips are exact.
    """
    path = Path(path)
    if settings.sparse:
        cuts = _sparse_cuts(path, settings, max_clips, frames_per_clip)
        if cuts is not None:
            return [_clip(i, *cut, settings, frames_per_clip, exact=False) for i, cut in enumerate(cuts)]
    held: list[Packet] | None = []
    held_bytes = 0
    keyframes: list[int] = []
    checksums = array("I")
    for packet in reencode(path, settings):
        if packet.is_keyframe:
            keyframes.append(len(checksums))
        checksums.append(crc32(packet))
        if held is not None:
            held.append(packet)
            held_bytes += packet.size
            if held_bytes > HELD_BYTES:
                held = None
    if not checksums:
        raise _too_short(path, 1, settings)
    starts = understanding_starts(keyframes, len(checksums), max_clips, frames_per_clip)
    if held is not None:
        cuts = [(start, held[start : start + frames_per_clip]) for start in starts]
    else:
        cuts = _again(path, settings, starts, frames_per_clip, keyframes, checksums)
    return [_clip(i, *cut, settings, frames_per_clip) for i, cut in enumerate(cuts)]


def _sparse_cuts(path: Path, settings: MotionSettings, max_clips: int, frames_per_clip: int) -> list[Cut] | None:
    """Clips of a video with an I frame every `GROUP` frames; None if encoding all of it is the better way."""
    with open_video(path) as source, media_errors(path):
        total = count_frames(source, settings.rate)
        if not total:
            return None
        keyframes = range(0, total, GROUP)
        starts = understanding_starts(keyframes, total, max_clips, frames_per_clip)
        parts = stretches(starts, frames_per_clip, settings.warm_up, keyframes, total)
        if sum(part.last - part.first for part in parts) > WORTHWHILE * total:
            return None
        cuts = list(_cut(encoded(source, settings, parts), starts, frames_per_clip))
        return cuts if len(cuts) == len(starts) else None


def _again(
    path: Path,
    settings: MotionSettings,
    starts: Sequence[int],
    frames_per_clip: int,
    keyframes: Sequence[int],
    checksums: Sequence[int],
) -> list[Cut]:
    """The clips at `starts` of a video that was encoded before and gave `checksums`."""
    parts = stretches(starts, frames_per_clip, settings.warm_up, keyframes, len(checksums))
    if sum(part.last - part.first for part in parts) <= WORTHWHILE * len(checksums):
        try:
            with open_video(path) as source, media_errors(path):
                cuts = list(_cut(encoded(source, settings, parts), starts, frames_per_clip))
        except MediaError:  # a file that cannot be read from its middle
            cuts = []
        expected = [list(checksums[start : start + frames_per_clip]) for start in starts]
        if [list(map(crc32, packets)) for _, packets in cuts] == expected:
            return cuts
    return list(_cut(enumerate(reencode(path, settings)), starts, frames_per_clip))


def _cut(packets: Iterable[tuple[int, Packet]], starts: Sequence[int], frames_per_clip: int) -> Iterator[Cut]:
    """The clips in numbered packets; clips may overlap where I frames are close, and the rest is not read."""
    open_clips: list[Cut] = []
    for index, packet in packets:
        while open_clips and index >= open_clips[0][0] + frames_per_clip:
            yield open_clips.pop(0)
        if index >= starts[-1] + frames_per_clip:
            break
        if index in starts:
            open_clips.append((index, []))
        for _, clip in open_clips:
            clip.append(packet)
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


def _clip(
    index: int, start: int, packets: Sequence[Packet], settings: MotionSettings, length: int, exact: bool = True
) -> MotionClip:
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
        exact=exact,
    )


def _too_short(path: Path, frames_needed: int, settings: MotionSettings) -> MediaError:
    return MediaError(
        f"{path}: is too short, or nothing in it can be decoded; {frames_needed} frames at "
        f"{float(settings.rate):g} frames per second are needed ({float(frames_needed / settings.rate):.2f} s)"
    )
