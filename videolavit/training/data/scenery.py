"""Scenery seen by a moving camera, as a source: endless, drawn by lot, nothing on disk.

Contract: item i depends on (seed, i) alone. A scenery is a large picture of overlapping patches of every size, hue and
outline on a gradient; a camera pans over it, comes nearer or goes away, or stands still. Nothing is said about it. It
teaches what the world of shapes does not: that all of a picture may move, and pictures full of detail. Motion is what
`runtime.motion` reads of the same frames, from pictures of 128 or 256 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from runtime.errors import UsageError
from runtime.geometry import Geometry
from videolavit.shapes.clips import MOTION_SIDES, motion_grid
from videolavit.training.data.examples import ClipExample, PictureExample

CANVAS = 512  # pixels; the camera sees about half of it
SIDE = 128  # of the frames
PATCHES = (30, 90)
STILL = 0.1  # share of clips in which the camera does not move
PAN = 0.6  # most that is passed in a clip, in widths of the frame
ZOOM = 1.25  # most that the view grows or shrinks in a clip


class ScenerySource:
    """Clips of one camera movement each.

    Args:
        geometry: of the model: frames in a clip.
        size: number of items.
        seed: 0 or more.
        clips: must be 1: a camera path is as long as a clip.

    Raises:
        UsageError: an argument is not one of these.
    """

    def __init__(self, geometry: Geometry, *, size: int = 1_000_000, seed: int = 0, clips: int = 1) -> None:
        if clips != 1:
            raise UsageError(f"clips {clips}: scenery has one clip an item")
        self.frames, self.size, self.seed = geometry.frames, size, seed

    def __len__(self) -> int:
        return self.size

    def identity(self) -> Mapping[str, object]:
        return {"source": "scenery", "seed": self.seed}

    def moves(self, index: int) -> bool:
        return True

    def picture(self, index: int) -> PictureExample:
        canvas, path, _ = self._drawn(index)
        return PictureExample(image=_seen(canvas, path[0], SIDE))

    def clip(self, index: int) -> ClipExample:
        canvas, path, rng = self._drawn(index)
        frames = np.stack([_seen(canvas, view, SIDE) for view in path])
        side = int(rng.choice(MOTION_SIDES))
        searched = frames if side == SIDE else np.stack([_seen(canvas, view, side) for view in path])
        return ClipExample(frames=frames, grid=motion_grid(searched))

    def _drawn(self, index: int) -> tuple[Image.Image, np.ndarray, np.random.Generator]:
        """The canvas, the camera's path [T, 3] of centre and width in pixels of it, and the generator afterwards."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index])
        return _canvas(rng), _path(rng, self.frames), rng


def _canvas(rng: np.random.Generator) -> Image.Image:
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    canvas = Image.fromarray(corners).resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(*PATCHES))):
        x, y = rng.uniform(0, CANVAS, 2)
        reach = CANVAS * np.exp(rng.uniform(np.log(0.01), np.log(0.25)))
        fill = tuple(int(level) for level in rng.integers(0, 256, 3))
        if rng.random() < 0.4:
            high = reach * rng.uniform(0.4, 1.0)
            draw.ellipse((x - reach, y - high, x + reach, y + high), fill=fill)
        else:
            count = int(rng.integers(3, 7))
            angles = np.sort(rng.uniform(0, 2 * np.pi, count))
            far = reach * rng.uniform(0.5, 1.0, count)
            outline = zip(x + far * np.cos(angles), y + far * np.sin(angles), strict=True)
            draw.polygon([(float(a), float(b)) for a, b in outline], fill=fill)
    return canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.0, 2.5))))


def _path(rng: np.random.Generator, frames: int) -> np.ndarray:
    """[T, 3]: the camera's centre (x, y) and the width of its view, in pixels of the canvas; straight and steady."""
    width = CANVAS * rng.uniform(0.35, 0.6)
    if rng.random() < STILL:
        travel, growth = np.zeros(2), 1.0
    else:
        angle = rng.uniform(0, 2 * np.pi)
        travel = width * rng.uniform(0, PAN) * np.array([np.cos(angle), np.sin(angle)])
        growth = float(np.exp(rng.uniform(-1, 1) * np.log(ZOOM)))
    middle = rng.uniform(0.42, 0.58, 2) * CANVAS
    part = np.linspace(-0.5, 0.5, frames)[:, None]  # [T, 1]
    return np.concatenate([middle + part * travel, width * growth**part], axis=1)


def _seen(canvas: Image.Image, view: np.ndarray, side: int) -> np.ndarray:
    """[side, side, 3] uint8: what lies in `view`."""
    x, y, width = view
    box = (x - width / 2, y - width / 2, x + width / 2, y + width / 2)
    return np.asarray(canvas.transform((side, side), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC))
