"""How many frames a fresh encoder needs before it does what one does that saw the whole video, as a table.

Contract: for every I frame with room before and behind it, the clip from there is encoded by a fresh encoder after each
number of warm-up frames, and compared with the same frames of the whole video's stream, byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from av.video.frame import VideoFrame

from runtime.decoding import open_video
from runtime.motion.mpeg4 import MotionSettings, VectorDecoder, encode, motion_vectors

WARM_UPS = (0, 2, 12, 24, 36)
LENGTH = 24
RATES = (Fraction(6), Fraction(12))
TEXT = """## Warm-up of the sparse mode

The encoder's choices hang on its past in two ways. The quantiser starts above its lower limit and reaches it within a
few frames where 8 Mbit/s are plenty, and then stays there. And the vectors of the frame before are candidates for the
next one's, also across I frames; that fades as the search agrees on the better ones. Where the bit rate is too low for
the picture (fine noise at high resolution) the quantiser never settles, and no warm-up makes a fresh encoder equal: the
result then differs by a few per cent of the macroblocks, about as much as another number of slices does.

Clips that are equal byte for byte, of all clips that fit; and the mean share of macroblocks with another vector:
"""


def warm_up_table(videos: Sequence[Path]) -> Iterator[str]:
    """Markdown lines for every video at each of `RATES`."""
    yield TEXT
    yield "| video | " + " | ".join(f"{w} frames" for w in WARM_UPS) + " |"
    yield "|---|" + "---|" * len(WARM_UPS)
    for video in videos:
        for rate in RATES:
            cells = _row(video, rate)
            if cells:
                yield f"| {video.name}, {rate} fps | " + " | ".join(cells) + " |"
    yield ""


def _row(video: Path, rate: Fraction) -> list[str]:
    settings = MotionSettings(fps=rate)
    with open_video(video) as source:
        frames = [frame.reformat(format="yuv420p", interpolation="BICUBIC") for frame in source.frames_at(rate)]
    whole = list(encode(frames, settings))
    starts = [i for i, p in enumerate(whole) if p.is_keyframe and max(WARM_UPS) <= i <= len(whole) - LENGTH]
    if not starts:
        return []
    vectors = [_vectors(whole[start : start + LENGTH]) for start in starts]
    cells = []
    for warm_up in WARM_UPS:
        equal = 0
        differing = 0.0
        for start, expected in zip(starts, vectors, strict=True):
            found = _alone(frames, settings, start, warm_up)
            equal += [bytes(p) for p in found] == [bytes(p) for p in whole[start : start + LENGTH]]
            differing += _share(_vectors(found), expected) / len(starts)
        cells.append(f"{equal} of {len(starts)}; {differing:.2%}")
    return cells


def _alone(frames: Sequence[VideoFrame], settings: MotionSettings, start: int, warm_up: int) -> list:
    first = start - warm_up
    return list(encode(frames[first : start + LENGTH], settings, first, {start}))[warm_up:]


def _vectors(packets: Sequence) -> list[dict[tuple[int, int], tuple[int, int]]]:
    """Of every frame: place of a macroblock -> vector."""
    frames = []
    for frame in VectorDecoder(pixels_of_p_frames=False).decode(packets):
        found = motion_vectors(frame)
        rows = (found[name].tolist() for name in ("dst_x", "dst_y", "motion_x", "motion_y")) if len(found) else [()] * 4
        frames.append({(x, y): (mx, my) for x, y, mx, my in zip(*rows, strict=True)})
    return frames


def _share(found: Sequence[dict], expected: Sequence[dict]) -> float:
    """Share of the macroblocks with a vector in either that have another one in the other."""
    places = differing = 0
    for a, b in zip(found, expected, strict=True):
        both = a.keys() | b.keys()
        places += len(both)
        differing += sum(a.get(place) != b.get(place) for place in both)
    return differing / max(places, 1)
