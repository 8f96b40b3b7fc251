"""Parts that look at clips of one and of two shapes: from prompts, from a picture, and of the world itself."""

from __future__ import annotations

import numpy as np

from runtime.requests import VideoRequest
from videolavit.evaluation.context import Context
from videolavit.evaluation.judge import look
from videolavit.evaluation.record import Measure, Part, Record
from videolavit.evaluation.verdicts import check_one, check_two, described, said_size, said_speed, words_of
from videolavit.shapes import caption, render, render_frame, sample_scene


class GroundTruth(Part):
    """The judge on clips that are right by making: what it gets wrong here, no model could get right."""

    name = "judge"
    title = "Judge on ground truth"
    about = (
        "Rendered held-out scenes, every other one of two shapes, written as mp4 and judged like generated clips. "
        "What the judge gets wrong here is its own fault."
    )
    measures = (
        Measure(key="colour", label="colour", target=0.99),
        Measure(key="kind", label="kind", target=0.99),
        Measure(key="direction", label="direction", target=0.99),
        Measure(key="size", label="size"),
        Measure(key="speed", label="speed"),
        Measure(key="count", label="number of shapes"),
        Measure(key="both", label="two shapes, all of both right"),
    )

    def run(self, context: Context, index: int) -> list[Record]:
        number = context.number(self.name, index)
        scene = sample_scene(number, split="held-out", shapes=1 + index % 2)
        frames = context.recorded(render(scene, context.geometry.video_size[1]), context.geometry.fps)
        seen = look(frames)
        first = scene.shapes[0]
        if len(scene.shapes) == 1:
            checks = check_one(first, seen, first.size, first.motion.speed)
        else:
            checks = check_two(scene, seen)
        return [
            Record(
                part=self.name,
                index=index,
                seed=number,
                prompt=f"scene {number}, {len(scene.shapes)} shapes",
                expected=described(scene),
                seen=words_of(seen),
                checks=checks,
            )
        ]


class Prompts(Part):
    """Text to video, one shape."""

    name = "prompts"
    title = "One shape from a prompt"
    about = (
        "Captions of held-out scenes of one shape, in the varied words of training. Size and speed are checked where "
        "the caption names them."
    )
    measures = (
        Measure(key="colour", label="colour", target=0.97),
        Measure(key="kind", label="kind", target=0.93),
        Measure(key="direction", label="direction", target=0.95),
        Measure(key="all", label="colour, kind and direction"),
        Measure(key="speed", label="speed, where said"),
        Measure(key="size", label="size, where said"),
        Measure(key="count", label="number of shapes"),
    )

    def run(self, context: Context, index: int) -> list[Record]:
        number = context.number(self.name, index)
        scene = sample_scene(number, split="held-out", shapes=1)
        prompt = caption(scene, np.random.default_rng(number))
        frames, problem = context.film(VideoRequest(prompt=prompt), number)
        seen = look(frames)
        return [
            Record(
                part=self.name,
                index=index,
                seed=number,
                prompt=prompt,
                expected=described(scene),
                seen=problem or words_of(seen),
                checks=check_one(scene.shapes[0], seen, said_size(prompt), said_speed(prompt)),
                strips=context.strips(index, film=frames),
            )
        ]


class TwoShapes(Part):
    """Text to video, two shapes."""

    name = "two-shapes"
    title = "Two shapes from a prompt"
    about = (
        "Captions of held-out scenes of two shapes. What is seen is matched to what was described by colour; each line "
        "counts clips in which it holds for both shapes."
    )
    measures = (
        Measure(key="both", label="colour, kind and direction", target=0.80),
        Measure(key="colour", label="colour"),
        Measure(key="kind", label="kind"),
        Measure(key="direction", label="direction"),
        Measure(key="count", label="number of shapes"),
    )

    def run(self, context: Context, index: int) -> list[Record]:
        number = context.number(self.name, index)
        scene = sample_scene(number, split="held-out", shapes=2)
        prompt = caption(scene, np.random.default_rng(number))
        frames, problem = context.film(VideoRequest(prompt=prompt), number)
        seen = look(frames)
        return [
            Record(
                part=self.name,
                index=index,
                seed=number,
                prompt=prompt,
                expected=described(scene),
                seen=problem or words_of(seen),
                checks=check_two(scene, seen),
                strips=context.strips(index, film=frames),
            )
        ]


class ImageToVideo(Part):
    """A picture and a caption to video."""

    name = "image-to-video"
    title = "A picture set in motion"
    about = "The first frame of a held-out scene of one shape, with its caption; what the clip shows must move as said."
    measures = (
        Measure(key="direction", label="direction", target=0.95),
        Measure(key="colour", label="colour kept"),
        Measure(key="kind", label="kind kept"),
        Measure(key="count", label="number of shapes"),
    )

    def run(self, context: Context, index: int) -> list[Record]:
        number = context.number(self.name, index)
        scene = sample_scene(number, split="held-out", shapes=1)
        prompt = caption(scene, np.random.default_rng(number))
        picture = render_frame(scene, 0, context.geometry.video_size[1])
        frames, problem = context.film(VideoRequest(prompt=prompt, image=picture), number)
        seen = look(frames)
        return [
            Record(
                part=self.name,
                index=index,
                seed=number,
                prompt=prompt,
                expected=described(scene),
                seen=problem or words_of(seen),
                checks=check_one(scene.shapes[0], seen),
                strips=context.strips(index, film=frames),
            )
        ]
