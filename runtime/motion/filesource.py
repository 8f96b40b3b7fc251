"""Frames and clips of a video file whose pictures come with vectors of their own.

Contract: the same calls as `runtime.motion.sources` and the same choice of clips, on approximate motion; nothing is
held but the clips asked for. Unusable files raise MediaError.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import ceil
from pathlib import Path

from runtime.decoding import media_errors, open_video
from runtime.errors import MediaError
from runtime.frame_rate import Timed
from runtime.motion.approximate import ApproximateClip, ApproximateFrame, Images, Picture, clip_of, collect, sampled
from runtime.motion.clips import GROUP, consecutive_clips, understanding_starts
from runtime.motion.mpeg4 import MotionSettings
from runtime.motion.sparse import count_frames


class ApproximateFile(ABC):
    """Motion of one video file.

    Attributes:
        name: of the source.
        exact: always False.
        path, settings: as given.
    """

    name: str
    exact = False

    def __init__(self, path: Path | str, settings: MotionSettings) -> None:
        self.path, self.settings = Path(path), settings

    @abstractmethod
    def _pictures(self, pixels: bool) -> Iterator[Timed[Picture]]:
        """The pictures of the file in presentation order; without `pixels` none is asked for its image."""

    def frames(self, images: bool = False) -> Iterator[ApproximateFrame]:
        """Every frame of the video at `settings.fps`, with pixels if `images`."""
        return self._frames("all" if images else "none")

    def understanding_clips(self, max_clips: int = 8, frames_per_clip: int = 24) -> list[ApproximateClip]:
        """At most `max_clips` clips spread over the video, chosen as for understanding (reference semantics §11.4).

        Motion after the end of a short video is zero.
        """
        with open_video(self.path) as source, media_errors(self.path):
            total = count_frames(source, self.settings.rate)
        if total is None:  # no time stamps
            total = sum(1 for _ in self._frames("none"))
        starts = understanding_starts(range(0, total, GROUP), total, max_clips, frames_per_clip) or [0]
        clips = list(collect(self._frames("key"), starts, frames_per_clip))
        if not clips:  # packets promised what decoding did not give
            raise self._too_short(starts[0] + 1)
        return clips

    def reconstruction_clips(self, frames_per_clip: int = 24, start_s: float = 0.0) -> Iterator[ApproximateClip]:
        """Consecutive whole clips from `start_s` seconds on, one at a time (§12.7).

        Raises:
            MediaError: no clip of `frames_per_clip` frames fits into the video after `start_s`.
        """
        first = ceil(start_s * self.settings.rate)
        index = -1
        marked = ((frame.kind == "I", frame) for frame in self._frames("key"))
        for index, (_, clip) in enumerate(consecutive_clips(marked, frames_per_clip, first)):
            yield clip_of(index, clip, frames_per_clip, ApproximateClip)
        if index < 0:
            raise self._too_short(first + frames_per_clip)

    def _frames(self, images: Images) -> Iterator[ApproximateFrame]:
        found = False
        with media_errors(self.path):
            for frame in sampled(self._pictures(images != "none"), self.settings, images):
                found = True
                yield frame
        if not found:
            raise self._too_short(1)

    def _too_short(self, frames_needed: int) -> MediaError:
        rate = self.settings.rate
        return MediaError(
            f"{self.path}: is too short, or nothing in it can be decoded; {frames_needed} frames at "
            f"{float(rate):g} frames per second are needed ({float(frames_needed / rate):.2f} s)"
        )
