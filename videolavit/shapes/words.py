"""The words of the world of shapes: what the demo model's text tokenizer is trained on.

Contract: `corpus` gives the same lines every time and depends on nothing that is drawn by lot. Every word that
`videolavit.shapes.language` says is listed here, so that each becomes one piece; so is every word of the conversation
around a question, whose system sentence is otherwise most of a prompt. Any other text is still encodable, in letters.
"""

from __future__ import annotations

import string
from collections.abc import Iterator

from runtime.prompts import STOP, SYSTEM

_SPOKEN = """
a an and are at background big bigger black blue bottom bounces bouncing by circle clip color colour colours
count cyan dark describe diagonally direction do does doing down downward downwards fast from getting go
goes going gray green grey growing grows happens has have heading how image in into is it its kind large
larger left leftward leftwards little lower many motion move moves moving no not nothing object of on one or
orange pace picture plain purple quickly rapidly red rest right rightward rightwards scene see shape shapes
shrinking shrinks sits sitting size slides sliding slow slowly small smaller speed square standing star
stationary staying stays still textured that the there they this three to top toward towards travelling
travels triangle two up upper upward upwards video way what where which while white with yellow yes you A An
The There
"""
SPOKEN = tuple(_SPOKEN.split())
# Words that a question may begin with: a newline stands before them, no space.
FIRST = ("what", "which", "where", "how", "is", "does", "in", "count", "describe")
JOINED = ("up-left", "up-right", "down-left", "down-right")
MARKS = ".,?:"


def corpus() -> Iterator[str]:
    """Lines to train the tokenizer on; how often a word is repeated decides how much a piece is worth."""
    conversation = f"{SYSTEM} USER: ASSISTANT: {STOP}".split()
    for word in dict.fromkeys((*SPOKEN, *(word.strip(MARKS) for word in conversation))):
        yield from [word] * 500
        yield from (word + mark for mark in MARKS)  # a part that comes in one line only never becomes a piece
    for word in (*FIRST, "left", "right"):
        yield from [mark + word for mark in MARKS + "-"] * 40
    for word in (*JOINED, *conversation):
        yield from [word] * 20
    yield from string.ascii_letters + string.digits
