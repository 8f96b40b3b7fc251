"""The `motion` command: read, store and draw a video's motion vectors.

Contract: one pass over the video; the summary goes to stdout, files appear complete or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from math import atan2, degrees
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from runtime.commands.options import output_options
from runtime.commands.report import Report
from runtime.errors import UsageError
from runtime.files import check_output
from runtime.motion.archive import MotionArchive, open_archive
from runtime.motion.grid import to_pixels
from runtime.motion.mpeg4 import MotionSettings
from runtime.motion.overlay import draw
from runtime.motion.sources import MotionFrame, frames
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
@click.argument("video", type=click.Path(path_type=Path))
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
@output_options
def motion(
    video: Path,
    output: Path | None,
    overlay: Path | None,
    fps: float,
    slices: int | Literal["auto"],
    force: bool,
    as_json: bool,
) -> None:
    """Read the motion vectors of VIDEO and print a summary.

    The video is brought to --fps and re-encoded in memory, as the model's training data was.
    """
    settings = MotionSettings(fps=Fraction(fps).limit_denominator(1001), slices=slices)
    if output is not None and overlay is not None and output.resolve() == overlay.resolve():
        raise UsageError(f"--overlay {overlay}: is the same file as --output; choose another name")
    if overlay is not None:
        check_output(overlay, SUFFIXES, force)
    summary = Summary()
    with Report(as_json) as report, ExitStack() as stack:
        archive = stack.enter_context(open_archive(output, video, settings, force)) if output is not None else None
        read = _watched(frames(video, settings, images=overlay is not None), summary, archive, report, settings)
        if overlay is not None:
            metadata = {"source": video.name, "fps": str(settings.rate), "slices": str(slices)}
            write_video(overlay, (draw(f, settings.rescale) for f in read), settings.rate, metadata, force)
        else:
            for _ in read:
                pass
    values = summary.values()
    files = {name: str(path) for name, path in (("output", output), ("overlay", overlay)) if path is not None}
    report.result(_table(video, values | files), source=str(video), fps=float(settings.rate), **values, **files)


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


def _table(video: Path, values: dict[str, Any]) -> str:
    table = Table(title=video.name, show_header=False, title_justify="left")
    x, y = values["mean_motion"]
    rows = {
        "frames": f"{values['frames']} ({values['width']}x{values['height']})",
        "I frames": str(values["i_frames"]),
        "mean speed": f"{values['mean_speed']:.2f} px/frame",
        "mean motion": f"x {x:+.2f}, y {y:+.2f} px/frame",
        "direction": values["direction"],
    } | {name: values[name] for name in ("output", "overlay") if name in values}
    for name, text in rows.items():
        table.add_row(name, text)
    console = Console()
    with console.capture() as capture:
        console.print(table, markup=False)
    return capture.get().rstrip("\n")
