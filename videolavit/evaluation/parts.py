"""The parts of an evaluation, in the order of the report."""

from __future__ import annotations

from videolavit.evaluation.long import Long
from videolavit.evaluation.prompts import GroundTruth, ImageToVideo, Prompts, TwoShapes
from videolavit.evaluation.questions import Questions
from videolavit.evaluation.reconstruction import Media, Reconstruction
from videolavit.evaluation.record import Part

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        *(GroundTruth(), Prompts(), TwoShapes(), Questions()),
        *(ImageToVideo(), Reconstruction(), Long(), Media()),
    )
}
