"""Small videos of every kind, made with PyAV for the tests; `ZOO` lists them, `specimen` makes one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame

MATRIX_OFFSET = 36  # bytes from the tag of an mp4 track header (version 0) to its display matrix, less the tag
ONE = 1 << 16
INTERLACED = 1 << 18 | 1 << 29  # FFmpeg's flags ILDCT and ILME


def scene(index: int, width: int, height: int, cut: int | None = None) -> np.ndarray:
    """Frame `index` of a texture that drifts right 2 pixels a frame, plain from frame `cut` on, uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    drift = x - 2 * index
    light = 50 * np.sin(drift / 5 + y / 13) + 40 * np.cos(y / 4 - drift / 17)
    rgb = 128 + np.stack([light, 0.8 * light + drift / 8 % 12, light + y / 4], -1)
    if cut is not None and index >= cut:
        rgb = np.full_like(rgb, 230) - (y / 4)[..., None]
    return rgb.clip(0, 255).astype(np.uint8)


def make(
    path: Path,
    frames: int = 60,
    size: tuple[int, int] = (96, 64),
    rate: Fraction | int = 30,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times: Sequence[int] | None = None,
    cut: int | None = None,
    audio: bool = False,
    options: dict[str, str] | None = None,
    interlaced: bool = False,
    full_range: bool = False,
) -> Path:
    """Write a video; `times` are time stamps in thousandths of a second instead of a constant rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        time_base = Fraction(1, 1000) if times is not None else 1 / Fraction(rate)
        stream.codec_context.time_base = time_base
        if interlaced:
            stream.codec_context.flags |= INTERLACED
        if full_range:
            stream.codec_context.color_range = 2
        sound = container.add_stream("aac", rate=8000) if audio else None
        for index in range(frames):
            frame = VideoFrame.from_ndarray(scene(index, *size, cut), format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = times[index] if times is not None else index, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            for packet in _silence(sound, frames):
                container.mux(packet)
    return path


def _silence(sound, frames):
    for index in range(frames):
        chunk = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        chunk.sample_rate, chunk.pts = 8000, 1024 * index
        yield sound.encode(chunk)
    yield sound.encode(None)


def audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        for packet in _silence(sound, 20):
            container.mux(packet)
    return path


def rotated(path: Path, degrees: int, mirrored: bool = False, **settings) -> Path:
    """An mp4 whose track header asks for a clockwise turn by `degrees`."""
    make(path, **settings)
    a, b, c, d = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    if mirrored:
        a, c = -a, -c
    matrix = np.array([a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30], ">i4").tobytes()
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + MATRIX_OFFSET + 4
    data[start : start + 36] = matrix
    path.write_bytes(data)
    return path


def joined(path: Path, *parts: Path) -> Path:
    """A file that is others one after the other, byte for byte."""
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def resized(path: Path, **settings) -> Path:
    """A stream that changes from 96x64 to 128x48 in the middle."""
    sizes = ((96, 64), (128, 48))
    return joined(
        path, *(make(path.with_name(f"part{i}_{path.name}"), size=s, **settings) for i, s in enumerate(sizes))
    )


@dataclass(frozen=True)
class Specimen:
    """How to make a video and what it is.

    Attributes:
        write: makes it at a path.
        count: frames at 6 per second; all were compared with the ffmpeg command line's.
        size: (width, height) as shown.
        shown: its source frame of an index, as shown.
    """

    write: Callable[[Path], Path]
    count: int
    size: tuple[int, int]
    shown: Callable[[int], np.ndarray]


def _plain(count: int, size: tuple[int, int] = (96, 64), cut: int | None = None, **settings) -> Specimen:
    write = partial(make, size=size, cut=cut, **settings)
    return Specimen(write, count, size, lambda index: scene(index, *size, cut))


def _turned(degrees: int, mirrored: bool = False) -> Specimen:
    def shown(index: int) -> np.ndarray:
        picture = np.rot90(scene(index, 96, 64), -degrees // 90)
        return picture[:, ::-1] if mirrored else picture  # the header's matrix mirrors x after the turn

    write = partial(rotated, degrees=degrees, mirrored=mirrored, frames=20, rate=12)
    return Specimen(write, 10, (64, 96) if degrees in (90, 270) else (96, 64), shown)


def _resized(count: int) -> Specimen:
    return Specimen(partial(resized, frames=30), count, (96, 64), lambda index: scene(index, 96, 64))


VFR = (0, 20, 50, 55, 60, 300, 310, 800, 810, 1600, 1650, 1700, 1710, 1720, 2500)
JITTER = tuple(40 * i + (17 * i) % 23 for i in range(50))
X265 = {"x265-params": "log-level=none"}
LATE = [1500 + 33 * i for i in range(30)]
ODD = (97, 63)
ZOO = {
    # rates
    "film.mp4": _plain(15, rate=Fraction(24000, 1001)),
    "cinema.mkv": _plain(12, rate=24, frames=48),
    "pal.mov": _plain(12, rate=25, frames=50),
    "ntsc.mp4": _plain(12, rate=Fraction(30000, 1001)),
    "pal_fast.mp4": _plain(10, rate=50, frames=80),
    "ntsc_fast.mp4": _plain(10, rate=Fraction(60000, 1001), frames=100),
    "fast.mkv": _plain(10, rate=60, frames=100),
    "slow.mp4": _plain(24, rate=3, frames=12),
    "slides.mp4": _plain(36, rate=Fraction(1, 2), frames=3),
    "odd_rate.mkv": _plain(14, rate=13, frames=30),
    # time stamps
    "vfr.mkv": _plain(15, frames=len(VFR), times=VFR),
    "vfr.mp4": _plain(15, frames=len(VFR), times=VFR),
    "jitter.mp4": _plain(12, frames=len(JITTER), times=JITTER),
    "late.mp4": _plain(15, frames=30, times=LATE, audio=True),
    "late_alone.mkv": _plain(6, frames=30, times=LATE),
    "no_time_stamps.h264": _plain(14, rate=25),
    "no_time_stamps.m4v": _plain(14, codec="mpeg4", rate=25),
    "no_time_stamps.hevc": _plain(14, codec="libx265", rate=25, options=X265),
    # sizes
    "odd.mkv": _plain(12, size=ODD, codec="ffv1"),
    "odd444.mkv": _plain(12, size=ODD, codec="ffv1", pix_fmt="yuv444p"),
    "tiny.mp4": _plain(12, size=(16, 16)),
    "portrait.webm": _plain(12, codec="libvpx-vp9", size=(48, 112), frames=20, rate=10),
    "wide.mp4": _plain(12, size=(320, 34)),
    "uhd.mp4": _plain(2, size=(3840, 2160), frames=2, rate=6, options={"preset": "ultrafast"}),
    "resized.ts": _resized(12),
    "resized.h264": _resized(12),
    # display matrix
    "turned90.mp4": _turned(90),
    "turned180.mp4": _turned(180),
    "turned270.mp4": _turned(270),
    "mirrored.mp4": _turned(0, mirrored=True),
    "mirrored90.mp4": _turned(90, mirrored=True),
    # pixels
    "interlaced.mpg": _plain(14, codec="mpeg2video", rate=25, interlaced=True),
    "interlaced.mp4": _plain(12, interlaced=True, options={"x264-params": "tff=1"}),
    "ten_bit.mp4": _plain(12, codec="libx265", pix_fmt="yuv420p10le", options=X265),
    "ten_bit_h264.mkv": _plain(12, pix_fmt="yuv420p10le"),
    "twelve_bit.mkv": _plain(12, codec="ffv1", pix_fmt="yuv422p12le"),
    "alpha.mkv": _plain(12, codec="ffv1", pix_fmt="bgra"),
    "alpha.webm": _plain(12, codec="libvpx-vp9", pix_fmt="yuva420p", frames=20, rate=10),
    "alpha.mov": _plain(12, codec="qtrle", pix_fmt="argb"),
    "grey.mkv": _plain(12, codec="ffv1", pix_fmt="gray"),
    "full_range.avi": _plain(12, codec="mjpeg", pix_fmt="yuvj420p"),
    "full_range.mp4": _plain(12, full_range=True),
    "full_range444.avi": _plain(12, codec="mjpeg", pix_fmt="yuvj444p"),
    "chroma422.mov": _plain(12, codec="prores_ks", pix_fmt="yuv422p10le"),
    "palette.gif": _plain(12, codec="gif", pix_fmt="rgb8", rate=10, frames=20),
    # content
    "one.mp4": _plain(1, frames=1, rate=6),
    "two.mp4": _plain(2, frames=2, rate=6),
    "cut.mp4": _plain(45, frames=90, rate=12, cut=39),
    "still.mkv": _plain(12, frames=60, cut=0),
    "b_frames.mp4": _plain(12, options={"bf": "3", "b-adapt": "0", "b-pyramid": "none"}),
    "short_groups.mp4": _plain(12, options={"g": "7", "bf": "0"}),
    # containers
    "stream.ts": _plain(12, audio=True),
    "program.mpg": _plain(14, codec="mpeg2video", rate=25),
    "old.avi": _plain(12, codec="mpeg4", options={"bf": "2"}),
    "older.wmv": _plain(12, codec="wmv2"),
    "flash.flv": _plain(12, codec="flv1"),
    "phone.3gp": _plain(12, codec="h263", size=(176, 144)),
    "motion_jpeg.mov": _plain(12, codec="mjpeg", pix_fmt="yuvj422p"),
}


def specimen(name: str, folder: Path) -> Path:
    """The file `name` of the zoo in `folder`; made if it is not there yet."""
    path = folder / name
    return path if path.exists() else ZOO[name].write(path)
