"""One connection to a live stream: opening it, and its decodable frames with times.

Contract: every wait ends after a time limit; packets that are damaged are left out and so is all that depends on them,
up to the next key frame. Times are seconds since the connection's first frame and never go back. Addresses are network
addresses, `pipe:0` (standard input), the path of a named pipe, or a camera device. A lost connection raises
ConnectionLost; PyAV's options argument is not used because it crashes where streams appear late (MPEG-TS, MPEG-PS).
"""

from __future__ import annotations

import os
import select
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from urllib.parse import urlsplit

import av
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from runtime.decoding import check_sides
from runtime.frame_rate import Timed

SCHEMES = ("rtsp", "rtsps", "rtp", "udp", "tcp", "http", "https")
MAX_LEAP = 10  # seconds between two frames; a longer leap of the time stamps is taken out
MAX_BAD_READS = 100  # in a row
_COMMON = {
    "probesize": "1000000",  # bytes and microseconds read before the first frame; FFmpeg's own limits cost seconds
    "analyzeduration": "2000000",
    "protocol_whitelist": "rtsp,rtsps,rtp,srtp,udp,tcp,tls,http,https,httpproxy,crypto,data",
}
_BY_SCHEME: dict[str, dict[str, str]] = {
    "rtsp": {"rtsp_transport": "tcp"},  # over UDP, pictures with holes are the rule
    "udp": {"overrun_nonfatal": "1", "fifo_size": "50000"},
}


class ConnectionLost(Exception):
    """The connection could not be made or broke; says why. Caught by `runtime.motion.live`."""


def is_live(address: str) -> bool:
    """Whether `address` names a live stream and not a file."""
    return scheme(address) in SCHEMES or is_pipe(address) or is_camera(address)


def scheme(address: str) -> str:
    return urlsplit(address).scheme.lower() if "://" in address else ""


def is_pipe(address: str) -> bool:
    """Standard input or a named pipe: what it gives ends where its writer ends."""
    if address.startswith("pipe:"):
        return True
    try:
        return stat.S_ISFIFO(Path(address).stat().st_mode)
    except (OSError, ValueError):
        return False


def is_camera(address: str) -> bool:
    return address.startswith("/dev/video")


def shown(address: str) -> str:
    """`address` without user name and password, for messages and files."""
    user, at, _ = urlsplit(address).netloc.rpartition("@") if "://" in address else ("", "", "")
    return address.replace(f"{user}{at}", "", 1) if at else address


@dataclass
class Losses:
    """Counts what did not get through.

    Attributes:
        corrupt: packets and reads that were damaged.
        skipped: packets left out while waiting for a key frame.
    """

    corrupt: int = 0
    skipped: int = 0


@dataclass
class Connection:
    """An open stream.

    Attributes:
        finite: it has an end, after which nothing is to be expected.
        codec: FFmpeg's name of the video decoder.
    """

    container: InputContainer
    stream: VideoStream
    finite: bool
    stopped: Callable[[], bool]
    losses: Losses = field(default_factory=Losses)

    @property
    def codec(self) -> str:
        return self.stream.codec_context.name

    def frames(self) -> Iterator[Timed[VideoFrame]]:
        """Decodable frames until the stream ends or `stopped`; FFmpeg's errors if it breaks."""
        clock = _Clock(self.stream)
        context = self.stream.codec_context
        waiting = True  # for a key frame
        for packet in self._packets():
            if packet is not None and packet.is_corrupt:
                self.losses.corrupt += 1
                waiting = True
                continue
            if packet is not None and waiting and not packet.is_keyframe:
                self.losses.skipped += 1
                continue
            waiting = False
            try:
                decoded = context.decode(packet)
            except InvalidDataError:
                self.losses.corrupt += 1
                context.flush_buffers()
                waiting = True
                continue
            except av.error.EOFError:
                return
            for frame in decoded:
                yield clock.timed(frame)

    def _packets(self) -> Iterator[Packet | None]:
        """The stream's packets, then None."""
        demuxed = self.container.demux(self.stream)
        bad = 0
        while not self.stopped():
            try:
                packet = next(demuxed, None)
            except InvalidDataError:
                bad += 1
                self.losses.corrupt += 1
                if bad > MAX_BAD_READS:
                    raise
                demuxed = self.container.demux(self.stream)
                continue
            if packet is None or packet.size == 0:
                yield None
                return
            bad = 0
            yield packet


@contextmanager
def connect(
    address: str, timeout_s: float, options: Mapping[str, str], stopped: Callable[[], bool], losses: Losses
) -> Iterator[Connection]:
    """Open the stream at `address`; ConnectionLost if that fails, or if the block meets an error of FFmpeg's.

    Args:
        timeout_s: longest wait for the stream to open, and later for data.
        options: FFmpeg options of the protocol and the container.
        stopped: asked while waiting and between packets; true ends the stream.
    """
    pipe = _PipeReader(address, timeout_s, stopped) if is_pipe(address) else None
    try:
        with _lost():
            container = av.open(
                pipe or address,
                format="v4l2" if is_camera(address) else None,
                container_options={} if pipe else _COMMON | _BY_SCHEME.get(scheme(address), {}) | dict(options),
                timeout=None if pipe else (timeout_s, timeout_s),
                metadata_errors="replace",
            )
        with container, _lost():
            stream = _video_stream(container)
            check_sides(Path(shown(address)), stream.width, stream.height)
            finite = pipe is not None or (scheme(address) in ("http", "https") and bool(container.duration))
            yield Connection(container, stream, finite, stopped, losses)
    finally:
        if pipe is not None:
            pipe.close()


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except av.error.ExitError as error:
        raise ConnectionLost("no data came in time") from error
    except (FFmpegError, OSError) as error:
        raise ConnectionLost((error.strerror or str(error)).rstrip(".").lower()) from error


def _video_stream(container: InputContainer) -> VideoStream:
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & Disposition.attached_pic and stream.codec_context is not None
    ]
    if not streams:
        raise ConnectionLost("no video in what was received")
    return max(streams, key=lambda stream: stream.width * stream.height)


class _Clock:
    """Seconds since the first frame, from time stamps that may leap."""

    def __init__(self, stream: VideoStream) -> None:
        self._time_base = stream.time_base or Fraction(1, av.time_base)
        rate = stream.average_rate or stream.guessed_rate
        self._duration = 1 / rate if rate else Fraction(1, 25)
        self._shift: Fraction | None = None
        self._time = -self._duration

    def timed(self, frame: VideoFrame) -> Timed[VideoFrame]:
        expected = self._time + self._duration
        ticks = frame.pts if frame.pts is not None else frame.dts
        if ticks is None:
            time_ = expected
        else:
            stamp = ticks * self._time_base
            if self._shift is None or not 0 <= stamp + self._shift - self._time <= MAX_LEAP:
                self._shift = expected - stamp
            time_ = stamp + self._shift
        self._time = time_
        return Timed(frame, time_, time_ + (frame.duration * self._time_base or self._duration))


class _PipeReader:
    """Reads a pipe for PyAV, with a time limit, which FFmpeg does not have there."""

    def __init__(self, address: str, timeout_s: float, stopped: Callable[[], bool]) -> None:
        self._timeout_s, self._stopped = timeout_s, stopped
        number = address.removeprefix("pipe:") or "0"
        if address.startswith("pipe:"):
            with _lost():
                self._descriptor = os.dup(int(number) if number.isdigit() else 0)
        else:
            with _lost():
                self._descriptor = os.open(address, os.O_RDONLY | os.O_NONBLOCK)  # does not wait for a writer

    def read(self, size: int) -> bytes:
        deadline = time.monotonic() + self._timeout_s
        while not self._stopped():
            if select.select([self._descriptor], [], [], 0.1)[0]:
                return os.read(self._descriptor, size)
            if time.monotonic() > deadline:
                raise TimeoutError(0, "no data came in time")
        return b""

    def close(self) -> None:
        os.close(self._descriptor)
