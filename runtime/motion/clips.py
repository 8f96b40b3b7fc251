"""Where clips start: which I frames become key frames.

Contract (reference semantics §11.4, §12.7): a good start is an I frame whose group of pictures has the full length, so
that no scene cut falls into it, and that is followed by a whole clip. The encoder's group is `GROUP` frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np

GROUP = 12  # frames from an I frame to the next one where the encoder saw no cut

T = TypeVar("T")


def understanding_starts(keyframes: Sequence[int], total: int, max_clips: int, frames: int = 24) -> list[int]:
    """Frame indices at which the clips for understanding start (§11.4).

    Args:
        keyframes: indices of the I frames, ascending.
        total: frames in the video.
        max_clips: most clips to choose.
        frames: frames in a clip.
    """
    good = [a for a, b in pairwise(keyframes) if b == a + GROUP and a + frames <= total]
    candidates = good if len(good) > 1 else list(keyframes)
    # Two groups make a clip, so every second start tiles the video; the first one is left out if there is a choice.
    starts = candidates[1::2] if len(candidates) > 2 else candidates[::2]
    if len(starts) > max_clips:
        starts = [starts[int(i)] for i in np.linspace(0, len(starts) - 1, max_clips)]
    return starts


def consecutive_clips(
    items: Iterable[tuple[bool, T]], frames: int, first: int = 0, regular: bool = True
) -> Iterator[tuple[int, list[T]]]:
    """Cut a stream into clips for reconstruction: (start index, `frames` items), none overlapping.

    Args:
        items: (is an I frame, item) of every frame in order; at most max(frames, GROUP + 1) are held.
        frames: items in a clip.
        first: earliest start index.
        regular: take only starts whose next I frame is exactly `GROUP` later; otherwise any I frame will do.
    """
    held: list[tuple[bool, T]] = []
    needed = max(frames, GROUP + 1) if regular else frames
    start = 0  # index of held[0]
    for item in items:
        held.append(item)
        while held and len(held) >= needed:
            if start >= first and held[0][0] and (not regular or _group_length(held) == GROUP):
                yield start, [value for _, value in held[:frames]]
                drop = frames
            else:
                drop = 1
            del held[:drop]
            start += drop


def _group_length(held: Sequence[tuple[bool, T]]) -> int:
    """Distance from the first of `held`, an I frame, to the next I frame."""
    return next((i for i, (key, _) in enumerate(held) if key and i), len(held))
