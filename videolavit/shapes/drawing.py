"""Pictures of scenes.

Contract: pictures are uint8 RGB with smooth edges, of any side; the same scene gives the same picture. A shape and the
soft pattern on it move as one, which gives a video encoder something to follow.
"""

from __future__ import annotations

import math

import numpy as np

from videolavit.shapes.scene import Background, Kind, Scene, Shape

SIDE = 128
_SHADES = 3  # waves in the pattern on a shape
_SHADE_DEPTH = 0.05  # brightness each takes at most, a share


def render(scene: Scene, side: int = SIDE) -> np.ndarray:
    """All frames of `scene`: [T, side, side, 3] uint8."""
    ground = _ground(scene.background, side)
    return np.stack([_frame(scene, index, ground) for index in range(scene.frames)])


def render_frame(scene: Scene, index: int, side: int = SIDE) -> np.ndarray:
    """Frame `index` of `scene`: [side, side, 3] uint8."""
    return _frame(scene, index, _ground(scene.background, side))


def _frame(scene: Scene, index: int, ground: np.ndarray) -> np.ndarray:
    canvas = ground.copy()  # [side, side, 3] float32, 0..1
    for shape in scene.shapes:
        _draw(canvas, shape, index)
    return np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)


def _draw(canvas: np.ndarray, shape: Shape, index: int) -> None:
    """Put `shape`, as it is in frame `index`, on `canvas` [side, side, 3]."""
    side = len(canvas)
    radius = shape.diameter_at(index) / 2
    (x, y), reach = shape.centre_at(index), 1.25 * radius
    left, right = (min(max(round(edge * side), 0), side) for edge in (x - reach - 2 / side, x + reach + 2 / side))
    top, bottom = (min(max(round(edge * side), 0), side) for edge in (y - reach - 2 / side, y + reach + 2 / side))
    if left == right or top == bottom:
        return
    # Coordinates about the centre, in radii.
    across = (((np.arange(left, right, dtype=np.float32) + 0.5) / side - x) / radius)[None, :]  # [1, w]
    down = (((np.arange(top, bottom, dtype=np.float32) + 0.5) / side - y) / radius)[:, None]  # [h, 1]
    outside = signed_distance(shape.kind, across, down) * radius * side  # pixels
    cover = np.clip(0.5 - outside, 0, 1)[..., None]  # [h, w, 1]
    paint = _pattern_on(shape, across, down)[..., None] * np.asarray(shape.rgb, np.float32)
    part = canvas[top:bottom, left:right]
    part += cover * (paint - part)


def signed_distance(kind: Kind, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline of an upright shape, negative inside; all in radii about its centre, y downwards."""
    if kind == "circle":
        return np.hypot(x, y) - 1.0
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86
    if kind == "triangle":  # equilateral, point up; its centroid a little below the middle of its height
        low = y - 0.575 - 0.1
        slope = np.abs(x) * (math.sqrt(3) / 2) - (y - 0.1) * 0.5 - 0.575
        return np.maximum(low, slope)
    # A star is ten times the same half point: fold the plane into it.
    angle = np.arctan2(x, -y)
    folded = np.abs(np.mod(angle + math.pi / 5, 2 * math.pi / 5) - math.pi / 5)
    r = np.hypot(x, y)
    along, aside = r * np.cos(folded), r * np.sin(folded)
    tip, notch = 1.2, 0.52
    at = (notch * math.cos(math.pi / 5), notch * math.sin(math.pi / 5))
    edge = math.hypot(tip - at[0], at[1])
    return ((along - tip) * at[1] + aside * (tip - at[0])) / edge


def _pattern_on(shape: Shape, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Brightness [h, w] of a shape's surface, at most 1."""
    rng = np.random.default_rng(shape.shade)
    light = np.ones(np.broadcast_shapes(x.shape, y.shape), np.float32)
    for _ in range(_SHADES):
        turn, phase, wave = rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi), rng.uniform(0.6, 1.6)
        kx, ky = 2 * math.pi * math.cos(turn) / wave, 2 * math.pi * math.sin(turn) / wave
        light -= np.float32(_SHADE_DEPTH) * (0.5 + 0.5 * np.sin(kx * x + ky * y + phase)).astype(np.float32)
    return light


def _ground(background: Background, side: int) -> np.ndarray:
    """[side, side, 3] float32, 0..1."""
    at = (np.arange(side, dtype=np.float32) + 0.5) / side
    x, y = at[None, :], at[:, None]
    rgb = np.asarray(background.rgb, np.float32)
    return np.ascontiguousarray(np.clip((1 + background.contrast * _texture(background, x, y))[..., None] * rgb, 0, 1))


def _texture(background: Background, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[side, side] float32, -1..1."""
    turn = background.angle
    along, aside = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    k = 2 * math.pi / background.wave
    if background.pattern == "stripes":
        return np.sin(k * along).astype(np.float32)
    if background.pattern == "checks":
        return (np.sin(k * along) * np.sin(k * aside)).astype(np.float32)
    if background.pattern == "clouds":
        rng = np.random.default_rng(background.seed)
        waves = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
        for _ in range(4):
            turn, phase, share = rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi), rng.uniform(0.6, 1.4)
            waves += np.sin(share * k * (x * math.cos(turn) + y * math.sin(turn)) + phase).astype(np.float32)
        return waves / 4
    return np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
