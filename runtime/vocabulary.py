"""The one vocabulary of text, image and motion ids.

Contract: every id range the model speaks is computed here from three sizes and nowhere else.
Layout (reference semantics §2), with the official sizes in brackets:

    text pieces | image start, end | visual codes | motion start, end | motion codes
    0 .. 31999  | 32000, 32001     | 32002..48385 | 48386, 48387      | 48388..49411
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy as np

UNK, BOS, EOS = 0, 1, 2  # the Llama tokenizer's own control ids


class Vocabulary(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sizes of the three parts; all ids follow from them. Sizes count entries, ids are 0-based."""

    text_size: int = 32000
    visual_codes: int = 16384
    motion_codes: int = 1024

    @property
    def image_start(self) -> int:
        return self.text_size

    @property
    def image_end(self) -> int:
        return self.text_size + 1

    @property
    def first_visual(self) -> int:
        return self.text_size + 2

    @property
    def motion_start(self) -> int:
        return self.first_visual + self.visual_codes

    @property
    def motion_end(self) -> int:
        return self.motion_start + 1

    @property
    def first_motion(self) -> int:
        return self.motion_start + 2

    @property
    def size(self) -> int:
        return self.first_motion + self.motion_codes

    @property
    def image_ranges(self) -> tuple[range, ...]:
        """Ids that may be generated in an image: control ids, markers, visual codes (§10.2)."""
        return (range(0, 3), range(self.image_start, self.motion_start))

    @property
    def motion_ranges(self) -> tuple[range, ...]:
        """Ids that may be generated in a motion sequence: control ids, markers, motion codes (§10.3)."""
        return (range(0, 3), range(self.motion_start, self.size))

    @property
    def text_ranges(self) -> tuple[range, ...]:
        """Ids that may be generated in an answer (§13.3)."""
        return (range(0, self.text_size),)

    def visual_codes_of(self, ids: Iterable[int]) -> np.ndarray:
        """Visual codes among `ids`, in order: [n] int64 in 0..visual_codes-1. Everything else is dropped."""
        array = np.asarray(list(ids), dtype=np.int64)
        inside = (array >= self.first_visual) & (array < self.motion_start)
        return array[inside] - self.first_visual

    def motion_codes_of(self, ids: Iterable[int], count: int) -> np.ndarray:
        """Exactly `count` motion codes from generated `ids`: [count] int64 (§12.5).

        Ids outside the motion codes are dropped, a surplus is cut from the end, a shortage is filled with
        code 0 at the end.
        """
        array = np.asarray(list(ids), dtype=np.int64)
        codes = array[(array >= self.first_motion) & (array < self.size)] - self.first_motion
        return np.pad(codes[:count], (0, max(0, count - len(codes))))

    def image_span(self, codes: Iterable[int]) -> list[int]:
        """Visual codes as they stand in a sequence: image_start, ids, image_end."""
        return [self.image_start, *(int(c) + self.first_visual for c in codes), self.image_end]

    def motion_span(self, codes: Iterable[int]) -> list[int]:
        """Motion codes as they stand in a sequence: motion_start, ids, motion_end."""
        return [self.motion_start, *(int(c) + self.first_motion for c in codes), self.motion_end]
