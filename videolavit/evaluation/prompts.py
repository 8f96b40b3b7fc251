"""Parts that look at clips of one and of two shapes: from prompts, from a picture, and of the world itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from runtime.requests import VideoRequest
from videolavit.evaluation.context import Context, described_scene
from videolavit.evaluation.judge import Seen, look
from videolavit.evaluation.record import Measure, Part, Record
from videolavit.evaluation.verdicts import check_one, check_two, described, said_size, said_speed, words_of
from videolavit.shapes import Scene, render, render_frame, sample_scene


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
        first, *others = scene.shapes
        checks = check_two(scene, seen) if others else check_one(first, seen, first.size, first.motion.speed)
        return [
            Record(
                part=self.name,
                index=index,
                seed=number,
                prompt=f"scene {number} of {'two shapes' if others else 'one shape'}",
                expected=described(scene),
                seen=words_of(seen),
                checks=checks,
            )
        ]


class Captioned(Part):
    """Clips made from the captions of held-out scenes.

    Attributes:
        shapes: in a scene.
    """

    shapes: ClassVar[int] = 1

    def request(self, context: Context, scene: Scene, prompt: str) -> VideoRequest:
        """What the model is asked for."""
        return VideoRequest(prompt=prompt)

    @abstractmethod
    def checks(self, scene: Scene, prompt: str, seen: Sequence[Seen]) -> dict[str, bool]:
        """Checks of what is seen in the clip."""

    def run(self, context: Context, index: int) -> list[Record]:
        number = context.number(self.name, index)
        scene, prompt = described_scene(number, self.shapes)
        frames, problem = context.film(self.request(context, scene, prompt), number)
        seen = look(frames)
        return [
            Record(
                part=self.name,
                index=index,
                seed=number,
                prompt=prompt,
                expected=described(scene),
                seen=problem or words_of(seen),
                checks=self.checks(scene, prompt, seen),
                strips=context.strips(index, film=frames),
            )
        ]


class Prompts(Captioned):
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

    def checks(self, scene: Scene, prompt: str, seen: Sequence[Seen]) -> dict[str, bool]:
        return check_one(scene.shapes[0], seen, said_size(prompt), said_speed(prompt))


class TwoShapes(Captioned):
    """Text to video, two shapes."""

    name = "two-shapes"
    title = "Two shapes from a prompt"
    shapes = 2
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

    def checks(self, scene: Scene, prompt: str, seen: Sequence[Seen]) -> dict[str, bool]:
        return check_two(scene, seen)


class ImageToVideo(Captioned):
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

    def request(self, context: Context, scene: Scene, prompt: str) -> VideoRequest:
        return VideoRequest(prompt=prompt, image=render_frame(scene, 0, context.geometry.video_size[1]))

    def checks(self, scene: Scene, prompt: str, seen: Sequence[Seen]) -> dict[str, bool]:
        return check_one(scene.shapes[0], seen)
