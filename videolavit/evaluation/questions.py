"""The part that asks questions about clips of held-out scenes, and the judging of answers."""

from __future__ import annotations

import re

import numpy as np

from runtime.media import load_media
from runtime.noise import Noise
from runtime.requests import AnswerRequest
from videolavit.evaluation.context import Context
from videolavit.evaluation.record import Measure, Part, Record
from videolavit.shapes import MOTION_SIDES, questions, render, sample_scene

ASKED = ("colour", "kind", "direction", "count")  # the topics with a target


class Questions(Part):
    """A video and a question to an answer."""

    name = "questions"
    title = "Questions about a clip"
    about = (
        "Rendered held-out scenes of one and two shapes as mp4 files, read like any user's video, every other one with "
        "sides of 128 and of 256 pixels. An answer is right if it says the same as the expected one: case, articles, "
        "punctuation and the order of shapes do not count."
    )
    measures = (
        *(Measure(key=topic, label=topic, target=0.97) for topic in ASKED),
        *(
            Measure(key=topic, label=topic)
            for topic in ("size", "speed", "moving", "deed", "existence", "background", "description")
        ),
        Measure(key="answer", label="all questions"),
    )

    def run(self, context: Context, index: int) -> list[Record]:
        number = context.number(self.name, index)
        scene = sample_scene(number, split="held-out")
        frames = render(scene, MOTION_SIDES[index % len(MOTION_SIDES)])
        path = context.video("asked", frames, context.geometry.fps)
        seen = load_media(str(path), context.geometry, context.pipeline.manifest.defaults.max_clips)
        records = []
        for question, expected, topic in questions(scene, np.random.default_rng(number)):
            request = AnswerRequest(question=question, pictures=seen.pictures, motions=seen.motions)
            answer = context.pipeline.answer(request, Noise(number)).text
            right = same_answer(answer, expected)
            records.append(
                Record(
                    part=self.name,
                    index=index,
                    seed=number,
                    prompt=question,
                    expected=expected,
                    seen=answer,
                    checks={topic: right, "answer": right},
                )
            )
        return records


def same_answer(answer: str, expected: str) -> bool:
    """Whether both say the same."""
    return _said(answer) == _said(expected)


def _said(text: str) -> list[str]:
    """What is said of each shape, in alphabetical order, without articles and punctuation."""
    plain = " ".join(re.findall(r"[a-z0-9]+", text.lower()))
    parts = re.split(r" and (?=(?:an?|the) (?!(?:right|left)\b))", plain)
    return sorted(re.sub(r"\b(?:an?|the) ", "", part) for part in parts)
