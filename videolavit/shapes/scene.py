"""Scenes of the world of shapes: what is in one, where it is at each frame, and how one is drawn by lot.

Contract: `sample_scene` is a pure function of its arguments. Lengths and positions are shares of the frame's side, with
the origin at the top left; time is counted in frames at 6 per second. Shapes never overlap, and two shapes of a scene
never share a colour. The combinations of colour, kind and direction for which `is_held_out` is true occur in no scene
of the split `train`, and every shape of the split `held-out` is one of them.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

import numpy as np

from runtime.errors import UsageError

Kind = Literal["circle", "square", "triangle", "star"]
Colour = Literal["red", "green", "blue", "yellow", "purple", "cyan", "orange", "white"]
Direction = Literal[
    "right",
    "left",
    "up",
    "down",
    "up and to the right",
    "up and to the left",
    "down and to the right",
    "down and to the left",
]
Deed = Literal["move", "still", "grow", "shrink", "bounce"]
Size = Literal["small", "large"]
Speed = Literal["slowly", "quickly"]
Split = Literal["train", "held-out"]
Ground = Literal["plain", "black", "grey", "textured"]
Pattern = Literal["none", "stripes", "checks", "clouds"]
T = TypeVar("T")

KINDS: tuple[Kind, ...] = get_args(Kind)
COLOURS: tuple[Colour, ...] = get_args(Colour)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
SPLITS: tuple[Split, ...] = get_args(Split)
FRAMES = 24  # in a clip
HUES = {"red": 0, "orange": 30, "yellow": 57, "green": 120, "cyan": 182, "blue": 228, "purple": 285}  # degrees

_DIAGONAL = math.sqrt(0.5)
STEPS: dict[str, tuple[float, float]] = {  # unit vector (x, y) of each direction; y grows downwards
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up and to the right": (_DIAGONAL, -_DIAGONAL),
    "up and to the left": (-_DIAGONAL, -_DIAGONAL),
    "down and to the right": (_DIAGONAL, _DIAGONAL),
    "down and to the left": (-_DIAGONAL, _DIAGONAL),
}
# Ranges of diameters and of distances per frame. The classes are apart, so that a word is never nearly wrong.
DIAMETERS: dict[str | None, tuple[float, float]] = {"small": (0.20, 0.24), None: (0.27, 0.31), "large": (0.35, 0.40)}
PAIR_DIAMETERS: dict[str | None, tuple[float, float]] = {
    "small": (0.20, 0.23),
    None: (0.25, 0.28),
    "large": (0.30, 0.34),
}
RATES: dict[str | None, tuple[float, float]] = {
    "slowly": (0.007, 0.010),
    None: (0.013, 0.018),
    "quickly": (0.023, 0.027),
}
GROWTH: dict[str | None, float] = {"slowly": 1.5, None: 1.9, "quickly": 2.4}  # of the diameter over a clip
PERIODS: dict[str | None, float] = {"slowly": 24.0, None: 12.0, "quickly": 8.0}  # frames from bounce to bounce
REACH = 0.6  # of the diameter: no shape reaches further from its centre
GAP = 0.02  # between a shape and the frame's edge or another shape
_TRIES = 60


@dataclass(frozen=True, kw_only=True)
class Motion:
    """What a shape does.

    Attributes:
        direction: of a `move`, else None.
        speed: the class; None is neither slow nor quick.
        rate: `move`: distance per frame; `grow`, `shrink`: factor of the diameter over 24 frames; `bounce`: frames
            from one bounce to the next; `still`: 0.
    """

    deed: Deed
    direction: Direction | None = None
    speed: Speed | None = None
    rate: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One shape.

    Attributes:
        size: the class of `diameter`; None is neither small nor large.
        diameter: in the first frame.
        start: centre (x, y) in the first frame.
        rgb: 0..1, its lightest tone.
        shade: seed of the soft pattern on it.
    """

    kind: Kind
    colour: Colour
    size: Size | None
    diameter: float
    start: tuple[float, float]
    motion: Motion
    rgb: tuple[float, float, float]
    shade: int

    def diameter_at(self, frame: int) -> float:
        """Diameter in frame `frame`; growth ends with the first clip."""
        done = min(frame / (FRAMES - 1), 1.0)
        if self.motion.deed == "grow":
            return self.diameter * (1 + (self.motion.rate - 1) * done)
        if self.motion.deed == "shrink":
            return self.diameter / (1 + (self.motion.rate - 1) * done)
        return self.diameter

    def centre_at(self, frame: int) -> tuple[float, float]:
        """Centre (x, y) in frame `frame`; a shape that reaches the edge of the frame rests there."""
        x, y = self.start
        if self.motion.deed == "bounce":
            floor = 1 - REACH * self.diameter - GAP
            return x, floor - (floor - y) * abs(math.cos(math.pi * frame / self.motion.rate))
        if self.motion.direction is None:
            return x, y
        step = STEPS[self.motion.direction]
        way = min(self.motion.rate * frame, _room(self.start, step, self.diameter))
        return x + step[0] * way, y + step[1] * way


@dataclass(frozen=True, kw_only=True)
class Background:
    """What is behind the shapes; it does not move.

    Attributes:
        rgb: 0..1, with a saturation below 0.3.
        pattern, contrast, wave, angle, seed: of the texture; `contrast` is a share of the brightness, `wave` a length.
    """

    ground: Ground
    rgb: tuple[float, float, float]
    pattern: Pattern = "none"
    contrast: float = 0.0
    wave: float = 0.2
    angle: float = 0.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Shapes before a background, for `frames` frames."""

    shapes: tuple[Shape, ...]
    background: Background
    frames: int = FRAMES


def nearest_direction(vector: np.ndarray) -> Direction:
    """The one of the eight directions that `vector` (x, y), y downwards, is nearest to."""
    return max(DIRECTIONS, key=lambda name: float(np.dot(vector, STEPS[name])))


def is_held_out(colour: Colour, kind: Kind, direction: Direction | None) -> bool:
    """Whether the combination is kept from training; None is a shape that stays where it is. True for 1 in 10."""
    way = len(DIRECTIONS) if direction is None else DIRECTIONS.index(direction)
    return (3 * COLOURS.index(colour) + 5 * KINDS.index(kind) + 7 * way) % 10 == 4


def left_to_right(scene: Scene) -> Scene:
    """`scene` with its shapes in the order in which they stand in the first frame, the leftmost first."""
    return replace(scene, shapes=tuple(sorted(scene.shapes, key=lambda shape: shape.start[0])))


def sample_scene(seed: int, *, split: Split = "train", clips: int = 1, shapes: int | None = None) -> Scene:
    """A scene drawn by lot.

    Args:
        seed: 0 or more; equal seeds of different splits give different scenes.
        split: `train`, or `held-out`, where shapes only move or stay still.
        clips: length in clips of 24 frames; what happens fills the first one.
        shapes: 1 or 2; None draws it.

    Raises:
        UsageError: an argument is not one of these.
    """
    if split not in SPLITS:
        raise UsageError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
    if seed < 0 or clips < 1 or shapes not in (None, 1, 2):
        raise UsageError(
            f"seed {seed}, clips {clips}, shapes {shapes}: must be at least 0, at least 1, and 1, 2 or None"
        )
    rng = np.random.default_rng([SPLITS.index(split), seed])
    count = shapes or (1 if rng.random() < 0.6 else 2)
    placed: list[Shape] | None = None
    while placed is None:
        placed = _place([_shape(rng, split, count) for _ in range(count)], rng)
    return Scene(shapes=tuple(placed), background=_background(rng), frames=FRAMES * clips)


def _place(shapes: list[Shape], rng: np.random.Generator) -> list[Shape] | None:
    """`shapes` at places where they never touch; None where none was found."""
    if len({shape.colour for shape in shapes}) < len(shapes):
        return None
    placed: list[Shape] = []
    for shape in shapes:
        for _ in range(_TRIES):
            tried = replace(shape, start=_start(shape, rng))
            if all(_apart(tried, other) for other in placed):
                placed.append(tried)
                break
        else:
            return None
    return placed


def _apart(one: Shape, other: Shape) -> bool:
    return all(
        math.dist(one.centre_at(t), other.centre_at(t)) > REACH * (one.diameter_at(t) + other.diameter_at(t)) + GAP
        for t in range(FRAMES)
    )


def _shape(rng: np.random.Generator, split: Split, count: int) -> Shape:
    while True:
        colour, kind = _pick(rng, COLOURS), _pick(rng, KINDS)
        motion = _motion(rng, moves_only=split == "held-out")
        if is_held_out(colour, kind, motion.direction) == (split == "held-out"):
            break
    size: Size | None = _pick(rng, ("small", None, "large"))
    # What grows starts small and what shrinks starts large, or it would leave the frame or vanish.
    if motion.deed in ("grow", "shrink"):
        size = "small" if motion.deed == "grow" else "large"
    low, high = (DIAMETERS if count == 1 else PAIR_DIAMETERS)[size]
    return Shape(
        kind=kind,
        colour=colour,
        size=size,
        diameter=rng.uniform(low, high),
        start=(0.5, 0.5),
        motion=motion,
        rgb=_tone(rng, colour),
        shade=int(rng.integers(2**31)),
    )


def _motion(rng: np.random.Generator, moves_only: bool) -> Motion:
    deeds: tuple[Deed, ...] = ("move", "still", "grow", "shrink", "bounce")
    chances = (8 / 9, 1 / 9, 0, 0, 0) if moves_only else (0.76, 0.1, 0.04, 0.04, 0.06)
    deed = deeds[rng.choice(len(deeds), p=chances)]
    if deed == "still":
        return Motion(deed=deed)
    speed: Speed | None = _pick(rng, ("slowly", None, None, "quickly"))
    if deed == "move":
        return Motion(deed=deed, direction=_pick(rng, DIRECTIONS), speed=speed, rate=rng.uniform(*RATES[speed]))
    return Motion(deed=deed, speed=speed, rate=(PERIODS if deed == "bounce" else GROWTH)[speed])


def _start(shape: Shape, rng: np.random.Generator) -> tuple[float, float]:
    """A place from which the shape's way in the first clip fits the frame, centred where it cannot."""
    widest = max(shape.diameter_at(0), shape.diameter_at(FRAMES - 1))
    margin = REACH * widest + GAP
    x, y = (0.0, 0.0) if shape.motion.direction is None else STEPS[shape.motion.direction]
    way = shape.motion.rate * (FRAMES - 1) if shape.motion.deed == "move" else 0.0
    start = [_within(margin - min(step * way, 0), 1 - margin - max(step * way, 0), rng) for step in (x, y)]
    if shape.motion.deed == "bounce":
        start[1] = rng.uniform(margin, 0.45)
    return start[0], start[1]


def _within(low: float, high: float, rng: np.random.Generator) -> float:
    drawn = rng.random()
    return low + (high - low) * drawn if low < high else (low + high) / 2


def _room(start: tuple[float, float], step: tuple[float, float], diameter: float) -> float:
    """How far a shape can go before it reaches the frame's edge."""
    margin = REACH * diameter
    rooms = [
        ((1 - margin - place) if way > 0 else (place - margin)) / abs(way)
        for place, way in zip(start, step, strict=True)
        if way
    ]
    return max(min(rooms), 0.0)


def _tone(rng: np.random.Generator, colour: Colour) -> tuple[float, float, float]:
    if colour == "white":
        return _rgb(rng.uniform(0, 360), rng.uniform(0, 0.03), rng.uniform(0.96, 1.0))
    return _rgb(HUES[colour] + rng.uniform(-4, 4), rng.uniform(0.88, 1.0), rng.uniform(0.88, 1.0))


def _background(rng: np.random.Generator) -> Background:
    ground: Ground = _pick(rng, ("plain", "plain", "black", "grey", "textured", "textured"))
    hue, saturation, value = rng.uniform(0, 360), rng.uniform(0.08, 0.25), rng.uniform(0.15, 0.55)
    if ground == "black":
        saturation, value = 0.0, rng.uniform(0.02, 0.06)
    if ground == "grey":
        saturation, value = rng.uniform(0, 0.03), rng.uniform(0.35, 0.5)
    rgb = _rgb(hue, saturation, value)
    if ground != "textured":
        return Background(ground=ground, rgb=rgb)
    return Background(
        ground=ground,
        rgb=rgb,
        pattern=_pick(rng, ("stripes", "checks", "clouds")),
        contrast=rng.uniform(0.15, 0.3),
        wave=rng.uniform(0.14, 0.3),
        angle=rng.uniform(0, math.pi),
        seed=int(rng.integers(2**31)),
    )


def _rgb(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]
