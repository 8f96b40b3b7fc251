"""What is said about the world of shapes: captions, questions and answers to train the demo tokenizer on.

Contract: `sentences` enumerates the same lines in the same order every time; nothing is drawn at random. The lines only
fix which words become single pieces: any other text is still encodable, in shorter pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, product

from runtime.prompts import STOP, SYSTEM

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
SIZES = ("", "small ", "large ")
DIRECTIONS = (
    "right",
    "left",
    "up",
    "down",
    "up and to the right",
    "up and to the left",
    "down and to the right",
    "down and to the left",
)
SPEEDS = ("", " slowly", " quickly")
DEEDS = (
    *(f"moving {direction}{speed}" for direction, speed in product(DIRECTIONS, SPEEDS)),
    *(f"{deed}{speed}" for deed, speed in product(("growing", "shrinking", "bouncing"), SPEEDS)),
    "staying still",
)
GROUNDS = ("", " on a plain background", " on a textured background", " on a black background", " on a grey background")
QUESTIONS = (
    "what moves?",
    "what is in the picture?",
    "what is in the video?",
    "what happens in the video?",
    "what colour is the {shape}?",
    "what colour is the shape?",
    "what shape is {colour}?",
    "what shape is moving?",
    "what size is the {shape}?",
    "how many shapes are there?",
    "how does the {shape} move?",
    "which direction does the {shape} move?",
    "which direction does the {colour} shape move?",
    "which shape is moving?",
    "is the {shape} moving?",
    "is there a {colour} {shape}?",
    "does the {shape} move quickly or slowly?",
    "is the {shape} growing or shrinking?",
    "what is the background?",
    "describe the picture.",
    "describe the video.",
)
ANSWERS = (
    *COLOURS,
    *SHAPES,
    *DIRECTIONS,
    "one",
    "two",
    "three",
    "yes",
    "no",
    "small",
    "large",
    "still",
    "slowly",
    "quickly",
    "nothing moves",
    "the {colour} {shape}",
    "the {colour} {shape} moves to the right",
    "the {colour} {shape} moves to the left",
    "the {shape} moves up",
    "the {shape} moves down",
    "the {shape} grows",
    "the {shape} shrinks",
    "the {shape} bounces",
    "the {shape} stays still",
    "there is one shape",
    "there are two shapes",
    "plain",
    "textured",
)


def sentences() -> Iterator[str]:
    """All lines: captions of one and of two shapes, then questions and answers in the model's own conversation form.

    Questions and answers are repeated until each of their words is worth a piece; the system sentence is the same in
    every conversation and may stay in small pieces.
    """
    things = [f"a {size}{colour} {shape}" for size, colour, shape in product(SIZES, COLOURS, SHAPES)]
    grounds = cycle(GROUNDS)
    ones = [f"{thing} {deed}" for thing, deed in product(things, DEEDS)]
    for index, one in enumerate(ones):
        yield one + next(grounds)
        if index % 4 == 0:  # partners far apart in the list differ in size, colour, shape and deed
            yield f"{one} and {ones[(index * 7 + 1301) % len(ones)]}"
    for colour, shape in product(COLOURS, SHAPES):
        for question in QUESTIONS:
            yield from [f"{question.format(colour=colour, shape=shape)} ASSISTANT:"] * 4
        yield from [f"{SYSTEM} USER:"] * 4
        for answer in ANSWERS:
            yield from [f"{answer.format(colour=colour, shape=shape)} {STOP}"] * 6
