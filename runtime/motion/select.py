"""Which source reads a video's motion: a file by re-encoding it or by its own vectors, or a live stream.

Contract: every source has the same calls (`MotionSource`) and says whether its motion is that of the model's training
encoder (`exact`) or resembles it. Another source than the one asked for is used only where a fallback is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

from runtime.decoding import open_video
from runtime.errors import EnvironmentProblem, MediaError, UsageError
from runtime.motion import codec, nvdec, sources
from runtime.motion.connection import SCHEMES, is_live, scheme
from runtime.motion.live import LiveSettings, LiveSource
from runtime.motion.mpeg4 import MotionSettings
from runtime.motion.sources import MotionClip, MotionFrame

SourceName = Literal["mpeg4", "codec", "nvdec"]
SOURCES: tuple[SourceName, ...] = ("mpeg4", "codec", "nvdec")


class MotionSource(Protocol):
    """Motion of one video or stream.

    Attributes:
        name: the source that is used: `mpeg4`, `codec` or `nvdec`; of a live stream final with the first frame.
        exact: the motion is that of the `mpeg4` source; in sparse mode final with the first frame or clip.
    """

    @property
    def name(self) -> str: ...

    @property
    def exact(self) -> bool: ...

    def frames(self, images: bool = False) -> Iterator[MotionFrame]: ...

    def understanding_clips(self, max_clips: int = 8, frames_per_clip: int = 24) -> Sequence[MotionClip]: ...

    def reconstruction_clips(self, frames_per_clip: int = 24, start_s: float = 0.0) -> Iterator[MotionClip]: ...


class Mpeg4File:
    """Motion of the video file at `path` by re-encoding (`runtime.motion.sources`).

    In sparse mode `frames` are those of the clips for understanding, unless all of the video is read anyway.
    """

    name = "mpeg4"

    def __init__(self, path: Path | str, settings: MotionSettings) -> None:
        self.path, self.settings = Path(path), settings
        self.exact = not settings.sparse

    def frames(self, images: bool = False) -> Iterator[MotionFrame]:
        found = sources.sparse_frames(self.path, self.settings, images) if self.settings.sparse else None
        self.exact = found is None
        yield from sources.frames(self.path, self.settings, images) if found is None else found

    def understanding_clips(self, max_clips: int = 8, frames_per_clip: int = 24) -> Sequence[MotionClip]:
        clips = sources.understanding_clips(self.path, self.settings, max_clips, frames_per_clip)
        self.exact = all(clip.exact for clip in clips)
        return clips

    def reconstruction_clips(self, frames_per_clip: int = 24, start_s: float = 0.0) -> Iterator[MotionClip]:
        return sources.reconstruction_clips(self.path, self.settings, frames_per_clip, start_s)


class LiveMotion:
    """A live stream with a file's calls: clips are those that come next."""

    def __init__(self, stream: LiveSource) -> None:
        self.stream = stream

    @property
    def name(self) -> str:
        return self.stream.used

    @property
    def exact(self) -> bool:
        return self.stream.exact

    def frames(self, images: bool = False) -> Iterator[MotionFrame]:
        return self.stream.frames(images)

    def understanding_clips(self, max_clips: int = 8, frames_per_clip: int = 24) -> Sequence[MotionClip]:
        return list(islice(self.stream.clips(frames_per_clip), max_clips))

    def reconstruction_clips(self, frames_per_clip: int = 24, start_s: float = 0.0) -> Iterator[MotionClip]:
        return (clip for clip in self.stream.clips(frames_per_clip) if clip.time_s >= start_s)


def open_source(
    address: str | Path,
    source: SourceName,
    settings: MotionSettings,
    fallback: Literal["mpeg4"] | None = None,
    live: LiveSettings | None = None,
) -> MotionSource:
    """The source of the motion of `address`, a video file or a live stream (`runtime.motion.connection`).

    Args:
        fallback: what to use where `source` cannot: a codec without vectors, no GPU. None: raise instead.
        live: how a live stream is held.

    Raises:
        UsageError: an address of an unknown kind, a live stream with `nvdec`, or sparse mode of anything but a file
            with `mpeg4`.
        EnvironmentProblem: `nvdec` without its library, GPU or driver.
        MediaError: the file cannot be opened, or `source` finds no vectors in it.
    """
    text = str(address)
    if settings.sparse and (is_live(text) or source != "mpeg4"):
        raise UsageError("--sparse reads files with --source mpeg4; leave one of the two out")
    if is_live(text):
        if source == "nvdec":
            raise UsageError("--source nvdec reads files only; use codec or mpeg4 for a live stream")
        return LiveMotion(LiveSource(text, settings, source, fallback, live))
    if scheme(text):
        raise UsageError(f"{text}: {scheme(text)} addresses are not read; use a file or one of {', '.join(SCHEMES)}")
    if source == "nvdec":
        try:
            decoder = nvdec.NvdecFile(address, settings)
            decoder.check()
            return decoder
        except (EnvironmentProblem, MediaError):
            if fallback is None:
                raise
    elif source == "codec":
        with open_video(address) as video:
            name = video.stream.codec_context.name
        if name in codec.CODECS or fallback is None:
            codec.check_vectors(text, name)
            return codec.CodecFile(address, settings)
    return Mpeg4File(address, settings)
