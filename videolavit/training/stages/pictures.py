"""Single pictures and short runs of frames as training items, for the stages that work on pixels.

Contract: item i is a pure function of (seed, i). Pictures are brought to the model's own size as the runtime does it;
a corner comes with every item, so that the stage can cut the same window from all frames of it. The corner is that of
the busiest of a few windows drawn by lot: most of a picture is background, and little is learned from that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from runtime.errors import UsageError
from runtime.geometry import VAE_FACTOR
from runtime.images import resize_image, tokenizer_pixels
from videolavit.shapes import render_frame
from videolavit.training.data.examples import Source
from videolavit.training.data.shapes_source import ShapesSource

WINDOWS = 3  # drawn per item


class FrameRuns(Dataset[dict[str, Any]]):
    """Runs of consecutive frames of one scene, video or (repeated) picture.

    Items: frames [T, 3, H, W] uint8; corner [2] int64, (top, left) of a window of `crop` pixels; and if `tokenizer` is
    given, pixels [3, S, S] float32, the first frame as the visual tokenizer takes it.

    Args:
        source: where pictures and videos come from.
        size: (width, height) in pixels to which frames are brought.
        seed: decides frames and windows.
        frames: T.
        crop: side of the window, pixels; 0: no window, the corner is (0, 0).
        tokenizer: S, the side of the visual tokenizer's input; 0: no pixels for it.
    """

    def __init__(
        self,
        source: Source,
        size: tuple[int, int],
        seed: int,
        *,
        frames: int = 1,
        crop: int = 0,
        tokenizer: int = 0,
    ) -> None:
        if crop % VAE_FACTOR or not 0 <= crop <= min(size):
            raise UsageError(
                f"crop {crop}: must be a multiple of {VAE_FACTOR} from 0 to {min(size)}, the picture's side"
            )
        self.source, self.size, self.seed = source, size, seed
        self.frames, self.crop, self.tokenizer = frames, crop, tokenizer

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, index])
        raw = self._run(index, rng)
        run = np.stack([resize_image(frame, self.size) for frame in raw])  # [T, H, W, 3]
        corner = self._corner(run[0], rng) if self.crop else (0, 0)
        frames = torch.from_numpy(run).permute(0, 3, 1, 2).contiguous()
        item = {"frames": frames, "corner": torch.tensor(corner)}
        if self.tokenizer:
            item["pixels"] = torch.from_numpy(tokenizer_pixels(raw[0], self.tokenizer))
        return item

    def _run(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """[T, H, W, 3] uint8 at the source's own size."""
        if isinstance(self.source, ShapesSource):  # without encoding a clip for its motion
            scene, _ = self.source.scene(index)
            first = int(rng.integers(scene.frames - self.frames + 1))
            return np.stack([render_frame(scene, at) for at in range(first, first + self.frames)])
        if self.frames == 1 or not self.source.moves(index):
            return np.repeat(self.source.picture(index).image[None], self.frames, axis=0)
        frames = self.source.clip(index).per_clip()[0][0]
        first = int(rng.integers(len(frames) - self.frames + 1))
        return frames[first : first + self.frames]

    def _corner(self, picture: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
        """(top, left) of the busiest of `WINDOWS` windows of `picture` [H, W, 3]."""
        height, width = picture.shape[:2]
        tops = rng.integers(height - self.crop + 1, size=WINDOWS)
        lefts = rng.integers(width - self.crop + 1, size=WINDOWS)
        corners = [(int(top), int(left)) for top, left in zip(tops, lefts, strict=True)]
        return max(corners, key=lambda c: float(picture[c[0] : c[0] + self.crop, c[1] : c[1] + self.crop].std()))


def windows_or_whole(batch: dict[str, Any], crop: int, whole: float, generator: torch.Generator) -> Tensor:
    """What a step sees of a batch of `FrameRuns`: [B, T, 3, h, w] uint8.

    Windows of all items; for a share `whole` of the steps as many whole items as have the same area, at least one; with
    `crop` 0 always all of them.
    """
    frames: Tensor = batch["frames"]  # [B, T, 3, H, W]
    height, width = frames.shape[-2:]
    see_whole = torch.rand((), generator=generator, device=frames.device).item() < whole
    if crop == 0:
        return frames
    if see_whole:
        return frames[: max(1, round(len(frames) * crop**2 / (height * width)))]
    return windows(frames, batch["corner"], crop)


def windows(frames: Tensor, corner: Tensor, crop: int) -> Tensor:
    """The window of every item: frames [B, T, 3, H, W] and corner [B, 2] -> [B, T, 3, crop, crop]."""
    cut = [
        item[..., top : top + crop, left : left + crop]
        for item, (top, left) in zip(frames, corner.tolist(), strict=True)
    ]
    return torch.stack(cut)


def signed(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], as the runtime does it."""
    return pixels.float() / 255 * 2 - 1


def psnr(actual: Tensor, expected: Tensor) -> Tensor:
    """Decibels [B] between pictures [B, .., H, W] in [-1, 1]; `actual` is clamped first."""
    error = (actual.float().clamp(-1, 1) - expected.float()) / 2
    return -10 * error.square().flatten(1).mean(1).clamp_min(1e-10).log10()
