"""Which source frames make up a video at a fixed rate.

Contract: the choice equals that of the ffmpeg command line with `fps=RATE` and a constant-rate output (reference
semantics §11.1): times are rounded to output slots half away from zero, the last source frame at or before a slot
fills it, the video ends at the last frame's time plus its duration, and a video whose first frame comes late starts
with copies of it back to time zero. One frame is held; memory does not grow with length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import repeat
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


def round_half_away(value: Fraction) -> int:
    """Nearest integer; halves go away from zero."""
    magnitude = (2 * abs(value.numerator) + value.denominator) // (2 * value.denominator)
    return magnitude if value >= 0 else -magnitude


class Timed(NamedTuple, Generic[T]):
    """A frame with its time and end (time plus duration), seconds from the start of the video."""

    frame: T
    time: Fraction
    end: Fraction


def slot(time: Fraction, rate: Fraction) -> int:
    """Output slot of a frame at `time` seconds."""
    return round_half_away(time * rate)


def at_rate(frames: Iterable[Timed[T]], rate: Fraction) -> Iterator[T]:
    """Yield the frame of every output slot at `rate` frames per second; frames can repeat or be left out."""
    held: Timed[T] | None = None
    following = 0  # next slot to fill
    started = False
    for candidate in _with_end(frames):
        if held is None:
            held = candidate
            following = slot(candidate.time, rate)
            continue
        reached = slot(candidate.time, rate)
        while reached > following:
            # The constant-rate output counts from zero: it repeats a late first frame back to zero, and drops slots
            # only where more than two lie before zero.
            copies = 1 + max(following, 0) if not started else 1
            if following >= -2:
                yield from repeat(held.frame, copies)
                started = True
            following += 1
        held = candidate


def _with_end(frames: Iterable[Timed[T]]) -> Iterator[Timed[T]]:
    """`frames`, then the last one again at its end."""
    last = None
    for last in frames:
        yield last
    if last is not None:
        yield last._replace(time=last.end)
