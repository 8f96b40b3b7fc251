"""Motion of a live stream: a camera on the network or on this machine, or what another program writes to a pipe.

Contract: a thread reads and decodes; motion waits for its reader in a bounded queue that drops the oldest when the
reader is late, so delay and memory do not grow. The delay of a clip is its own length, one frame, the stream's B
frames, and what the queue may hold. After packet loss nothing is used until the next key frame; a lost connection is
made again a limited number of times, after which MediaError is raised. A clip never spans a new connection. Streams
without vectors of their own, such as most USB cameras (MJPEG or raw), take the re-encoding path of the `mpeg4` source.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from threading import Event, Thread
from types import MappingProxyType, TracebackType
from typing import Literal, TypeVar

from av.video.frame import VideoFrame

from runtime.decoding import upright
from runtime.errors import MediaError, UsageError
from runtime.frame_rate import Timed, at_rate
from runtime.motion.approximate import ApproximateClip, Images, clip_of, sampled
from runtime.motion.clips import consecutive_clips
from runtime.motion.codec import CODECS, check_vectors, export_vectors, pictures
from runtime.motion.connection import Connection, ConnectionLost, Losses, connect, is_camera, is_pipe, shown
from runtime.motion.grid import macroblock_grid
from runtime.motion.handover import Handover
from runtime.motion.mpeg4 import MotionSettings, VectorDecoder, encode, motion_vectors, rgb
from runtime.motion.sources import MotionClip, MotionFrame

HELD_BYTES = 64 << 20  # most that waits in the queue
MAX_BACKOFF = 10.0  # seconds between two attempts

T = TypeVar("T", MotionFrame, MotionClip)


@dataclass(frozen=True)
class LiveSettings:
    """How a live stream is held.

    Attributes:
        timeout_s: longest wait for a connection, and later for data, seconds.
        attempts: connections that may fail one after the other before giving up.
        backoff_s: wait before the second attempt, seconds; it doubles each time, up to `MAX_BACKOFF`.
        max_delay_s: motion that may wait for its reader, seconds; older motion is dropped. Of a pipe nothing is
            dropped: its writer waits.
        options: FFmpeg options of the protocol, for example {"rtsp_transport": "udp"}.
    """

    timeout_s: float = 5.0
    attempts: int = 5
    backoff_s: float = 0.5
    max_delay_s: float = 8.0
    options: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        for name, value in (("timeout", self.timeout_s), ("delay", self.max_delay_s), ("back-off", self.backoff_s)):
            if not 0 < value <= 3600:
                raise UsageError(f"live {name} {value} s: must be above 0 and at most 3600")
        if self.attempts < 1:
            raise UsageError(f"live attempts {self.attempts}: must be at least 1")


@dataclass
class LiveStatistics(Losses):
    """What has happened so far.

    Attributes:
        connections: that were made.
        frames: at the motion frame rate, dropped ones included.
        dropped: frames or clips dropped because the reader was late.
    """

    connections: int = 0
    frames: int = 0
    dropped: int = 0


class LiveSource:
    """Motion of the stream at `address`; iterate over it for clips.

    Attributes:
        address: without user name and password.
        statistics: kept up to date while reading.
        used: `codec` or `mpeg4`: how the stream is read; set with the first connection.
    """

    def __init__(
        self,
        address: str,
        settings: MotionSettings,
        source: Literal["codec", "mpeg4"] = "codec",
        fallback: Literal["mpeg4"] | None = None,
        live: LiveSettings | None = None,
    ) -> None:
        """`fallback`: how to read a stream without vectors of its own; by default it raises MediaError, but for a
        camera device, which can hardly have any."""
        self.address = shown(address)
        self.statistics = LiveStatistics()
        self.used = source
        self._full_address = address
        self._settings = settings
        self._live = live or LiveSettings()
        self._fall_back = fallback == "mpeg4" or is_camera(address)
        self._size: tuple[int, int] | None = None
        self._ending = False
        self._stop: Event | None = None
        self._thread: Thread | None = None

    @property
    def exact(self) -> bool:
        """Whether the motion is that of the `mpeg4` source; final with the first frame or clip."""
        return self.used == "mpeg4"

    def __enter__(self) -> LiveSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[MotionClip]:
        return self.clips()

    def end(self) -> None:
        """Take no more from the stream, but let the reader have what was taken; may be called from a signal handler."""
        self._ending = True  # a plain flag: an event has a lock, which the interrupted code may hold

    def close(self) -> None:
        """Stop reading; returns within about the time-out of the connection."""
        if self._stop is not None:
            self._stop.set()
        if self._thread is not None:
            self._thread.join(self._live.timeout_s + 1)
        self._stop = self._thread = None

    def frames(self, images: bool = False) -> Iterator[MotionFrame]:
        """Every frame at `settings.fps`, with pixels if `images`; index and time count from the first frame, and time
        without a connection is left out of neither."""
        held = max(1, round(self._live.max_delay_s * self._settings.rate))
        return self._iterate("all" if images else "none", iter, held)

    def clips(self, frames_per_clip: int = 24) -> Iterator[MotionClip]:
        """Consecutive clips of `frames_per_clip` frames."""
        numbers = count()

        def cut(frames: Iterable[MotionFrame]) -> Iterator[MotionClip]:
            kind = MotionClip if self.exact else ApproximateClip
            marked = ((frame.kind == "I", frame) for frame in frames)
            for _, clip in consecutive_clips(marked, frames_per_clip):
                yield clip_of(next(numbers), clip, frames_per_clip, kind)

        held = max(1, int(self._live.max_delay_s * self._settings.rate / frames_per_clip))
        return self._iterate("key", cut, held)

    def _iterate(
        self, images: Images, package: Callable[[Iterable[MotionFrame]], Iterator[T]], held: int
    ) -> Iterator[T]:
        self.close()
        queue: Handover[T] = Handover(held, HELD_BYTES, drop=not is_pipe(self._full_address))
        stop = self._stop = Event()
        self._thread = Thread(target=self._work, args=(queue, stop, images, package), daemon=True)
        self._thread.start()
        try:
            for item in queue:
                self.statistics.dropped = queue.dropped
                yield item
        finally:
            stop.set()
            queue.end()
            self.close()

    def _work(
        self,
        queue: Handover[T],
        stop: Event,
        images: Images,
        package: Callable[[Iterable[MotionFrame]], Iterator[T]],
    ) -> None:
        """The thread: connect, read, connect again."""

        def stopped() -> bool:
            return self._ending or stop.is_set()

        failures = 0
        started: float | None = None
        try:
            while not stopped():
                before = self.statistics.frames
                try:
                    with connect(
                        self._full_address,
                        self._live.timeout_s,
                        self._live.options,
                        stopped,
                        self.statistics,
                    ) as connection:
                        self.statistics.connections += 1
                        started = started if started is not None else time.monotonic()
                        frames = self._counted(connection, images, started)
                        for item in package(frames):
                            if not queue.put(item, _bytes(item)):
                                return
                        if connection.finite:
                            break
                        reason = "the stream ended"
                except ConnectionLost as lost:
                    reason = str(lost)
                if stopped():
                    break
                failures = 1 if self.statistics.frames > before else failures + 1
                if failures > self._live.attempts or is_pipe(self._full_address):
                    again = f", {failures} times in a row" if failures > 1 else ""
                    raise MediaError(
                        f"{self.address}: no video ({reason}){again}; "
                        "check the address, that the camera is on, and its codec (H.264 is best)"
                    )
                again_at = time.monotonic() + min(self._live.backoff_s * 2 ** (failures - 1), MAX_BACKOFF)
                while not stopped() and time.monotonic() < again_at:
                    stop.wait(min(0.1, self._live.backoff_s))
            if not self.statistics.frames and not stopped():
                raise MediaError(f"{self.address}: ended without a frame that can be decoded; write H.264 in MPEG-TS")
        except Exception as error:  # whatever it is, the reader must hear of it
            queue.end(error)
        finally:
            queue.end()

    def _counted(self, connection: Connection, images: Images, started: float) -> Iterator[MotionFrame]:
        """Frames of `connection`, numbered on from those of the connections before."""
        rate = self._settings.rate
        first = max(self.statistics.frames, round((time.monotonic() - started) * rate)) if self.statistics.frames else 0
        for frame in self._frames(connection, images):
            self._size = self._size or (frame.width, frame.height)
            if (frame.width, frame.height) != self._size:
                raise MediaError(
                    f"{self.address}: now sends {frame.width}x{frame.height} pixels instead of "
                    f"{self._size[0]}x{self._size[1]}; start again to read it"
                )
            index = first + frame.index
            self.statistics.frames = index + 1
            yield replace(frame, index=index, time_s=float(index / rate))

    def _frames(self, connection: Connection, images: Images) -> Iterator[MotionFrame]:
        if self.used == "codec" and connection.codec not in CODECS and self._fall_back:
            self.used = "mpeg4"
        if self.used == "mpeg4":
            connection.stream.codec_context.thread_count = 1
            return reencoded(connection.frames(), self._settings, images)
        check_vectors(self.address, connection.codec)
        export_vectors(connection.stream.codec_context, pixels=images != "none")
        return sampled(pictures(connection.frames()), self._settings, images)


def reencoded(frames: Iterable[Timed[VideoFrame]], settings: MotionSettings, images: Images) -> Iterator[MotionFrame]:
    """Motion of decoded frames by re-encoding (`runtime.motion.mpeg4`), frame by frame as they come."""
    decoder = VectorDecoder(pixels_of_p_frames=images == "all")
    packets = encode(map(upright, at_rate(frames, settings.rate)), settings)
    for index, frame in enumerate(decoder.decode(packets)):
        key = frame.key_frame
        yield MotionFrame(
            index=index,
            time_s=float(index / settings.rate),
            kind="I" if key else "P",
            grid=None if key else macroblock_grid(motion_vectors(frame), frame.width, frame.height, settings.rescale),
            image=rgb(frame) if images == "all" or (images == "key" and key) else None,
            width=frame.width,
            height=frame.height,
        )


def _bytes(item: MotionFrame | MotionClip) -> int:
    arrays = (item.keyframe, item.grid) if isinstance(item, MotionClip) else (item.image, item.grid)
    return sum(array.nbytes for array in arrays if array is not None)
