"""Scenes that are easily mistaken for another one: their captions are wrong of it, in nearly the same words.

Contract: a mistaken scene is only talked about, never drawn; places stay those of the true one. No shape of it is a
combination that is held out from training, so that a model that learns to tell right from wrong does not learn that
held-out combinations are wrong.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from videolavit.shapes.scene import COLOURS, DIRECTIONS, KINDS, Scene, Shape, Speed, is_held_out


def exchanged(scene: Scene) -> dict[str, Scene]:
    """By name, `scene` with the motion, colour or kind of its two shapes exchanged; nothing for one shape.

    Each says the same of the scene as a whole: only what belongs to which shape tells them apart. What would be true
    of `scene` where a caption leaves sizes and speeds unsaid is left out.
    """
    if len(scene.shapes) != 2:
        return {}
    one, other = scene.shapes
    pairs = {
        "motion": (replace(one, motion=other.motion), replace(other, motion=one.motion)),
        "colour": (replace(one, colour=other.colour), replace(other, colour=one.colour)),
        "kind": (replace(one, kind=other.kind), replace(other, kind=one.kind)),
    }
    return {
        name: replace(scene, shapes=shapes)
        for name, shapes in pairs.items()
        if _trained(shapes) and _said(shapes) != _said((one, other))
    }


def altered(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene] | None:
    """The name of what was altered of one shape, and `scene` with it.

    Its colour, kind or direction is drawn anew, by chance the same, or its size or speed is reversed.

    None for a combination that is held out, and where two shapes would have one colour, which tells them apart. A shape
    that is neither small nor large, slow nor quick stays so: a caption that leaves the class unsaid is true of any.
    """
    at = int(rng.integers(len(scene.shapes)))
    shape = scene.shapes[at]
    motion = shape.motion
    options = [
        ("colour", replace(shape, colour=COLOURS[int(rng.integers(len(COLOURS)))])),
        ("kind", replace(shape, kind=KINDS[int(rng.integers(len(KINDS)))])),
    ]
    if motion.direction is not None:
        turned = DIRECTIONS[int(rng.integers(len(DIRECTIONS)))]
        options.append(("direction", replace(shape, motion=replace(motion, direction=turned))))
    if shape.size is not None:
        options.append(("size", replace(shape, size="small" if shape.size == "large" else "large")))
    if motion.speed is not None:
        other: Speed = "slowly" if motion.speed == "quickly" else "quickly"
        options.append(("speed", replace(shape, motion=replace(motion, speed=other))))
    name, changed = options[int(rng.integers(len(options)))]
    shapes = (*scene.shapes[:at], changed, *scene.shapes[at + 1 :])
    if len({shape.colour for shape in shapes}) < len(shapes) or not _trained(shapes):
        return None
    return name, replace(scene, shapes=shapes)


def _said(shapes: tuple[Shape, ...]) -> list[str]:
    """What every caption says of `shapes`, in an order of its own."""
    return sorted(f"{shape.colour} {shape.kind} {shape.motion.deed} {shape.motion.direction}" for shape in shapes)


def _trained(shapes: tuple[Shape, ...]) -> bool:
    return not any(is_held_out(shape.colour, shape.kind, shape.motion.direction) for shape in shapes)
