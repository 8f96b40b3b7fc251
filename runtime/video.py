"""Videos in and out.

Contract: frames are uint8 [H, W, 3] RGB, upright, one at a time; memory does not depend on length. Colours follow
BT.601 both ways, as in the pictures the model was trained on. Written files appear complete or not at all and carry
metadata; equal frames and metadata give equal files on one machine. Unusable inputs raise MediaError, unusable output
names UsageError.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from shutil import copyfileobj
from typing import cast

import av
import numpy as np
from av.container import OutputContainer
from av.error import FFmpegError
from av.filter import Graph
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from runtime.decoding import media_errors, open_video, rotation, upright
from runtime.errors import MediaError, UsageError
from runtime.files import check_output, published, writing
from runtime.images import SUFFIXES as PICTURE_SUFFIXES
from runtime.images import picture_metadata

SUFFIXES = (".mp4", ".gif")
_TAG = "comment"  # the metadata tag that mp4 keeps whole and every player ignores
_ENCODER_THREADS = 4  # fixed: x264's output depends on it
_BT601 = 6  # value of FFmpeg's colour enumerations


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds.

    Attributes:
        width, height: pixels of an upright frame.
        fps: mean frames per second, or None if the file does not say.
        duration: seconds, or None if the file does not say.
        codec: FFmpeg's name of the video codec.
        rotation: clockwise degrees by which stored frames are turned, 0 to 359.
        frames: number of frames, or None if the file does not say.
    """

    width: int
    height: int
    fps: float | None
    duration: float | None
    codec: str
    rotation: int
    frames: int | None


def probe(path: Path | str) -> VideoInfo:
    """Describe the video at `path`; decodes its first frame. MediaError if there is none."""
    path = Path(path)
    with open_video(path) as source, media_errors(path):
        stream = source.stream
        first = next(source.frames(), None)
        if first is None:
            raise _nothing(path)
        angle = rotation(first)
        width, height = first.width, first.height
        if angle in (90, 270):
            width, height = height, width
        duration = stream.duration * source.time_base if stream.duration else None
        if duration is None and source.container.duration:
            duration = Fraction(source.container.duration, av.time_base)
        return VideoInfo(
            width=width,
            height=height,
            fps=float(stream.average_rate) if stream.average_rate else None,
            duration=float(duration) if duration is not None else None,
            codec=stream.codec_context.name,
            rotation=angle,
            frames=stream.frames or None,
        )


def read_frames(path: Path | str, fps: float | Fraction | None = None) -> Iterator[np.ndarray]:
    """Frames uint8 [H, W, 3] of the video; with `fps`, resampled as for motion (`runtime.frame_rate`).

    A video whose frame size changes keeps its first size.
    """
    path = Path(path)
    size: tuple[int, int] | None = None
    with open_video(path) as source, media_errors(path):
        rate = Fraction(fps).limit_denominator(1001) if fps is not None else None
        frames: Iterator[VideoFrame] = source.frames_at(rate) if rate is not None else map(upright, source.frames())
        for frame in frames:
            size = size or (frame.width, frame.height)
            yield frame.reformat(*size, format="rgb24", interpolation="BICUBIC").to_ndarray()
    if size is None:
        raise _nothing(path)


def _nothing(path: Path) -> MediaError:
    return MediaError(f"{path}: no frame can be decoded; the file is damaged, cut short, or too short")


def write_video(
    path: Path | str, frames: Iterable[np.ndarray], fps: float | Fraction, metadata: Mapping[str, str], force: bool
) -> None:
    """Write `frames` (uint8 [H, W, 3], equal sizes) to an .mp4 (H.264) or .gif file.

    Args:
        frames: consumed one at a time; an odd side is repeated to the next even one in mp4.
        fps: frames per second.
        metadata: text the file carries, see `read_recipe`.
        force: replace an existing file.

    Raises:
        UsageError: unknown suffix, folder missing or not writable, file exists and not `force`, no frames.
    """
    path = Path(path)
    check_output(path, SUFFIXES, force)
    rate = Fraction(fps).limit_denominator(1001)
    if rate <= 0:
        raise UsageError(f"{path}: {fps} frames per second is not a frame rate; give one above 0")
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise UsageError(f"{path}: there is no frame to write")
    pictures = _same_size(path, first.shape, chain([first], iterator))
    text = json.dumps(dict(metadata), sort_keys=True)
    with published(path) as staging:
        if path.suffix.lower() == ".gif":
            _write_gif(path, staging, pictures, rate, text)
        else:
            _write_mp4(path, staging, pictures, rate, text)


def _same_size(path: Path, shape: tuple[int, ...], frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for number, frame in enumerate(frames):
        if frame.shape != shape or frame.dtype != np.uint8:
            raise UsageError(f"{path}: frame {number} is {frame.dtype} {frame.shape}, the first is uint8 {shape}")
        yield np.ascontiguousarray(frame)


def _write_mp4(path: Path, staging: Path, frames: Iterator[np.ndarray], rate: Fraction, text: str) -> None:
    def convert(frame: np.ndarray) -> VideoFrame:
        even = np.pad(frame, [(0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)], mode="edge")
        return VideoFrame.from_ndarray(even, format="rgb24").reformat(format="yuv420p", interpolation="BICUBIC")

    with _output(path, staging, {"movflags": "+faststart"}) as container:
        container.metadata[_TAG] = text
        # Without it equal frames gave other bytes now and then in a process that had used its memory; why is not known.
        options = {"crf": "16", "threads": str(_ENCODER_THREADS), "x264-params": "cpu-independent=1"}
        _encode(path, container, "libx264", options, map(convert, frames), rate)


def _write_gif(path: Path, staging: Path, frames: Iterator[np.ndarray], rate: Fraction, text: str) -> None:
    bare = staging.with_name(f"{staging.stem}.bare.gif")
    try:
        with _output(path, bare, {}) as container:
            _encode(path, container, "gif", {}, _with_palettes(frames), rate)
        with writing(path):
            _copy_with_comment(bare, staging, text.encode())
    finally:
        bare.unlink(missing_ok=True)


@contextmanager
def _output(path: Path, staging: Path, options: dict[str, str]) -> Iterator[OutputContainer]:
    with writing(path, FFmpegError):
        container = av.open(f"file:{staging}", "w", options=options)
    try:
        yield container
    finally:
        with writing(path, FFmpegError):
            container.close()


def _encode(
    path: Path,
    container: OutputContainer,
    codec: str,
    options: dict[str, str],
    frames: Iterable[VideoFrame],
    rate: Fraction,
) -> None:
    stream: VideoStream | None = None
    for number, frame in enumerate(frames):
        with writing(path, FFmpegError):
            if stream is None:
                stream = cast(VideoStream, container.add_stream(codec, rate=rate, options=options))
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, frame.format.name
                if codec != "gif":
                    context = stream.codec_context
                    context.colorspace = context.color_primaries = context.color_trc = _BT601
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
    if stream is not None:
        with writing(path, FFmpegError):
            container.mux(stream.encode(None))


def _with_palettes(frames: Iterable[np.ndarray]) -> Iterator[VideoFrame]:
    """Frames in 256 colours, each with a palette of its own so that only one frame is held."""
    rgb24 = VideoFormat("rgb24")
    for frame in frames:
        graph = Graph()
        source = graph.add_buffer(width=frame.shape[1], height=frame.shape[0], format=rgb24, time_base=Fraction(1))
        split, palette = graph.add("split"), graph.add("palettegen")
        use, sink = graph.add("paletteuse"), graph.add("buffersink")
        source.link_to(split)
        split.link_to(use, 0, 0)
        split.link_to(palette, 1, 0)
        palette.link_to(use, 0, 1)
        use.link_to(sink)
        graph.configure()
        picture = VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts = 0
        graph.push(picture)
        graph.push(None)
        yield cast(VideoFrame, graph.pull())


def _copy_with_comment(source: Path, target: Path, comment: bytes) -> None:
    """Copy a GIF file with a comment block behind its header; FFmpeg writes none."""
    with source.open("rb") as reader, target.open("wb") as writer:
        header = reader.read(13)
        table = 3 << ((header[10] & 7) + 1) if header[10] & 0x80 else 0  # bytes of the global colour table
        writer.write(header + reader.read(table))
        blocks = (comment[i : i + 255] for i in range(0, len(comment), 255))
        writer.write(b"\x21\xfe" + b"".join(bytes([len(b)]) + b for b in blocks) + b"\0")
        copyfileobj(reader, writer)


def read_recipe(path: Path | str) -> dict[str, str]:
    """Metadata that `write_video` or `save_image` stored in a file; empty if it holds none.

    Raises:
        MediaError: the file is missing or neither a video nor a picture.
    """
    path = Path(path)
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return picture_metadata(path)
    if path.suffix.lower() == ".gif":
        return _parse(picture_metadata(path).get(_TAG, ""))
    with open_video(path) as source:
        return _parse(source.container.metadata.get(_TAG, ""))


def _parse(text: str) -> dict[str, str]:
    """`text` as written by `write_video`; a comment of someone else's is not a recipe."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
