"""What the stages are judged on: the held-out part of the world of shapes, which training never shows.

Contract: everything that `validate` measures on scenes is taken here; single labelled pictures of the same split are
`videolavit.training.patches.labelled_batch`'s.
"""

from __future__ import annotations

import msgspec

from runtime.geometry import Geometry
from videolavit.training.data.shapes_source import ShapesSource
from videolavit.training.settings import DataSettings

SPLIT = "held-out"


def held_out(data: DataSettings) -> DataSettings:
    """The held-out part of a source that has one; the source itself otherwise."""
    return msgspec.structs.replace(data, split=SPLIT) if data.source == "shapes" else data


def held_out_scenes(geometry: Geometry, count: int | None = None) -> ShapesSource:
    """The first `count` held-out scenes (None: a source without an end), whatever the stage is trained on."""
    return ShapesSource(geometry, split=SPLIT) if count is None else ShapesSource(geometry, split=SPLIT, size=count)
