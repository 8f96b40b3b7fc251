"""Whether what is seen is what was described.

Contract: a shape that was not found fails every check. Size and speed are checked only where they were said, and are
left out elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from videolavit.evaluation.judge import Seen
from videolavit.shapes.scene import Scene, Shape, Size, Speed

ESSENTIAL = ("colour", "kind", "direction")
_SIZES: dict[str, Size] = {"small": "small", "little": "small", "large": "large", "big": "large"}
_SPEEDS: dict[str, Speed] = {
    "slowly": "slowly",
    "slow": "slowly",
    "quickly": "quickly",
    "fast": "quickly",
    "rapidly": "quickly",
}


def way_of(shape: Shape) -> str:
    """The way that is to be seen of a shape that moves or stays still."""
    return shape.motion.direction or "still"


def described(scene: Scene) -> str:
    """The shapes of a scene in the words of `Seen`."""
    return ", ".join(f"{shape.colour} {shape.kind} {way_of(shape)}" for shape in scene.shapes)


def words_of(seen: Sequence[Seen]) -> str:
    """What is seen, in words."""
    return ", ".join(map(str, seen)) or "nothing"


def said_size(caption: str) -> Size | None:
    """The size that the caption of one shape names."""
    return next((_SIZES[word] for word in _words(caption) if word in _SIZES), None)


def said_speed(caption: str) -> Speed | None:
    """The speed that the caption of one shape names."""
    return next((_SPEEDS[word] for word in _words(caption) if word in _SPEEDS), None)


def check_one(
    shape: Shape, seen: Sequence[Seen], size: Size | None = None, speed: Speed | None = None
) -> dict[str, bool]:
    """Checks of a scene of one shape against the largest one that is seen; `size` and `speed` as they were said."""
    found = seen[0] if seen else None
    checks = _essential(shape, found)
    if size is not None:
        checks["size"] = found is not None and found.size(1) == size
    if speed is not None:
        checks["speed"] = found is not None and found.way != "still" and found.speed == speed
    checks["count"] = len(seen) == 1
    checks["all"] = all(checks[name] for name in ESSENTIAL)
    return checks


def check_two(scene: Scene, seen: Sequence[Seen]) -> dict[str, bool]:
    """Checks of a scene of two shapes, each against the largest seen one of its colour."""
    checks = dict.fromkeys(ESSENTIAL, True)
    for shape in scene.shapes:
        found = next((one for one in seen if one.colour == shape.colour), None)
        right = _essential(shape, found)
        checks = {name: checks[name] and right[name] for name in ESSENTIAL}
    checks["count"] = len(seen) == len(scene.shapes)
    checks["both"] = all(checks[name] for name in ESSENTIAL)
    return checks


def _essential(shape: Shape, found: Seen | None) -> dict[str, bool]:
    if found is None:
        return dict.fromkeys(ESSENTIAL, False)
    return {
        "colour": found.colour == shape.colour,
        "kind": found.kind == shape.kind,
        "direction": found.way == way_of(shape),
    }


def _words(caption: str) -> list[str]:
    return re.findall(r"[a-z]+", caption.lower())
