"""Scenes that are easily mistaken for another one: their captions are wrong of it, in nearly the same words.

Contract: a mistaken scene is only talked about, never drawn; places stay those of the true one. No shape of it is a
combination that is held out from training, so that a model that learns to tell right from wrong does not learn that
held-out combinations are wrong.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from videolavit.shapes.scene import COLOURS, DIRECTIONS, KINDS, Scene, Shape, is_held_out


def exchanged(scene: Scene) -> dict[str, Scene]:
    """By name, `scene` with the motion, colour or kind of its two shapes exchanged; nothing for one shape.

    Each says the same of the scene as a whole: only what belongs to which shape tells them apart.
    """
    if len(scene.shapes) != 2:
        return {}
    one, other = scene.shapes
    pairs = {
        "motion": (replace(one, motion=other.motion), replace(other, motion=one.motion)),
        "colour": (replace(one, colour=other.colour), replace(other, colour=one.colour)),
        "kind": (replace(one, kind=other.kind), replace(other, kind=one.kind)),
    }
    return {name: replace(scene, shapes=shapes) for name, shapes in pairs.items() if _trained(shapes)}


def altered(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """`scene` with a colour, kind or direction of one shape drawn anew, by chance the same.

    None for a combination that is held out, and where two shapes would have one colour, which tells them apart.
    """
    at = int(rng.integers(len(scene.shapes)))
    shape = scene.shapes[at]
    turned = replace(shape.motion, direction=DIRECTIONS[int(rng.integers(len(DIRECTIONS)))])
    options = (
        replace(shape, colour=COLOURS[int(rng.integers(len(COLOURS)))]),
        replace(shape, kind=KINDS[int(rng.integers(len(KINDS)))]),
        replace(shape, motion=turned),
    )
    changed = options[int(rng.integers(3 if shape.motion.direction else 2))]
    shapes = (*scene.shapes[:at], changed, *scene.shapes[at + 1 :])
    if len({shape.colour for shape in shapes}) < len(shapes) or not _trained(shapes):
        return None
    return replace(scene, shapes=shapes)


def _trained(shapes: tuple[Shape, ...]) -> bool:
    return not any(is_held_out(shape.colour, shape.kind, shape.motion.direction) for shape in shapes)
