"""Every vector, grid and key frame of the runtime against ffmpeg and motion-vector-extractor, as a table.

Contract: the comparison itself is tests/motion_parity.py, the videos those of the tests' zoo and any given ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import media_zoo
from motion_parity import Agreement, compare


def exactness_table(videos: Sequence[Path], python: str, work: Path) -> Iterator[str]:
    """Markdown lines: totals over the zoo, and one line for every given video and for every difference."""
    zoo = work / "zoo"
    zoo.mkdir(exist_ok=True)
    found = [compare(media_zoo.specimen(name, zoo), python, work) for name in media_zoo.ZOO]
    yield "## Exactness"
    yield ""
    yield "Slices as ffmpeg chose them on this machine. A cell is a macroblock of the grid, in both components."
    yield ""
    yield "| video | frames | frame types | vectors, differing | cells, differing | key frames, pixels differing |"
    yield "|---|---|---|---|---|---|"
    yield _line(f"zoo: {sum(a.exact for a in found)} of {len(found)} files equal", found)
    for name, agreement in zip(media_zoo.ZOO, found, strict=True):
        if not agreement.exact:
            yield _line(f"zoo: {name}", [agreement])
    for video in videos:
        yield _line(video.name, [compare(video, python, work)])
    yield ""


def _line(name: str, found: Sequence[Agreement]) -> str:
    own, reference = (sum(a.frames[side] for a in found) for side in (0, 1))
    types = "equal" if all(a.types for a in found) else "**differ**"
    vectors, cells, pictures = (
        f"{sum(getattr(a, total) for a in found):,}, {sum(getattr(a, differing) for a in found):,}"
        for total, differing in (
            ("vectors", "vectors_differing"),
            ("cells", "cells_differing"),
            ("keyframes", "pixels_differing"),
        )
    )
    return f"| {name} | {own:,} of {reference:,} | {types} | {vectors} | {cells} | {pictures} |"
