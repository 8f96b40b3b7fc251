"""Which source frames make up a video at a fixed rate.

Contract: the choice equals that of the ffmpeg command line with `fps=RATE` and a constant-rate output (reference
semantics §11.1): times are rounded to output slots half away from zero, the last source frame at or before a slot
fills it, the video ends at the last frame's time plus its duration, and a video whose first frame comes late starts
with copies of it back to time zero. One frame is held; memory does not grow with length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import repeat
from typing import Generic, TypeVar

T = TypeVar("T")
DROPPED = 2  # slots before time zero that the constant-rate output still keeps


def round_half_away(value: Fraction) -> int:
    """Nearest integer; halves go away from zero."""
    magnitude = (2 * abs(value.numerator) + value.denominator) // (2 * value.denominator)
    return magnitude if value >= 0 else -magnitude


@dataclass(frozen=True)
class Timed(Generic[T]):
    """A frame with its time and end (time plus duration), seconds from the start of the video."""

    frame: T
    time: Fraction
    end: Fraction


def slot(time: Fraction | int, rate: Fraction) -> int:
    """Output slot of a frame at `time`, in the unit whose inverse is that of `rate`."""
    # Spelled out in integers: this runs for every packet, and products of fractions are slow.
    numerator = time.numerator * rate.numerator
    denominator = time.denominator * rate.denominator
    magnitude = (2 * abs(numerator) + denominator) // (2 * denominator)
    return magnitude if numerator >= 0 else -magnitude


def slots(first: Fraction, end: Fraction, rate: Fraction) -> int:
    """Number of slots that `at_rate` fills from frames of which the first one is at `first` and the last ends at `end`
    (seconds)."""
    start, stop = slot(first, rate), slot(end, rate)
    return max(0, stop - max(start, -DROPPED) + max(start, 0)) if stop > start else 0


def at_rate(frames: Iterable[Timed[T]], rate: Fraction, first: int | None = None) -> Iterator[T]:
    """Yield the frame of every output slot at `rate` frames per second; frames can repeat or be left out.

    With `first`, slots from that one on; `frames` then start anywhere, best at or before it.
    """
    held: Timed[T] | None = None
    following = 0  # next slot to fill
    copies = 1
    for candidate in _with_end(frames):
        if held is None:
            held = candidate
            own = slot(candidate.time, rate)
            following = own if first is None else max(own, first)
            # The constant-rate output counts from zero: it repeats a late first frame back to zero, and drops slots
            # only where more than `DROPPED` lie before zero.
            copies += max(following, 0) if first is None else following - first
            continue
        reached = slot(candidate.time, rate)
        while reached > following:
            if following >= -DROPPED:
                yield from repeat(held.frame, copies)
                copies = 1
            following += 1
        held = candidate


def _with_end(frames: Iterable[Timed[T]]) -> Iterator[Timed[T]]:
    """`frames`, then the last one again at its end."""
    last = None
    for last in frames:
        yield last
    if last is not None:
        yield replace(last, time=last.end)
