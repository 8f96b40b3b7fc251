"""Small videos of every kind, made with PyAV for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame

MATRIX_OFFSET = 36  # bytes from the tag of an mp4 track header (version 0) to its display matrix, less the tag
ONE = 1 << 16


def scene(index: int, width: int, height: int, cut: int | None = None) -> np.ndarray:
    """Frame `index` of a texture that drifts right 2 pixels a frame, plain from frame `cut` on, uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
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
) -> Path:
    """Write a video; `times` are time stamps in thousandths of a second instead of a constant rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        time_base = Fraction(1, 1000) if times is not None else 1 / Fraction(rate)
        stream.codec_context.time_base = time_base
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
