"""The stage that reads a video's motion."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from runtime.bench.context import Bench
from runtime.bench.networks import contenders
from runtime.bench.settings import OURS, Row
from runtime.bench.timing import Turn
from runtime.motion.mpeg4 import MotionSettings
from runtime.motion.select import open_source
from runtime.video import probe, write_video

MADE = (854, 480, 30, 5)  # width, height, frames per second, seconds of the video that is made where none is given


def vectors(bench: Bench) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="videolavit-bench-") as folder:
        path = bench.settings.video
        if path is None:
            path = Path(folder) / "made.mp4"
            width, height, rate, lasting = MADE
            write_video(path, _film(width, height, rate * lasting), rate, {}, force=False)
        info = probe(path)
        geometry = bench.manifest.geometry
        settings = MotionSettings(fps=geometry.fps)

        def run() -> None:
            open_source(str(path), "mpeg4", settings).understanding_clips(
                bench.manifest.defaults.max_clips, geometry.frames
            )

        bench.alone(run)
        times = bench.take_turns(Turn({OURS: run}))[0]
    kind = "made" if bench.settings.video is None else path.name
    detail = f"{kind}, {info.width}x{info.height}"
    # A file that does not say how long it is has no rate.
    seconds, of = (info.duration, "s of video") if info.duration else (1.0, "")
    return contenders("motion-vectors", detail, "video", times, amount=seconds, of=of)


def _film(width: int, height: int, frames: int) -> Iterator[np.ndarray]:
    """Frames [H, W, 3] uint8: soft noise that drifts, and five squares of it that cross."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(60, 200, (height // 8 + 8, width // 8 + 8, 3)).astype(np.uint8)
    land = np.kron(coarse, np.ones((16, 16, 1), np.uint8))
    for index in range(frames):
        x, y = int(width / 4 * (1 + np.sin(index / 40))), int(height / 4 * (1 + np.cos(index / 50)))
        frame = land[y : y + height, x : x + width].copy()
        for number in range(5):
            side = height // 10 + 8 * number
            left = int((width - side) * (0.5 + 0.5 * np.sin(index / (12 + 4 * number) + number)))
            top = int((height - side) * (0.5 + 0.5 * np.cos(index / (15 + 3 * number) + 2 * number)))
            frame[top : top + side, left : left + side] = land[:side, :side] // 2 + 25 * number
        yield frame
