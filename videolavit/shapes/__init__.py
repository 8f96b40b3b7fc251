"""The world of shapes: a seeded generator of captioned scenes, their pictures, their motion, questions and answers.

Contract: everything is a pure function of a scene, and a scene of its seed. numpy and the runtime only, no torch.
"""

from videolavit.shapes.clips import MOTION_SIDES, ShapesClip, clip, clips, motion_grid
from videolavit.shapes.drawing import SIDE, render, render_frame
from videolavit.shapes.language import caption, picture_caption, picture_questions, plain_caption, questions
from videolavit.shapes.scene import (
    COLOURS,
    DIRECTIONS,
    FRAMES,
    KINDS,
    SPLITS,
    Background,
    Motion,
    Scene,
    Shape,
    is_held_out,
    left_to_right,
    sample_scene,
)

__all__ = [
    "COLOURS",
    "DIRECTIONS",
    "FRAMES",
    "KINDS",
    "MOTION_SIDES",
    "SIDE",
    "SPLITS",
    "Background",
    "Motion",
    "Scene",
    "Shape",
    "ShapesClip",
    "caption",
    "clip",
    "clips",
    "is_held_out",
    "left_to_right",
    "motion_grid",
    "picture_caption",
    "picture_questions",
    "plain_caption",
    "questions",
    "render",
    "render_frame",
    "sample_scene",
]
