"""What is said about scenes: captions in varied words, questions and their answers.

Contract: everything said is true of the scene, and answers come from a closed set of short forms. Words are drawn from
the generator that is passed in, the plainest wording about half of the time. Two shapes of a scene are told apart by
their colours, which always differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from videolavit.shapes.scene import COLOURS, KINDS, Motion, Scene, Shape

Question = tuple[str, str, str]  # question, answer, topic

PLAIN = 0.5  # chance of the plainest wording
WAYS: dict[str, tuple[str, ...]] = {
    "right": ("to the right", "rightwards", "from left to right"),
    "left": ("to the left", "leftwards", "from right to left"),
    "up": ("upwards", "upward", "to the top"),
    "down": ("downwards", "downward", "to the bottom"),
}
for _vertical in ("up", "down"):
    for _side in ("right", "left"):
        _corner = "upper" if _vertical == "up" else "lower"
        _height = "top" if _vertical == "up" else "bottom"
        WAYS[f"{_vertical} and to the {_side}"] = (
            f"{_vertical} and {_side}",
            f"{_vertical}-{_side}",
            f"{_vertical} {_side}",
            f"{_vertical}ward and to the {_side}",
            f"diagonally {_vertical} and to the {_side}",
            f"diagonally {_vertical} and {_side}",
            f"diagonally {_vertical}-{_side}",
            f"diagonally to the {_height} {_side}",
            f"to the {_corner} {_side}",
            f"towards the {_height} {_side}",
            f"{_side} and {_vertical}",
        )
SLOWLY, QUICKLY = ("slowly", "slowly", "at a slow pace"), ("quickly", "quickly", "fast", "rapidly")
STILL = (
    "staying still",
    "standing still",
    "that stays still",
    "not moving",
    "that does not move",
    "at rest",
    "sitting still",
)
GROWING = ("growing", "that grows", "getting bigger", "getting larger")
SHRINKING = ("shrinking", "that shrinks", "getting smaller")
BOUNCING = ("bouncing", "that bounces", "bouncing up and down")
MOVING = ("moving", "that moves", "going", "travelling", "sliding", "which moves")
NUMBERS = ("one", "two")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence about what is in the scene and what it does."""
    things = [f"{_thing(shape, rng)} {_deed(shape.motion, rng)}" for shape in scene.shapes]
    return _dressed(_joined(things, rng) + _ground(scene, rng), rng)


def picture_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence about what is in the scene, with no word of motion."""
    return _dressed(_joined([_thing(shape, rng) for shape in scene.shapes], rng) + _ground(scene, rng), rng)


def plain_caption(scene: Scene) -> str:
    """The shortest full caption: colour, kind and deed of each shape."""
    return " and ".join(f"{_a(_name(shape))} {_plain_deed(shape.motion)}" for shape in scene.shapes)


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions about the scene as a video."""
    asked = picture_questions(scene, rng)[:-1]
    wording: tuple[str, ...]
    moving = [shape for shape in scene.shapes if shape.motion.deed != "still"]
    for shape in scene.shapes:
        name, motion = _reference(shape, scene, rng), shape.motion
        if motion.deed in ("move", "still"):
            answer = motion.direction or "it does not move"
            wording = (
                "which direction does {} move?",
                "which way does {} move?",
                "where does {} go?",
                "in which direction is {} moving?",
            )
            asked.append((_worded(wording, rng).format(name), answer, "direction"))
        if motion.deed == "move" and motion.speed is not None:
            wording = ("does {} move slowly or quickly?", "how fast does {} move?", "is {} slow or fast?")
            asked.append((_worded(wording, rng).format(name), motion.speed, "speed"))
        if motion.deed in ("grow", "shrink"):
            asked.append(
                (f"is {name} growing or shrinking?", "growing" if motion.deed == "grow" else "shrinking", "deed")
            )
        if motion.deed != "bounce" or rng.random() < 0.5:
            asked.append((f"is {name} bouncing?", "yes" if motion.deed == "bounce" else "no", "deed"))
        if motion.deed in ("move", "still"):
            asked.append((f"is {name} moving?", "yes" if motion.deed == "move" else "no", "moving"))
        wording = ("what does {} do?", "what is {} doing?")
        asked.append((_worded(wording, rng).format(name), _plain_deed(motion), "deed"))
    what = " and ".join(f"the {_name(shape)}" for shape in moving) or "nothing"
    asked.append((_worded(("what moves?", "what is moving?", "which shape is moving?"), rng), what, "moving"))
    asked.append(
        (
            _worded(("describe the video.", "what happens in the video?", "what is in the video?"), rng),
            plain_caption(scene),
            "description",
        )
    )
    return asked


def picture_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions about the first frame of the scene; the last one asks for a description."""
    alone = len(scene.shapes) == 1
    asked: list[Question] = []
    wording: tuple[str, ...]
    for shape in scene.shapes:
        if alone or sum(other.kind == shape.kind for other in scene.shapes) == 1:
            name = "the shape" if alone and rng.random() < 0.5 else f"the {shape.kind}"
            wording = ("what colour is {}?", "what color is {}?", "which colour does {} have?")
            asked.append((_worded(wording, rng).format(name), shape.colour, "colour"))
        if alone and rng.random() < 0.5:
            wording = ("what shape is it?", "what shape is this?", "which shape is there?", "what kind of shape is it?")
            asked.append((_worded(wording, rng), shape.kind, "kind"))
        else:
            wording = (
                "what shape is {0}?",
                "which shape is {0}?",
                "what is the {0} shape?",
                "what kind of shape is the {0} one?",
            )
            asked.append((_worded(wording, rng).format(shape.colour), shape.kind, "kind"))
        if shape.size is not None:
            asked.append((f"is {_reference(shape, scene, rng)} small or large?", shape.size, "size"))
        asked.append((f"is there {_a(_name(shape))}?", "yes", "existence"))
    there = {(shape.colour, shape.kind) for shape in scene.shapes}
    absent = [(c, k) for c in COLOURS for k in KINDS if (c, k) not in there]
    colour, kind = absent[int(rng.integers(len(absent)))]
    asked.append((f"is there {_a(f'{colour} {kind}')}?", "no", "existence"))
    wording = ("how many shapes are there?", "how many shapes do you see?", "how many shapes?", "count the shapes.")
    asked.append((_worded(wording, rng), NUMBERS[len(scene.shapes) - 1], "count"))
    ground = "textured" if scene.background.ground == "textured" else "plain"
    asked.append(("is the background plain or textured?", ground, "background"))
    what = " and ".join(_a(_name(shape)) for shape in scene.shapes)
    wording = ("describe the picture.", "what is in the picture?", "what do you see?")
    asked.append((_worded(wording, rng), what, "description"))
    return asked


def _a(noun: str) -> str:
    """`noun` with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _name(shape: Shape) -> str:
    return f"{shape.colour} {shape.kind}"


def _reference(shape: Shape, scene: Scene, rng: np.random.Generator) -> str:
    """Words that mean `shape` and no other one of the scene."""
    names = [f"the {_name(shape)}", f"the {shape.colour} shape", f"the {shape.colour} one"]
    if sum(other.kind == shape.kind for other in scene.shapes) == 1:
        names.append(f"the {shape.kind}")
    if len(scene.shapes) == 1:
        names += ["the shape", "it"]
    return names[int(rng.integers(len(names)))]


def _thing(shape: Shape, rng: np.random.Generator) -> str:
    if shape.size is None or rng.random() < 0.35:
        return _a(_name(shape))
    size = {"small": _worded(("small", "little"), rng), "large": _worded(("large", "big"), rng)}[shape.size]
    return f"a {size} {_name(shape)}"


def _plain_deed(motion: Motion) -> str:
    if motion.deed == "move":
        return f"moving {motion.direction}"
    return {"still": "staying still", "grow": "growing", "shrink": "shrinking", "bounce": "bouncing"}[motion.deed]


def _deed(motion: Motion, rng: np.random.Generator) -> str:
    if motion.deed == "still":
        return _worded(STILL, rng)
    if motion.direction is None:
        words = {"grow": GROWING, "shrink": SHRINKING, "bounce": BOUNCING}[motion.deed]
        verb, way = _worded(words, rng), ""
    else:
        verb, way = _worded(MOVING, rng), " " + _worded((motion.direction, *WAYS[motion.direction]), rng)
    if motion.speed is None or rng.random() < 0.3:
        return verb + way
    speed = _worded(SLOWLY if motion.speed == "slowly" else QUICKLY, rng)
    if speed.endswith("ly") and verb.endswith("ing") and rng.random() < 0.3:
        return f"{speed} {verb}{way}"
    return f"{verb}{way} {speed}"


def _ground(scene: Scene, rng: np.random.Generator) -> str:
    if rng.random() < 0.7:
        return ""
    ground = scene.background.ground
    words = {
        "plain": ("plain",),
        "black": ("black", "dark", "plain"),
        "grey": ("grey", "gray", "plain"),
        "textured": ("textured",),
    }
    return f" on a {_worded(words[ground], rng)} background"


def _joined(things: Sequence[str], rng: np.random.Generator) -> str:
    return _worded((" and ", ", ", " while ", " with "), rng).join(things)


def _dressed(sentence: str, rng: np.random.Generator) -> str:
    """`sentence`, now and then with a capital letter, a full stop or an opening."""
    if rng.random() < PLAIN + 0.2:
        return sentence
    opening = _worded(("", "a video of ", "there is "), rng) if rng.random() < 0.3 else ""
    dressed = opening + sentence
    if rng.random() < 0.5:
        dressed = dressed[0].upper() + dressed[1:]
    return dressed + ("." if rng.random() < 0.5 else "")


def _worded(words: Sequence[str], rng: np.random.Generator) -> str:
    """The first of `words` half of the time, else any."""
    return words[0] if rng.random() < PLAIN else words[int(rng.integers(len(words)))]
