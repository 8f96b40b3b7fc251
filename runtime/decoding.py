"""Opening a video file and reading its frames: upright, timed, one at a time.

Contract: only regular local files are opened, and nothing they name. The stream is chosen, timed and turned upright
the way the ffmpeg command line does it (reference semantics §11.1), because the frames that reach the model depend on
it. Undecodable packets are skipped; anything that leaves nothing to work with raises MediaError in one line. Decoding
is single-threaded: it costs the least CPU, and the tail of a damaged file does not depend on the machine.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, islice
from math import atan2, degrees, hypot
from pathlib import Path
from typing import Any, cast

import av
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError
from av.filter import Graph
from av.packet import Packet
from av.sidedata.sidedata import SideDataContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from runtime.errors import MediaError
from runtime.frame_rate import Timed, at_rate, round_half_away, slot

MAX_SIDE = 8191  # the MPEG-4 encoder's limit, pixels
MAX_GAP = 600  # seconds without a frame; more is a damaged time stamp, and filling it would not end
PAUSE = 60  # seconds; a longer gap is unusual
MAX_PAUSES = 3600  # seconds in such gaps in one video; a damaged rate makes every gap long, and the video weeks
LOOKAHEAD = 32  # packets; more than any codec reorders
LEAP = 10  # seconds; containers without a common clock may leap further, which is no gap in the video
SEEK_BACK = (0, 10, None)  # seconds to seek to before a frame, in turn; some containers land behind it. None: the start
_SEPARATE_CLOCKS = 0x0200  # FFmpeg's AVFMT_TS_DISCONT, a flag of container formats
SKIPPABLE = frozenset({"h264", "hevc"})  # decoders that drop a non-reference frame on request and nothing else


@contextmanager
def media_errors(path: Path) -> Iterator[None]:
    """Turn FFmpeg's errors into MediaError naming `path`."""
    try:
        yield
    except FFmpegError as error:
        reason = (error.strerror or str(error)).rstrip(".").lower()
        raise MediaError(
            f"{path}: is not a video that can be read ({reason}); if it plays elsewhere, convert it to H.264 in mp4"
        ) from error


@contextmanager
def open_video(path: Path | str) -> Iterator[VideoSource]:
    """Open the video file at `path`; MediaError if it is missing, empty, not a video, or too large to read."""
    path = Path(path)
    if not path.exists():
        raise MediaError(f"{path}: no such file")
    if not path.is_file():
        raise MediaError(f"{path}: is not a file; name a video file")
    try:
        if path.stat().st_size == 0:
            raise MediaError(f"{path}: is empty; give a video file")
        with path.open("rb"):
            pass
    except OSError as error:
        raise MediaError(f"{path}: cannot be opened: {error.strerror}") from error
    with media_errors(path):
        # The prefix keeps a name with a colon from being read as a protocol, and FFmpeg keeps playlists opened through
        # it on this disk. No options: PyAV then crashes on containers whose streams appear late (MPEG-PS).
        container = av.open(f"file:{path}", metadata_errors="replace")
    with container:
        yield VideoSource(path, container, _video_stream(path, container))


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    name = container.format.name
    if name == "image2" or name.endswith("_pipe"):
        raise MediaError(f"{path}: is a picture, not a video; `ask` and `generate --image` take pictures")
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams or name == "tty":
        raise MediaError(f"{path}: has no video stream; give a file with moving pictures")
    known = [s for s in streams if s.codec_context is not None]
    if not known:
        raise MediaError(f"{path}: its video codec is not known; convert it to H.264 in mp4")
    best = max(known, key=lambda s: s.width * s.height + 5_000_000 * bool(s.disposition & Disposition.default))
    check_sides(path, best.width, best.height)
    return best


def check_sides(path: Path, width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise MediaError(f"{path}: {width}x{height} is too large; sides up to {MAX_SIDE} pixels are read, shrink it")


class VideoSource:
    """One open video file.

    Attributes:
        path, container, stream: where the frames come from.
        origin: time stamp that counts as time zero, in units of the stream's time base.
        restarts: whether time stamps that restart or leap were met so far; times then are as if they went on.
    """

    def __init__(self, path: Path, container: InputContainer, stream: VideoStream) -> None:
        self.path = path
        self.container = container
        self.stream = stream
        self.time_base = stream.time_base or Fraction(1, av.time_base)
        self.origin = self._origin()
        self.restarts = False
        self._most = MAX_GAP / self.time_base  # time base ticks
        context = stream.codec_context
        context.thread_count = 1

    def _origin(self) -> int:
        start = self.container.start_time or 0  # microseconds
        if self.container.format.flags & _SEPARATE_CLOCKS and self.stream.start_time is not None:
            # Such containers have no common clock start; only the streams in use count.
            start = max(start, round_half_away(self.stream.start_time * self.time_base * av.time_base))
        return round_half_away(Fraction(start, av.time_base) / self.time_base)

    def frames(self) -> Iterator[VideoFrame]:
        """Every decodable frame in presentation order, as stored: `upright` turns it."""
        return (timed.frame for timed in self._decoded((packet, False) for packet in self._packets()))

    def frames_at(self, rate: Fraction) -> Iterator[VideoFrame]:
        """The upright frame of every slot of a video at `rate` frames per second."""
        return self._upright(at_rate(self._decoded(self._marked(rate, None, self._packets())), rate))

    def frames_between(self, rate: Fraction, first: int, last: int) -> Iterator[VideoFrame]:
        """The upright frames of slots `first` to `last` - 1, decoded from the key frame before them on.

        They are those of `frames_at` where the file's time stamps and index are sound.
        """
        for back in SEEK_BACK:
            midway = self._seek(first / rate, back)
            decoded = self._decoded(self._marked(rate, first, self._packets(midway)), midway)
            head = next(decoded, None)
            if head is not None and (slot(head.time, rate) <= first or not midway):
                yield from islice(self._upright(at_rate(chain([head], decoded), rate, first)), last - first)
                return

    def span(self) -> tuple[Fraction, Fraction] | None:
        """Seconds at which the first frame starts and the last one ends, from the time stamps of all packets; None
        where one is missing or leaps. Reads the file to its end and decodes nothing."""
        first: int | None = None
        last = end = previous = 0
        for packet in self._packets():
            if packet is None or packet.is_discard:
                continue
            if packet.pts is None or (first is not None and packet.pts - previous > self._most):
                return None
            if first is None or packet.pts > last:
                last = packet.pts
                end = last + round_half_away(self._lasting(packet.duration) / self.time_base)
            first = packet.pts if first is None else min(first, packet.pts)
            previous = packet.pts
        if first is None or self.restarts:
            return None
        return (first - self.origin) * self.time_base, (end - self.origin) * self.time_base

    def _seek(self, time: Fraction, back: int | None) -> bool:
        """Go to the key frame at least `back` seconds before `time`, or to the start of the file if `back` is None;
        returns whether the file is now read from its middle."""
        beginning = min(self.origin, self.stream.start_time or 0)
        target = self.origin + round_half_away((time - back) / self.time_base) if back is not None else beginning
        midway = target > beginning
        # Seeking to the very first time stamp lands behind it in some containers, seeking before it fails in others.
        targets = [target] if midway else [beginning - round_half_away(1 / self.time_base), beginning]
        for attempt in targets:
            try:
                self.container.seek(attempt, stream=self.stream)
                return midway
            except FFmpegError as error:
                problem = error
        raise MediaError(f"{self.path}: cannot be read from the middle; read it as a whole") from problem

    def _marked(
        self, rate: Fraction, first: int | None, packets: Iterable[Packet | None]
    ) -> Iterator[tuple[Packet | None, bool]]:
        """Packets, and whether each may be left out because its frame fills no slot (from `first` on)."""
        context = self.stream.codec_context
        if context.name in SKIPPABLE or context.codec.intra_only:
            return _mark_unused(packets, rate * self.time_base, self.origin, first)
        return ((packet, False) for packet in packets)

    def _decoded(
        self, marked: Iterable[tuple[Packet | None, bool]], midway: bool = False
    ) -> Iterator[Timed[VideoFrame]]:
        """Timed frames of packets; those of unused packets may be missing. `midway`: the packets start at a key frame
        in the middle of the file, and frames before it, which need earlier ones, are left out."""
        context: VideoCodecContext = self.stream.codec_context
        omit = context.codec.intra_only  # nothing refers to an unused frame
        skipping: bool | None = None
        following = Fraction(0)
        previous: Fraction | None = None if midway else following
        paused = Fraction(0)
        floor: int | None = None
        for packet, unused in marked:
            if midway and floor is None and packet is not None:
                floor = packet.pts
            if unused and omit:
                continue
            if unused is not skipping:
                context.skip_frame, skipping = ("NONREF" if unused else "DEFAULT"), unused
            for frame in self._decode(context, packet):
                ticks = frame.pts if frame.pts is not None else frame.dts
                if floor is not None and ticks is not None and ticks < floor:
                    continue
                time = (ticks - self.origin) * self.time_base if ticks is not None else following
                gap = time - previous if previous is not None else Fraction(0)
                paused += gap if gap > PAUSE else 0
                if gap > MAX_GAP or paused > MAX_PAUSES:
                    raise MediaError(
                        f"{self.path}: no frame for {float(gap):.0f} s before {float(time):.1f} s; gaps up to "
                        f"{MAX_GAP} s are filled, and {MAX_PAUSES} s of those above {PAUSE} s, so cut the file or "
                        "repair its time stamps"
                    )
                previous = time if previous is None else max(previous, time)
                following = time + self._lasting(frame.duration, packet.duration if packet is not None else None)
                yield Timed(frame, time, following)

    def _upright(self, frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
        """`frames` upright and of a size that can be read; one that is repeated is turned once."""
        previous: VideoFrame | None = None
        turned: VideoFrame | None = None
        for frame in frames:
            if frame is not previous or turned is None:
                check_sides(self.path, frame.width, frame.height)
                previous, turned = frame, upright(frame)
            yield turned

    def _lasting(self, *stated: int | None) -> Fraction:
        """Seconds a frame lasts by the first sound one of the `stated` durations, or else by the frame rate."""
        for ticks in stated:
            if ticks and 0 < ticks <= self._most:
                return ticks * self.time_base
        rates = (self.stream.codec_context.framerate, self.stream.average_rate, self.stream.guessed_rate)
        return next((1 / rate for rate in rates if rate and 1 / rate <= MAX_GAP), Fraction(1, 25))

    def _packets(self, midway: bool = False) -> Iterator[Packet | None]:
        """The stream's packets (`midway`: from the next key frame on), then None; a file that breaks off ends there."""
        clock = _Clock(self.time_base) if self.container.format.flags & _SEPARATE_CLOCKS else None
        demuxed = self.container.demux(self.stream)
        while True:
            try:
                packet = next(demuxed, None)
            except FFmpegError:
                packet = None
            if packet is None or packet.size == 0:  # PyAV ends with an empty packet
                yield None
                return
            if clock is not None:
                self.restarts |= clock.correct(packet)
            midway = midway and not packet.is_keyframe
            if not midway:
                yield packet

    @staticmethod
    def _decode(context: VideoCodecContext, packet: Packet | None) -> list[VideoFrame]:
        try:
            return context.decode(packet)
        except (InvalidDataError, av.error.EOFError):
            return []


class _Clock:
    """Makes time stamps go on where they restart or leap, as in broadcasts and in joined files."""

    def __init__(self, time_base: Fraction) -> None:
        self._leap = round_half_away(LEAP / time_base)
        self._back = round_half_away(Fraction(1, 10) / time_base)
        self._offset = 0
        self._last: int | None = None
        self._following = 0

    def correct(self, packet: Packet) -> bool:
        """Change the time stamps of `packet`; returns whether they did not follow those before."""
        if packet.dts is None:
            return False
        dts = packet.dts + self._offset
        gap = dts - self._following
        leaps = self._last is not None and (abs(gap) > self._leap or dts + self._back < self._last)
        if leaps:
            self._offset -= gap
        if self._offset:
            packet.dts += self._offset
            if packet.pts is not None:
                packet.pts += self._offset
        self._last = packet.dts
        self._following = packet.dts + (packet.duration or 0)
        return leaps


def _mark_unused(
    packets: Iterable[Packet | None], rate: Fraction, origin: int, first: int | None
) -> Iterator[tuple[Packet | None, bool]]:
    """Mark packets whose slot a later frame takes anyway (`rate` in slots per time base tick). With `first`, earlier
    slots count as that one: of the frames before it only the last is needed."""
    window: deque[tuple[Packet | None, int, int]] = deque()  # packet, slot, time stamp
    latest: dict[int, int] = {}  # of recent slots: time stamp of the last frame
    unknown = (0, 1 << 63)  # no frame is later
    for packet in packets:
        place = unknown
        if packet is not None and packet.pts is not None and not packet.is_corrupt:
            own = slot(packet.pts - origin, rate)
            own = own if first is None else max(own, first)
            place = own, packet.pts
            if not packet.is_discard:
                latest[own] = max(latest.pop(own, packet.pts), packet.pts)
                if len(latest) > 2 * LOOKAHEAD:
                    del latest[next(iter(latest))]
        window.append((packet, *place))
        if len(window) > LOOKAHEAD:
            head, own, pts = window.popleft()
            yield head, latest.get(own, pts) > pts
    for head, own, pts in window:
        yield head, latest.get(own, pts) > pts


def side_data(frame: VideoFrame, name: str) -> Any:
    """Side data of `frame`, or None. `frame.side_data` would tie the frame into a reference cycle, which keeps its
    pixels until the garbage collector comes by."""
    return SideDataContainer(frame).get(name)  # type: ignore[call-arg]


def rotation(frame: VideoFrame) -> int:
    """Degrees in [0, 360) by which the frame must be turned clockwise to stand upright, from its display matrix."""
    matrix = _display_matrix(frame)
    return _angle(matrix) if matrix is not None else 0


def upright(frame: VideoFrame) -> VideoFrame:
    """Turn and mirror `frame` as its display matrix asks, in its own pixel format."""
    matrix = _display_matrix(frame)
    if matrix is None:
        return frame
    angle = _angle(matrix)
    steps: list[tuple[str, str | None]] = []
    if angle == 90:
        steps = [("transpose", "cclock_flip" if matrix[3] > 0 else "clock")]
    elif angle == 180:
        steps = [(name, None) for name, entry in (("hflip", matrix[0]), ("vflip", matrix[4])) if entry < 0]
    elif angle == 270:
        steps = [("transpose", "clock_flip" if matrix[3] < 0 else "cclock")]
    elif angle:
        steps = [("rotate", f"{angle}*PI/180")]
    elif matrix[4] < 0:
        steps = [("vflip", None)]
    return _filtered(frame, steps) if steps else frame


def _display_matrix(frame: VideoFrame) -> tuple[int, ...] | None:
    data = side_data(frame, "DISPLAYMATRIX")
    return struct.unpack("<9i", bytes(data)) if data is not None else None


def _angle(matrix: tuple[int, ...]) -> int:
    x, y = hypot(matrix[0], matrix[3]), hypot(matrix[1], matrix[4])
    if not x or not y:
        return 0
    return round(degrees(atan2(matrix[1] / y, matrix[0] / x))) % 360


def _filtered(frame: VideoFrame, steps: list[tuple[str, str | None]]) -> VideoFrame:
    graph = Graph()
    nodes = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1))]
    nodes += [graph.add(name, arguments) for name, arguments in steps]
    nodes += [graph.add("copy"), graph.add("buffersink")]  # a flip only points at the rows backwards; copy them
    graph.link_nodes(*nodes).configure()
    frame.pts = frame.pts or 0
    graph.push(frame)
    return cast(VideoFrame, graph.pull())
