"""Raw examples, and what every source of them can do.

Contract: pictures and frames are uint8 RGB, motion is in the motion tokenizer's scale (ten times the detokenizer's) on
the macroblock grid that the runtime would read from the same video (reference semantics §11). Sizes are the source's
own and may differ from item to item.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


class Negative(NamedTuple):
    """A caption, one in nearly the same words that is wrong, and what is wrong in it (may be empty)."""

    caption: str
    wrong: str
    topic: str = ""


class Question(NamedTuple):
    """A question, its answer, and what it is about (may be empty)."""

    question: str
    answer: str
    topic: str = ""


@dataclass(frozen=True, kw_only=True)
class PictureExample:
    """A picture [H, W, 3] and what is said about it."""

    image: np.ndarray
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    negatives: tuple[Negative, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ClipExample:
    """One or more clips of one video and what is said about it.

    Attributes:
        frames: [C * T, H, W, 3] uint8, at the model's frame rate; a clip's first frame is its key frame.
        grid: [C * T, 2, rows, columns] float32; zero in key frames.
        clip_count: C; the clips need not follow each other without a gap.
        captions, questions, negatives: about the video as a whole.
    """

    frames: np.ndarray
    grid: np.ndarray
    clip_count: int = 1
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    negatives: tuple[Negative, ...] = ()

    def per_clip(self) -> tuple[np.ndarray, np.ndarray]:
        """Frames [C, T, H, W, 3] and grids [C, T, 2, rows, columns]."""
        return tuple(array.reshape(self.clip_count, -1, *array.shape[1:]) for array in (self.frames, self.grid))  # type: ignore[return-value]


class Source(Protocol):
    """Examples by index, each a pure function of it."""

    def __len__(self) -> int: ...

    def moves(self, index: int) -> bool:
        """Whether item `index` is a video; other items have a picture only."""

    def picture(self, index: int) -> PictureExample:
        """Item `index` as a picture; of a video its first key frame. Raises MediaError naming the file."""

    def clip(self, index: int) -> ClipExample:
        """Item `index` as clips. Raises MediaError naming the file, also for a picture."""

    def identity(self) -> Mapping[str, object]:
        """What decides the content of the items, as JSON values."""
