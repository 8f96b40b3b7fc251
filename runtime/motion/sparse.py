"""Clips of a long video without encoding all of it.

Contract: each clip is encoded by a fresh encoder that starts some frames earlier (`MotionSettings.warm_up`), because
the encoder's choices hang on the frames before. Clips so close that these stretches meet share one encoder. Whether
the outcome equals that of encoding the whole video is for the caller to check or to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from av.packet import Packet

from runtime.decoding import VideoSource
from runtime.frame_rate import slot, slots
from runtime.motion.mpeg4 import MotionSettings, encode


@dataclass(frozen=True)
class Stretch:
    """Frames `first` to `last` - 1, encoded in one go; `starts` are the clips' first frames among them."""

    first: int
    last: int
    starts: tuple[int, ...]


def stretches(starts: Sequence[int], length: int, warm_up: int, keyframes: Sequence[int], total: int) -> list[Stretch]:
    """What to encode for clips of `length` frames at `starts` (ascending) of a video of `total` frames.

    A stretch begins at one of `keyframes` (ascending, the first is 0), so that its I frames fall where they fell.
    """
    found: list[Stretch] = []
    for start in starts:
        first = max((key for key in keyframes if key <= start - warm_up), default=0)
        last = min(start + length, total)
        if found and first <= found[-1].last:
            before = found.pop()
            found.append(Stretch(before.first, max(before.last, last), (*before.starts, start)))
        else:
            found.append(Stretch(first, last, (start,)))
    return found


def encoded(source: VideoSource, settings: MotionSettings, parts: Sequence[Stretch]) -> Iterator[tuple[int, Packet]]:
    """(index of the frame, packet) of everything in `parts`."""
    for part in parts:
        frames = source.frames_between(settings.rate, part.first, part.last)
        yield from enumerate(encode(frames, settings, part.first, part.starts), part.first)


def count_frames(source: VideoSource, rate: Fraction) -> int | None:
    """Frames of the video at `rate` per second, from its time stamps; None where these do not tell."""
    span = source.span()
    # Before time zero, frames and slots are not numbered alike.
    return slots(*span, rate) if span is not None and slot(span[0], rate) >= 0 else None
