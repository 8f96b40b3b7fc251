"""Re-encoding to MPEG-4 and reading the vectors back: the motion the model was trained on.

Contract (reference semantics §11.1, §11.2): frames at a fixed rate are encoded to MPEG-4 part 2 at 8 Mbit/s with the
encoder's defaults (I frame every 12 frames or at a scene cut, no B frames), in memory, one packet a frame; decoding a
packet gives vectors and pixels. With the tested PyAV versions on x86-64 the result equals the ffmpeg command line
bit for bit; other FFmpeg versions and processors choose slightly different vectors.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType, VideoFrame

from runtime.decoding import media_errors, open_video, side_data
from runtime.errors import UsageError
from runtime.geometry import MACROBLOCK

BIT_RATE = 8_000_000
MAX_SLICES = 16
MAX_FPS = 1000
_MPEG, _JPEG = 1, 2  # values of VideoFrame.color_range


@dataclass(frozen=True)
class MotionSettings:
    """How motion is read.

    Attributes:
        fps: frames per second at which motion is read; a float such as 29.97 is taken as the nearest fraction.
        slices: slices per encoded frame, 1 to 16, which change vectors a little; `auto` takes as many as the ffmpeg
            command line would on this machine, so results then depend on the number of processors.
        rescale: give values at the motion tokenizer's scale, ten times the detokenizer's.
        sparse: for clips that are spread over a long video, read and encode these clips alone. Equal to encoding all of
            it if no scene cut moves the I frames and the encoder has settled (see `warm_up`); results say that they
            are not known to be exact.
        warm_up: frames encoded before each sparse clip. The encoder's choices hang on its past in two ways: the
            quantiser, which starts high and settles at its lower limit within 12 frames where 8 Mbit/s are plenty,
            and the last frame's vectors, which are candidates for the next. After 36 frames nothing is left of either
            in all videos tested; where the quantiser never settles (noise at high resolution), no number is enough.
    """

    fps: Fraction | float = 6
    slices: int | Literal["auto"] = 1
    rescale: bool = True
    sparse: bool = False
    warm_up: int = 36

    def __post_init__(self) -> None:
        if not 0 < self.fps <= MAX_FPS:
            raise UsageError(f"motion fps {self.fps}: must be above 0 and at most {MAX_FPS}")
        if self.slices != "auto" and not 1 <= self.slices <= MAX_SLICES:
            raise UsageError(f"motion slices {self.slices}: must be 1 to {MAX_SLICES}, or auto")
        if self.warm_up < 0:
            raise UsageError(f"motion warm_up {self.warm_up}: must be 0 or more frames")

    @property
    def rate(self) -> Fraction:
        """`fps` as a fraction the encoder can express."""
        return Fraction(self.fps).limit_denominator(1001)


def automatic_slices(height: int) -> int:
    """Slices the ffmpeg command line uses on this machine for frames `height` pixels high."""
    affinity = getattr(os, "sched_getaffinity", None)
    processors = len(affinity(0)) if affinity else os.cpu_count() or 1
    rows = min(processors, -(-height // MACROBLOCK))
    return min(rows + 1, MAX_SLICES) if rows > 1 else 1


def reencode(path: Path | str, settings: MotionSettings) -> Iterator[Packet]:
    """MPEG-4 packets of the video at `settings.fps`, one a frame, in order; `is_keyframe` marks I frames.

    Raises:
        MediaError: the file is missing, unreadable or too large. A file too short for one frame gives no packet.
    """
    path = Path(path)
    with open_video(path) as source, media_errors(path):
        yield from encode(source.frames_at(settings.rate), settings)


def encode(
    frames: Iterable[VideoFrame], settings: MotionSettings, first: int = 0, keyframes: Collection[int] = ()
) -> Iterator[Packet]:
    """MPEG-4 packets of `frames`, which are `settings.fps` apart; one a frame, in order.

    Args:
        frames: of equal size, else they are brought to the first one's.
        settings: see there.
        first: index of the first frame in its video.
        keyframes: indices of frames that become I frames whatever the encoder thinks.
    """
    encoder: VideoCodecContext | None = None
    for index, frame in enumerate(frames, first):
        if encoder is None:
            encoder = _encoder(frame.width, frame.height, settings)
        picture = _encodable(frame, encoder.width, encoder.height)
        picture.pts = index
        picture.time_base = encoder.time_base
        # Always set, or the source's frame types are forced on the encoder.
        picture.pict_type = PictureType.I if index in keyframes else PictureType.NONE
        yield from encoder.encode(picture)
    if encoder is not None:
        yield from encoder.encode(None)


def _encoder(width: int, height: int, settings: MotionSettings) -> VideoCodecContext:
    encoder = av.CodecContext.create("mpeg4", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    encoder.bit_rate = BIT_RATE
    encoder.time_base, encoder.framerate = 1 / settings.rate, settings.rate
    encoder.thread_count = automatic_slices(height) if settings.slices == "auto" else settings.slices
    return encoder


def _encodable(frame: VideoFrame, width: int, height: int) -> VideoFrame:
    """`frame` as yuv420p of the encoder's size; a video that changes size keeps the first one."""
    full_range = frame.format.name.startswith("yuvj") or frame.color_range == _JPEG
    if frame.format.name == "yuv420p":
        full_range = False  # the command line converts formats, and the range only on the way
    return frame.reformat(
        width,
        height,
        "yuv420p",
        interpolation="BICUBIC",
        src_color_range=_JPEG if full_range else None,
        dst_color_range=_MPEG if full_range else None,
    )


class VectorDecoder:
    """Decodes re-encoded packets to frames that carry motion vectors.

    With `pixels_of_p_frames` off the pixels of P frames are wrong and cheaper; vectors and I frames are the same.
    """

    def __init__(self, pixels_of_p_frames: bool) -> None:
        self._context = av.CodecContext.create("mpeg4", "r")
        self._context.thread_count = 1
        self._context.options = {"flags2": "+export_mvs"} | ({} if pixels_of_p_frames else {"skip_idct": "nokey"})

    def decode(self, packets: Iterable[Packet]) -> Iterator[VideoFrame]:
        """Frames of `packets`, which start at an I frame."""
        for packet in packets:
            yield from self._context.decode(packet)
        yield from self._context.decode(None)


def motion_vectors(frame: VideoFrame) -> np.ndarray:
    """Motion vectors of a decoded frame as a structured array; empty where there are none."""
    data = side_data(frame, "MOTION_VECTORS")
    return data.to_ndarray() if data is not None else np.empty(0)


def rgb(frame: VideoFrame) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of a decoded frame, as motion-vector extractors convert them."""
    if frame.width % 2 or frame.height % 2:
        frame = _without_properties(frame)
    return np.ascontiguousarray(frame.reformat(format="bgr24", interpolation="BICUBIC").to_ndarray()[..., ::-1])


def _without_properties(frame: VideoFrame) -> VideoFrame:
    """Copy of the planes alone: the chroma location would shift chroma in frames of odd size."""
    copy = VideoFrame(frame.width, frame.height, frame.format.name)
    for source, target in zip(frame.planes, copy.planes, strict=True):
        rows = [np.frombuffer(memoryview(p), np.uint8).reshape(p.height, p.line_size) for p in (source, target)]
        rows[1][:, : source.width] = rows[0][:, : source.width]
    return copy
