"""What is to be seen in a clip: its shapes, and of each the colour, kind, size and way.

Contract: frames uint8 [T, H, W, 3] in, plain geometry out; nothing here is learned and nothing of the prompt is known.
Lengths are shares of the frame's width, time is in frames. A clip in which nothing is to be seen gives no shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import hypot
from typing import Literal

import numpy as np

from videolavit.evaluation.outlines import diameter, overlaps
from videolavit.evaluation.regions import Region, regions
from videolavit.shapes.scene import (
    DIAMETERS,
    KINDS,
    PAIR_DIAMETERS,
    RATES,
    Colour,
    Direction,
    Kind,
    Size,
    Speed,
    nearest_direction,
)

Way = Direction | Literal["still", "wandering"]

STILL = 0.07  # longest way of a shape that stays where it is; the shortest way of a slow one is 0.16
STRAIGHT = 0.6  # least share of a moving shape's way that leads from its start to its end
REST = 0.95  # share of its way after which a shape counts as arrived
SMOOTH = 5  # frames over which a track is averaged
LEAP = 0.3  # longest distance from one frame to the next at which it is taken for the same shape
OTHER_COLOUR = 0.15  # counts as this distance
LEAST_SEEN = 0.5  # share of the frames in which a shape must be there to count


@dataclass(frozen=True)
class Seen:
    """A shape as seen in a clip.

    Attributes:
        colour, kind: the ones that most of its frames show.
        likeness: mean overlap with the outline of `kind`, 0 to 1.
        diameter: its median, as the world of shapes counts it.
        growth: last diameter by the first.
        way: direction, `still`, or `wandering` if it went and came back.
        travel: (x, y) from start to end; y downwards.
        rate: distance per frame while it moved.
        seen: share of the frames in which it was found.
        track: centroid (x, y) per frame, NaN where it was not found.
    """

    colour: Colour
    kind: Kind
    likeness: float
    diameter: float
    growth: float
    way: Way
    travel: tuple[float, float]
    rate: float
    seen: float
    track: np.ndarray

    @property
    def speed(self) -> Speed | None:
        """The class of `rate`."""
        slow, quick = _boundaries("slowly", "quickly", RATES)
        return "slowly" if self.rate < slow else "quickly" if self.rate > quick else None

    def size(self, shapes: int) -> Size | None:
        """The class of `diameter` in a scene of `shapes` shapes."""
        small, large = _boundaries("small", "large", DIAMETERS if shapes == 1 else PAIR_DIAMETERS)
        return "small" if self.diameter < small else "large" if self.diameter > large else None

    def __str__(self) -> str:
        return f"{self.colour} {self.kind} {self.way}"


@dataclass
class _Track:
    """Regions taken for one shape: frame number -> region."""

    found: dict[int, Region] = field(default_factory=dict)

    def last(self) -> tuple[int, Region]:
        return next(reversed(self.found.items()))


def look(frames: np.ndarray) -> list[Seen]:
    """Shapes in a clip uint8 [T, H, W, 3], largest first."""
    tracks: list[_Track] = []
    for index, frame in enumerate(frames):
        _follow(tracks, regions(frame), index, frame.shape[1])
    width = frames.shape[2]
    lasting = [track for track in tracks if len(track.found) >= max(1.0, LEAST_SEEN * len(frames))]
    shapes = [_seen(track, len(frames), width) for track in lasting]
    return sorted(shapes, key=lambda shape: -shape.diameter)


def _follow(tracks: list[_Track], found: Sequence[Region], index: int, width: int) -> None:
    """Give each region of frame `index` to the track it continues best, or to a new one."""
    pairs = []
    for t, track in enumerate(tracks):
        _, last = track.last()
        for r, region in enumerate(found):
            (x, y), (px, py) = region.centre, last.centre
            cost = hypot(x - px, y - py) / width + (OTHER_COLOUR if region.colour != last.colour else 0)
            if cost <= LEAP:
                pairs.append((cost, t, r))
    taken_tracks: set[int] = set()
    taken: set[int] = set()
    for _, t, r in sorted(pairs):
        if t not in taken_tracks and r not in taken:
            tracks[t].found[index] = found[r]
            taken_tracks.add(t)
            taken.add(r)
    tracks += [_Track({index: region}) for r, region in enumerate(found) if r not in taken]


def _seen(track: _Track, total: int, width: int) -> Seen:
    whole = {index: region for index, region in track.found.items() if not region.clipped}
    if len(whole) < max(2, len(track.found) / 3):
        whole = track.found
    scores = dict.fromkeys(KINDS, 0.0)
    for region in whole.values():
        for kind, overlap in overlaps(region.alpha).items():
            scores[kind] += overlap / len(whole)
    kind = max(scores, key=scores.__getitem__)
    diameters = np.array([diameter(kind, region.area) / width for region in whole.values()])
    ends = max(1, len(diameters) // 6)
    centres = np.full((total, 2), np.nan)
    for index, region in track.found.items():
        centres[index] = np.array(region.centre) / width
    way, travel, rate = _way(centres)
    return Seen(
        colour=Counter(region.colour for region in track.found.values()).most_common(1)[0][0],
        kind=kind,
        likeness=scores[kind],
        diameter=float(np.median(diameters)),
        growth=float(np.median(diameters[-ends:]) / np.median(diameters[:ends])),
        way=way,
        travel=travel,
        rate=rate,
        seen=len(track.found) / total,
        track=centres,
    )


def _way(centres: np.ndarray) -> tuple[Way, tuple[float, float], float]:
    """(direction, travel, distance per frame) of a track [T, 2] with NaN where the shape was not found."""
    known = np.flatnonzero(~np.isnan(centres[:, 0]))
    if len(known) < 2:
        return "still", (0.0, 0.0), 0.0
    times = np.arange(known[0], known[-1] + 1)
    path = np.stack([np.interp(times, known, centres[known, axis]) for axis in (0, 1)], axis=-1)  # [t, 2]
    travel = path[-1] - path[0]
    length = float(np.hypot(*travel))
    smooth = _smoothed(path)
    walked = float(np.hypot(*np.diff(smooth, axis=0).T).sum())
    if max(length, walked) < STILL:
        return "still", (float(travel[0]), float(travel[1])), 0.0
    if length < STILL or float(np.hypot(*(smooth[-1] - smooth[0]))) < STRAIGHT * walked:
        way: Way = "wandering" if walked > 2 * STILL else "still"
        return way, (float(travel[0]), float(travel[1])), walked / (len(path) - 1)
    direction = nearest_direction(travel)
    along = (path - path[0]) @ travel / length
    arrived = int(np.argmax(along >= REST * length))
    rate = float(along[arrived]) / max(1, arrived)
    return direction, (float(travel[0]), float(travel[1])), rate


def _smoothed(path: np.ndarray) -> np.ndarray:
    """Running mean of a path [t, 2] over `SMOOTH` frames; shorter by what the mean takes."""
    window = min(SMOOTH, len(path) - 1)
    return np.stack([np.convolve(path[:, axis], np.ones(window) / window, "valid") for axis in (0, 1)], axis=-1)


def _boundaries(low: str, high: str, ranges: dict[str | None, tuple[float, float]]) -> tuple[float, float]:
    """Where the class `low` ends and `high` begins: in the middle between their ranges and that of neither."""
    return (ranges[low][1] + ranges[None][0]) / 2, (ranges[None][1] + ranges[high][0]) / 2
