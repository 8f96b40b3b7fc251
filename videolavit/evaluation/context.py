"""Where parts are measured: the pipeline, a folder for files, and the seeds of every item.

Contract: `film` is all a user would see of a run, written by the runtime as a video file and decoded again. A scene and
the noise of an item are functions of `seed`, the part's name and the item's number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np

from runtime.errors import UsageError
from runtime.images import resize_image
from runtime.noise import Noise
from runtime.pipeline import Pipeline
from runtime.requests import ReconstructionRequest, Resolved, VideoRequest, resolve
from runtime.video import read_frames, write_video
from videolavit.shapes import Scene, caption, sample_scene

STRIP_FRAMES = 8
STRIP_SIDE = 80  # pixels


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the parts need to know.

    Attributes:
        seed: another one gives other scenes and other noise.
        strips: items per part that leave frames for the sheet.
        media: real videos.
        keyframe_steps, video_steps: denoising steps; None is the bundle's default.
    """

    seed: int = 0
    strips: int = 0
    media: tuple[Path, ...] = ()
    keyframe_steps: int | None = None
    video_steps: int | None = None


class Context:
    """See the module. `folder` is empty and goes away afterwards."""

    def __init__(self, pipeline: Pipeline, folder: Path, settings: Settings) -> None:
        self.pipeline = pipeline
        self.folder = folder
        self.settings = settings
        self.geometry = pipeline.manifest.geometry

    def number(self, part: str, index: int) -> int:
        """The seed of item `index` of `part`: of its scene, its words and its noise."""
        return crc32(f"{self.settings.seed} {part} {index}".encode())

    def film(self, request: VideoRequest, seed: int) -> tuple[np.ndarray, str]:
        """A generated film uint8 [T, H, W, 3] as decoded from its file; or no frame, and why there is none."""
        settings = self.resolved(request)
        frames: list[np.ndarray] = []
        try:
            for clip in self.pipeline.generate_video(settings, Noise(seed)):
                # A later clip's first frame repeats the one before it (reference semantics §12.4).
                frames += list(clip.frames if clip.index == 0 else clip.frames[1:])
        except UsageError as error:  # the language model may write a picture without a single token
            width, height = self.geometry.video_size
            return np.zeros((0, height, width, 3), np.uint8), str(error)
        return self.recorded(frames, self.geometry.fps), ""

    def resolved(self, request: VideoRequest | ReconstructionRequest) -> Resolved:
        """`request` with the denoising steps of the settings and every field set. UsageError if one is not allowed."""
        request = replace(request, video_steps=self.settings.video_steps)
        if isinstance(request, VideoRequest):
            request = replace(request, keyframe_steps=self.settings.keyframe_steps)
        return resolve(request, self.geometry, self.pipeline.manifest.defaults)

    def recorded(self, frames: Iterable[np.ndarray], fps: float) -> np.ndarray:
        """`frames` as they look after they were written as mp4 and decoded: uint8 [T, H, W, 3]."""
        path = self.video("recorded", frames, fps)
        found = np.stack(list(read_frames(path)))
        path.unlink()
        return found

    def video(self, name: str, frames: Iterable[np.ndarray], fps: float) -> Path:
        """A file with `frames`; the next one of the same name replaces it."""
        path = self.folder / f"{name}.mp4"
        write_video(path, frames, fps, {}, force=True)
        return path

    def strips(self, index: int, **films: np.ndarray) -> tuple[tuple[str, np.ndarray], ...]:
        """A few frames of each of `films` [T, H, W, 3], small, if item `index` is one that leaves some."""
        if index >= self.settings.strips:
            return ()
        return tuple((name, _strip(frames)) for name, frames in films.items() if len(frames))


def described_scene(number: int, shapes: int) -> tuple[Scene, str]:
    """The held-out scene `number` of `shapes` shapes, and a caption of it."""
    scene = sample_scene(number, split="held-out", shapes=shapes)
    return scene, caption(scene, np.random.default_rng(number))


def _strip(frames: np.ndarray) -> np.ndarray:
    chosen = np.linspace(0, len(frames) - 1, STRIP_FRAMES).round().astype(int)
    return np.stack([resize_image(frames[i], (STRIP_SIDE, STRIP_SIDE)) for i in chosen])
