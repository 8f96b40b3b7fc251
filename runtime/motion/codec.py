"""The `codec` source: motion from the vectors a video already carries, with no re-encoding.

Contract: like `runtime.motion.sources`, but approximate (see `runtime.motion.approximate`). Only vectors of P pictures
that point into the past are used; FFmpeg does not say which earlier picture a vector points to, so it is taken to be
the one before. Intra blocks and I pictures count as standing still. Decoders outside `CODECS` export no vectors and
raise MediaError.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import hypot
from struct import unpack

import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from runtime.decoding import VideoSource, open_video, side_data, upright
from runtime.errors import MediaError
from runtime.frame_rate import Timed
from runtime.motion.approximate import Picture
from runtime.motion.filesource import ApproximateFile
from runtime.motion.mpeg4 import motion_vectors
from runtime.motion.trace import CELL, cell_field, field_shape

# FFmpeg's names of the decoders that export vectors, each tried with a stream of its kind.
CODECS = frozenset(
    ["h264", "mpeg4", "mpeg1video", "mpeg2video", "h263", "flv", "msmpeg4v2", "msmpeg4", "wmv1", "wmv2", "rv10", "rv20"]
)
_B_PICTURE = 3  # value of VideoFrame.pict_type
_EXPORT = {"flags2": "+export_mvs"}
_NO_PIXELS = {"skip_loop_filter": "all"}  # a sixth of H.264 decoding, and vectors do not depend on it


def check_vectors(name: str, codec: str) -> None:
    """Raise MediaError naming `name`, a file or address, if FFmpeg's decoder `codec` exports no vectors."""
    if codec not in CODECS:
        raise MediaError(
            f"{name}: its codec {codec} gives no motion vectors to read; use --source mpeg4, or --fallback mpeg4 to "
            "re-encode only where that is needed (H.264 and the MPEG and H.263 families do give vectors)"
        )


def export_vectors(context: VideoCodecContext, pixels: bool) -> None:
    """Make a decoder that has not started export its vectors; without `pixels` it skips work, and they are wrong."""
    context.thread_count = 1
    context.options = _EXPORT if pixels else _EXPORT | _NO_PIXELS


class CodecFile(ApproximateFile):
    """Motion of the video file at `path` from its own vectors."""

    name = "codec"

    def _pictures(self, pixels: bool) -> Iterator[Timed[Picture]]:
        with open_video(self.path) as source:
            context = source.stream.codec_context
            check_vectors(str(self.path), context.name)
            export_vectors(context, pixels)
            yield from pictures(_timed(source))


def _timed(source: VideoSource) -> Iterator[Timed[VideoFrame]]:
    """Frames with their times, in presentation order."""
    rate = source.stream.codec_context.framerate or source.stream.average_rate or Fraction(25)
    following = Fraction(0)
    for frame in source.frames():
        ticks = frame.pts if frame.pts is not None else frame.dts
        time = (ticks - source.origin) * source.time_base if ticks is not None else following
        following = time + (frame.duration * source.time_base or 1 / rate)
        yield Timed(frame, time, following)


def pictures(frames: Iterable[Timed[VideoFrame]]) -> Iterator[Timed[Picture]]:
    """Decoded frames as pictures; a stream that changes size keeps the first one."""
    turn: Turn | None = None
    for timed in frames:
        frame = timed.frame
        turn = Turn.of(frame, turn.shown if turn is not None else None)
        field = None
        if frame.pict_type != _B_PICTURE:
            field = turn.apply(cell_field(motion_vectors(frame), frame.width, frame.height))
        yield Timed(Picture(field, _Pixels(frame, turn.shown), *turn.shown), timed.time, timed.end)


@dataclass(frozen=True)
class _Pixels:
    """Makes an upright frame's pixels when they are asked for."""

    frame: VideoFrame
    size: tuple[int, int]

    def __call__(self) -> np.ndarray:
        turned = upright(self.frame)
        return turned.reformat(*self.size, format="rgb24", interpolation="BICUBIC").to_ndarray()


@dataclass(frozen=True)
class Turn:
    """Takes fields of stored pictures to the upright frame.

    Attributes:
        matrix: (a, b, c, d); a stored displacement (x, y) is (a x + c y, b x + d y) upright.
        stored, shown: (width, height) of the stored picture and of the upright frame, pixels.
    """

    matrix: tuple[float, float, float, float]
    stored: tuple[int, int]
    shown: tuple[int, int]

    @classmethod
    def of(cls, frame: VideoFrame, shown: tuple[int, int] | None) -> Turn:
        """The turn `frame`'s display matrix asks for, scaled to the size `shown` if that is given."""
        width, height = frame.width, frame.height
        a, b, c, d = 1.0, 0.0, 0.0, 1.0
        data = side_data(frame, "DISPLAYMATRIX")
        if data is not None:
            entries = unpack("<9i", bytes(data))
            x, y = hypot(entries[0], entries[1]), hypot(entries[3], entries[4])
            if x and y:
                a, b, c, d = entries[0] / x, entries[1] / x, entries[3] / y, entries[4] / y
        upright_size = (height, width) if abs(b) > 0.99 else (width, height)
        if shown is not None:
            to_x, to_y = shown[0] / upright_size[0], shown[1] / upright_size[1]
            a, b, c, d = a * to_x, b * to_y, c * to_x, d * to_y
        return cls((a, b, c, d), (width, height), shown or upright_size)

    def apply(self, field: np.ndarray) -> np.ndarray:
        """Field of the upright frame from that of the stored picture."""
        a, b, c, d = self.matrix
        if (a, b, c, d) == (1, 0, 0, 1) and self.stored == self.shown:
            return field
        # Look up where the centre of each upright cell lies in the stored picture; the pictures' centres coincide.
        rows, columns = field_shape(*self.shown)
        y, x = np.mgrid[:rows, :columns] * CELL + CELL / 2
        y, x = y - self.shown[1] / 2, x - self.shown[0] / 2
        scale = a * d - b * c
        stored_x = (d * x - c * y) / scale + self.stored[0] / 2
        stored_y = (a * y - b * x) / scale + self.stored[1] / 2
        column = (stored_x // CELL).astype(np.int64).clip(0, field.shape[2] - 1)
        row = (stored_y // CELL).astype(np.int64).clip(0, field.shape[1] - 1)
        found = field[:, row, column]
        return np.stack([a * found[0] + c * found[1], b * found[0] + d * found[1]]).astype(np.float32)
