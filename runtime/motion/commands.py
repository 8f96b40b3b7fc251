"""The `motion` command: read, store and draw the motion vectors of a video or a live stream.

Contract: one pass over the video; the summary goes to stdout, files appear complete or not at all. A live stream ends
with `--duration`, with Ctrl-C or when it is lost; what was read until then is kept.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from fractions import Fraction
from itertools import takewhile
from math import atan2, degrees
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from runtime.commands.options import output_options
from runtime.commands.report import Report
from runtime.errors import MediaError, UsageError
from runtime.files import check_output
from runtime.motion.archive import MotionArchive, open_archive
from runtime.motion.connection import shown
from runtime.motion.grid import to_pixels
from runtime.motion.mpeg4 import MotionSettings
from runtime.motion.overlay import draw
from runtime.motion.select import SOURCES, LiveMotion, MotionSource, SourceName, open_source
from runtime.motion.sources import MotionFrame
from runtime.progress import Progress
from runtime.video import SUFFIXES, write_video

STILL = 0.05  # pixels per frame; a slower mean motion has no direction
_DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")


class Slices(click.ParamType):
    """A number of slices, or `auto`."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["auto"]:
        if value == "auto" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor `auto`", param, ctx)


@click.command()
@click.argument("video")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Store grids, frame types and times (.npz).")
@click.option("--overlay", type=click.Path(path_type=Path), help="Draw arrows and key-frame marks (.mp4 or .gif).")
@click.option(
    "--fps",
    type=click.FloatRange(0, 1000, min_open=True),
    default=6.0,
    show_default=True,
    help="Frames per second at which motion is read.",
)
@click.option(
    "--slices",
    type=Slices(),
    default=1,
    show_default=True,
    help="Slices of a re-encoded frame; `auto` is what the ffmpeg command line takes on this machine.",
)
@click.option(
    "--source",
    "source_name",
    type=click.Choice(SOURCES),
    default="mpeg4",
    show_default=True,
    help="Re-encode as for training (exact), take the vectors the video carries (approximate), or those of NVIDIA's "
    "hardware decoder (approximate).",
)
@click.option("--fallback", type=click.Choice(["mpeg4"]), help="What to use where --source finds no vectors.")
@click.option(
    "--sparse",
    is_flag=True,
    help="Of a long file read only the clips that `ask` looks at (8 of 24 frames). Quick; motion is exact in a video "
    "without scene cuts that 8 Mbit/s suffice for, and not checked, so the result is marked approximate.",
)
@click.option("--duration", type=click.FloatRange(0, min_open=True), help="Stop after this many seconds of video.")
@output_options
def motion(
    video: str,
    output: Path | None,
    overlay: Path | None,
    fps: float,
    slices: int | Literal["auto"],
    source_name: SourceName,
    fallback: Literal["mpeg4"] | None,
    sparse: bool,
    duration: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Read the motion vectors of VIDEO and print a summary.

    VIDEO is a file, or a live stream: an rtsp, udp, tcp or http address, pipe:0, a named pipe, or a camera such as
    /dev/video0. It is brought to --fps and re-encoded in memory, as the model's training data was, unless --source
    says otherwise.
    """
    settings = MotionSettings(fps=Fraction(fps).limit_denominator(1001), slices=slices, sparse=sparse)
    if output is not None and overlay is not None and output.resolve() == overlay.resolve():
        raise UsageError(f"--overlay {overlay}: is the same file as --output; choose another name")
    if overlay is not None:
        check_output(overlay, SUFFIXES, force)
    source = open_source(video, source_name, settings, fallback)
    name = shown(video) if isinstance(source, LiveMotion) else Path(video).name
    summary = Summary()
    with Report(as_json) as report, ExitStack() as stack:
        archive = None
        if output is not None:
            archive = stack.enter_context(open_archive(output, name, settings, source, force))
        frames = stack.enter_context(closing(source.frames(images=overlay is not None)))  # type: ignore[type-var]
        wanted: Iterator[MotionFrame] = takewhile(lambda frame: duration is None or frame.time_s < duration, frames)
        if isinstance(source, LiveMotion):
            wanted = _until_lost(wanted, report)
            stack.enter_context(_ending_on_ctrl_c(source))
        read = _watched(wanted, summary, archive, report, settings)
        if overlay is not None:
            metadata = {"source": name, "fps": str(settings.rate), "slices": str(slices), "motion_source": source.name}
            write_video(overlay, (draw(f, settings.rescale) for f in read), settings.rate, metadata, force)
        else:
            for _ in read:
                pass
        if source.name != source_name:
            report.note(f"{name}: --source {source_name} finds no vectors there; read with {source.name}")
    values = summary.values() | {"motion_source": source.name, "exact": source.exact} | _losses(source)
    values |= {"sparse": True} if sparse and not source.exact else {}
    files = {name: str(path) for name, path in (("output", output), ("overlay", overlay)) if path is not None}
    shown_as = name if isinstance(source, LiveMotion) else video
    report.result(_table(name, values | files), source=shown_as, fps=float(settings.rate), **values, **files)


def _until_lost(frames: Iterator[MotionFrame], report: Report) -> Iterator[MotionFrame]:
    """The frames of a live stream until it is lost for good; MediaError if there is none."""
    found = False
    try:
        for frame in frames:
            found = True
            yield frame
    except MediaError as error:
        if not found:
            raise
        report.note(str(error))
    if not found:
        raise MediaError("stopped before the first frame came")


@contextmanager
def _ending_on_ctrl_c(source: LiveMotion) -> Iterator[None]:
    """The first Ctrl-C ends the stream, so that what was read is stored; the second one stops the command."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's business
        return
    before = signal.getsignal(signal.SIGINT)

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        source.stream.end()

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _losses(source: MotionSource) -> dict[str, int]:
    if not isinstance(source, LiveMotion):
        return {}
    statistics = source.stream.statistics
    return {name: getattr(statistics, name) for name in ("connections", "corrupt", "skipped", "dropped")}


def _watched(
    source: Iterator[MotionFrame],
    summary: Summary,
    archive: MotionArchive | None,
    report: Report,
    settings: MotionSettings,
) -> Iterator[MotionFrame]:
    for frame in source:
        summary.add(frame, settings)
        if archive is not None:
            archive.add(frame)
        report.progress(Progress("motion", frame.index + 1))
        yield frame
    report.finish_stage("motion")


class Summary:
    """Running totals over the frames of a video."""

    def __init__(self) -> None:
        self.frames = self.keyframes = self.blocks = 0
        self.size = (0, 0)
        self.speed = 0.0  # sum over macroblocks of pixels per frame
        self.total = np.zeros(2)  # sum of (x, y)

    def add(self, frame: MotionFrame, settings: MotionSettings) -> None:
        self.frames += 1
        self.size = (frame.width, frame.height)
        if frame.grid is None:
            self.keyframes += 1
            return
        pixels = to_pixels(frame.grid, frame.width, frame.height, settings.rescale)
        self.blocks += pixels[0].size
        self.speed += float(np.hypot(*pixels).sum(dtype=np.float64))
        self.total += pixels.sum(axis=(1, 2), dtype=np.float64)

    def values(self) -> dict[str, Any]:
        """Counts, and over the macroblocks of P frames mean speed and motion (pixels per frame) and its direction."""
        count = max(self.blocks, 1)
        x, y = (float(v) for v in self.total / count)
        octant = round(degrees(atan2(y, x)) / 45) % 8
        return {
            "frames": self.frames,
            "i_frames": self.keyframes,
            "width": self.size[0],
            "height": self.size[1],
            "mean_speed": self.speed / count,
            "mean_motion": (x, y),
            "direction": _DIRECTIONS[octant] if np.hypot(x, y) >= STILL else "none",
        }


def _quality(values: dict[str, Any]) -> str:
    if "sparse" in values:
        return "sparse: clips alone, not checked to be exact"
    return "exact" if values["exact"] else "approximate"


def _table(name: str, values: dict[str, Any]) -> str:
    table = Table(title=name, show_header=False, title_justify="left")
    x, y = values["mean_motion"]
    rows = {
        "source": f"{values['motion_source']} ({_quality(values)})",
        "frames": f"{values['frames']} ({values['width']}x{values['height']})",
        "I frames": str(values["i_frames"]),
        "mean speed": f"{values['mean_speed']:.2f} px/frame",
        "mean motion": f"x {x:+.2f}, y {y:+.2f} px/frame",
        "direction": values["direction"],
    }
    if "connections" in values:
        rows["stream"] = (
            f"{values['connections']} connections, {values['corrupt']} packets damaged, {values['skipped']} left out "
            f"until a key frame, {values['dropped']} frames dropped"
        )
    rows |= {name: values[name] for name in ("output", "overlay") if name in values}
    for name, text in rows.items():
        table.add_row(name, text)
    console = Console()
    with console.capture() as capture:
        console.print(table, markup=False)
    return capture.get().rstrip("\n")
