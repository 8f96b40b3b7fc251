"""The `nvdec` source: motion vectors read back from NVIDIA's hardware decoder.

Contract: like the `codec` source, and approximate like it, for H.264 and HEVC on a GPU whose driver exports decode
statistics (PyNvVideoCodec 2.2 and later, driver 590 and later; NVIDIA calls it experimental). The format of the
statistics is taken from PyNvVideoCodec's documentation and samples: one entry per 16x16 block in raster order;
`cu_type` 0 intra, 1 inter, 2 skipped, 3 PCM; `mv0` into the past and `mv1` into the future, quarter pixels, from the
block to its reference. It has not been checked on a GPU. A picture that uses `mv1` counts as a B picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from runtime.decoding import media_errors, open_video, rotation
from runtime.errors import EnvironmentProblem, MediaError
from runtime.frame_rate import Timed
from runtime.geometry import MACROBLOCK
from runtime.motion.approximate import Picture
from runtime.motion.filesource import ApproximateFile
from runtime.motion.grid import grid_shape
from runtime.motion.mpeg4 import MotionSettings
from runtime.motion.trace import CELL

CODECS = frozenset({"h264", "hevc"})
_INTER, _SKIPPED = 1, 2  # values of cu_type
_QUARTER = 4  # vector units in a pixel
_NEEDS = "the nvdec source needs an NVIDIA GPU, driver 590 or later and: pip install 'videolavit[nvdec]'"


def problem() -> str | None:
    """Why this source cannot work here, as far as that shows without a video; None if nothing speaks against it."""
    try:
        _library()
    except EnvironmentProblem as error:
        return str(error)
    return None


def _library() -> ModuleType:
    try:
        return import_module("PyNvVideoCodec")
    except ImportError as error:
        raise EnvironmentProblem(f"PyNvVideoCodec is not installed; {_NEEDS}") from error
    except (RuntimeError, OSError) as error:  # the package loads the driver's libraries on import
        raise EnvironmentProblem(f"PyNvVideoCodec cannot load ({_first_line(error)}); {_NEEDS}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def statistics_field(statistics: Mapping[str, Sequence[int]], width: int, height: int) -> np.ndarray | None:
    """Field (`runtime.motion.trace`) of one picture from its decode statistics, or None for a B picture.

    Args:
        statistics: what `frame.ParseDecodeStats()` gives: lists under `cu_type`, `mv0_x`, `mv0_y`, `mv1_x`, `mv1_y`.
        width, height: of the picture, pixels.

    Raises:
        MediaError: the lists do not cover the picture.
    """
    rows, columns = grid_shape(width, height)
    names = ("cu_type", "mv0_x", "mv0_y", "mv1_x", "mv1_y")
    lists = [np.asarray(statistics.get(name, ()), np.int64) for name in names]
    if any(values.size != rows * columns for values in lists):
        raise MediaError(
            f"decode statistics of {sorted({values.size for values in lists})} blocks do not fit {width}x{height} "
            f"pixels, which are {rows * columns} blocks; use --source codec or mpeg4"
        )
    kind, x, y, later_x, later_y = lists
    moving = (kind == _INTER) | (kind == _SKIPPED)
    if np.any(moving & ((later_x != 0) | (later_y != 0))):
        return None
    blocks = np.where(moving, np.stack([x, y]), 0) / -_QUARTER  # the block moved away from its reference
    repeats = MACROBLOCK // CELL
    return blocks.reshape(2, rows, columns).repeat(repeats, 1).repeat(repeats, 2).astype(np.float32)


class NvdecFile(ApproximateFile):
    """Motion of the video file at `path` from the hardware decoder; EnvironmentProblem where it cannot work."""

    name = "nvdec"

    def __init__(self, path: Path | str, settings: MotionSettings) -> None:
        super().__init__(path, settings)
        self._library = _library()

    def check(self) -> None:
        """Decode one picture. Raises EnvironmentProblem or MediaError if this file cannot be read here."""
        next(self._pictures(pixels=False), None)

    def _pictures(self, pixels: bool) -> Iterator[Timed[Picture]]:
        width, height = self._checked_size()
        times = presentation_times(self.path)
        for timed, frame in zip(times, self._decoded(), strict=False):
            if not getattr(frame, "decode_stats_size", 0):
                raise EnvironmentProblem(
                    f"{self.path}: this GPU or driver exports no decode statistics; driver 590 or later is needed, "
                    "or use --source codec or mpeg4"
                )
            field = statistics_field(frame.ParseDecodeStats(), width, height)
            yield Timed(Picture(field, partial(_pixels, frame), width, height), timed.time, timed.end)

    def _checked_size(self) -> tuple[int, int]:
        with open_video(self.path) as source, media_errors(self.path):
            codec = source.stream.codec_context.name
            if codec not in CODECS:
                raise MediaError(f"{self.path}: its codec {codec} gives no decode statistics; use --source mpeg4")
            first = next(source.frames(), None)
            if first is None:
                raise self._too_short(1)
            if rotation(first):
                raise MediaError(f"{self.path}: is stored turned, which nvdec does not undo; use --source codec")
            return first.width, first.height

    def _decoded(self) -> Iterator[Any]:
        try:
            decoder = self._library.SimpleDecoder(
                str(self.path),
                use_device_memory=False,
                output_color_type=self._library.OutputColorType.RGB,
                enableDecodeStats=True,
            )
        except Exception as error:  # the library raises classes of its own that share no base
            raise EnvironmentProblem(
                f"{self.path}: the hardware decoder cannot open it ({_first_line(error)}); use --source codec or mpeg4"
            ) from error
        with suppress(IndexError):  # how it ends
            for index in range(len(decoder)):
                yield decoder[index]


def presentation_times(path: Path) -> list[Timed[None]]:
    """Times of a video's pictures in presentation order, from its packets; the decoder gives pictures alone."""
    times: list[Timed[None]] = []
    with open_video(path) as source, media_errors(path):
        rate = source.stream.average_rate or source.stream.guessed_rate or Fraction(25)
        for packet in source.container.demux(source.stream):
            if packet.pts is not None:
                time = (packet.pts - source.origin) * source.time_base
                times.append(Timed(None, time, time + ((packet.duration or 0) * source.time_base or 1 / rate)))
    return sorted(times, key=lambda timed: timed.time)


def _pixels(frame: Any) -> np.ndarray:
    return np.array(np.from_dlpack(frame))  # a copy: the decoder uses the buffer again
