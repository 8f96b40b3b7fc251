"""What the sources of media files have in common, wherever the files lie.

Contract: `picture` and `clip` read the file through the runtime's own code (`media`) and put its labels to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path

from runtime.errors import MediaError
from runtime.geometry import Geometry
from videolavit.training.data.examples import ClipExample, PictureExample
from videolavit.training.data.labels import Labels
from videolavit.training.data.media import VIDEOS, read_clips, read_picture


class MediaSource(ABC):
    """A `Source` without `__len__` and `identity`: items are files, at most `clips` clips of each video."""

    def __init__(self, geometry: Geometry, clips: int) -> None:
        self.geometry, self.clips = geometry, clips

    @abstractmethod
    def shown(self, index: int) -> str:
        """What the file of item `index` is called in errors."""

    @abstractmethod
    def suffix(self, index: int) -> str:
        """Suffix of that file, in small letters."""

    @abstractmethod
    def opened(self, index: int) -> AbstractContextManager[Path]:
        """A path under which that file can be read."""

    @abstractmethod
    def labels(self, index: int) -> Labels:
        """What is said about item `index`. Raises DataError when the labels are damaged."""

    def moves(self, index: int) -> bool:
        return self.suffix(index) in VIDEOS

    def picture(self, index: int) -> PictureExample:
        labels = self.labels(index)
        with self.opened(index) as path:
            image = read_picture(path, self.moves(index), self.geometry)
        return PictureExample(
            image=image, captions=labels.captions, questions=labels.questions, negatives=labels.negatives
        )

    def clip(self, index: int) -> ClipExample:
        labels = self.labels(index)
        if not self.moves(index):
            raise MediaError(f"{self.shown(index)}: is a picture; motion is read from videos")
        with self.opened(index) as path:
            read = read_clips(path, self.geometry, self.clips)
        return ClipExample(
            frames=read.frames,
            grid=read.grid,
            clip_count=read.count,
            captions=labels.captions,
            questions=labels.questions,
            negatives=labels.negatives,
        )
