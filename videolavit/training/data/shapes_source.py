"""The world of shapes as a source: endless, drawn by lot, nothing on disk.

Contract: item i depends on (seed, split, clips, i) alone. Motion is read from pictures of 128 or 256 pixels, drawn by
lot as well, so that the model meets both densities of macroblocks. Captions and answers name two shapes from left to
right. In any order, p(motion | caption, picture) hardly learns which of them goes which way, as it would have to find
each by its colour; so the place in the caption tells the place in the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from runtime.errors import UsageError
from runtime.geometry import Geometry
from videolavit.shapes import (
    FRAMES,
    MOTION_SIDES,
    SPLITS,
    Scene,
    caption,
    left_to_right,
    picture_caption,
    picture_questions,
    questions,
    render_frame,
    sample_scene,
)
from videolavit.shapes.clips import clips
from videolavit.shapes.mistakes import altered, exchanged
from videolavit.training.data.examples import ClipExample, Negative, PictureExample, Question

WORDINGS = 4  # captions drawn per item; equal ones count once
# Wordings of what is easily mistaken for a scene: most where a model learns least by itself.
EXCHANGED = {"motion": 6, "colour": 2, "kind": 2}
ALTERED = 6
PLACED = 4  # of each of the two topics about places


class ShapesSource:
    """Scenes of the world of shapes.

    Args:
        geometry: of the model; its clips must have as many frames as the scenes'.
        split: "train" or "held-out".
        size: number of items.
        seed: 0 or more.
        clips: clips per item.
        shapes: in every scene; None draws 1 or 2.

    Raises:
        UsageError: an argument is not one of these.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        split: str = "train",
        size: int = 1_000_000,
        seed: int = 0,
        clips: int = 1,
        shapes: int | None = None,
    ) -> None:
        if split not in SPLITS:
            raise UsageError(f"split {split!r}: the world of shapes has {' and '.join(SPLITS)}")
        if geometry.frames != FRAMES:
            raise UsageError(f"the world of shapes has clips of {FRAMES} frames, this model's have {geometry.frames}")
        self.split, self.size, self.seed, self.clips, self.shapes = split, size, seed, clips, shapes

    def __len__(self) -> int:
        return self.size

    def identity(self) -> Mapping[str, object]:
        return {
            "source": "shapes",
            "split": self.split,
            "seed": self.seed,
            "clips": self.clips,
            "shapes": self.shapes,
        }

    def moves(self, index: int) -> bool:
        return True

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """Scene `index`, and the generator of everything else that is drawn for it."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index])
        scene = sample_scene(int(rng.integers(2**62)), split=self.split, clips=self.clips, shapes=self.shapes)
        return scene, rng

    def picture(self, index: int) -> PictureExample:
        scene, rng = self.scene(index)
        told = left_to_right(scene)
        return PictureExample(
            image=render_frame(scene, 0),
            captions=_wordings(picture_caption, told, rng),
            questions=tuple(Question(*asked) for asked in picture_questions(told, rng)),
            negatives=_negatives(picture_caption, scene, rng),
        )

    def clip(self, index: int) -> ClipExample:
        scene, rng = self.scene(index)
        told = left_to_right(scene)
        parts = clips(scene, int(rng.choice(MOTION_SIDES)))
        return ClipExample(
            frames=np.concatenate([part.frames for part in parts]),
            grid=np.concatenate([part.grid for part in parts]),
            clip_count=len(parts),
            captions=_wordings(caption, told, rng),
            questions=tuple(Question(*asked) for asked in questions(told, rng)),
            negatives=_negatives(caption, scene, rng),
        )


Say = Callable[[Scene, np.random.Generator], str]


def _negatives(say: Say, scene: Scene, rng: np.random.Generator) -> tuple[Negative, ...]:
    """Captions beside those of mistaken scenes in the same words, where the latter say anything else.

    They name two shapes in any order, but for two topics whose captions name them from left to right: `ways`, where the
    two motions are exchanged, and `order`, where the wrong one names the right one first.
    """
    told = left_to_right(scene)
    wrongs = [(topic, scene, wrong) for topic, wrong in exchanged(scene).items() for _ in range(EXCHANGED[topic])]
    changes = [altered(scene, rng) for _ in range(ALTERED)]
    wrongs += [(change[0], scene, change[1]) for change in changes if change is not None]
    ways = exchanged(told).get("motion")
    if ways is not None:
        wrongs += [("ways", told, ways)] * PLACED
    wrongs += [("order", told, replace(told, shapes=told.shapes[::-1]))] * PLACED
    seeds = rng.integers(2**62, size=len(wrongs)).tolist()
    pairs = [
        Negative(say(right, np.random.default_rng(seed)), say(wrong, np.random.default_rng(seed)), topic)
        for (topic, right, wrong), seed in zip(wrongs, seeds, strict=True)
    ]
    return tuple(dict.fromkeys(pair for pair in pairs if pair.caption != pair.wrong))


def _wordings(say: Say, scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(dict.fromkeys(say(scene, rng) for _ in range(WORDINGS)))
