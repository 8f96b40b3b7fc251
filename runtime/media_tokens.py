"""Pictures and motion as tokens, and motion tokens back as motion: the codec side of both tokenizers.

Contract: works on one bundle's engines, draws the keep decision from the given noise, and knows no language
model. Pictures are uint8 [H, W, 3]; motion grids are float32 [T, 2, rows, columns] of macroblocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.engines import EngineSet
from runtime.errors import MediaError
from runtime.geometry import Geometry
from runtime.images import tokenizer_pixels
from runtime.motion.grid import TOKENIZER_SCALE, model_motion
from runtime.noise import Noise
from runtime.resize import bicubic


@dataclass(frozen=True)
class PictureTokens:
    """One picture: `codes` [n] int64 and, for understanding, `embeds` [n, D] of its kept patches."""

    codes: np.ndarray
    embeds: np.ndarray


class VisualTokenizer:
    """Dynamic visual tokenizer over the engines `visual_encoder` and `visual_merger` (§6)."""

    def __init__(self, engines: EngineSet, geometry: Geometry, task: str) -> None:
        self._engines = engines
        self._geometry = geometry
        self._task = task

    def encode(self, pictures: Sequence[np.ndarray], noise: Noise) -> list[PictureTokens]:
        """Tokens of every picture. Raises MediaError when a picture keeps no patch at all."""
        found = self.kept(pictures, noise)
        for number, tokens in enumerate(found, 1):
            if not len(tokens.codes):
                raise MediaError(f"picture {number}: the visual tokenizer kept none of its patches; try another seed")
        return found

    def kept(self, pictures: Sequence[np.ndarray], noise: Noise) -> list[PictureTokens]:
        """Tokens of every picture; none of one that keeps no patch at all."""
        side = self._geometry.image_size
        pixels = np.stack([tokenizer_pixels(picture, side) for picture in pictures])  # [B, 3, S, S]
        encoded = self._engines.get("visual_encoder", task=self._task)(pixels=pixels)
        logits = encoded["keep_logits"]  # [B, N, 2]
        kept = (logits + noise.gumbel(*logits.shape)).argmax(axis=-1) == 0  # [B, N]
        merged = self._engines.get("visual_merger", task=self._task)(
            features=encoded["features"], keep=kept.astype(np.float32)
        )
        return [
            PictureTokens(codes[keep], embeds[keep])
            for codes, embeds, keep in zip(merged["codes"], merged["embeds"], kept, strict=True)
        ]


class MotionTokenizer:
    """Motion VQ tokenizer over the engines `motion_encoder` and `motion_decoder` (§4)."""

    def __init__(self, engines: EngineSet, geometry: Geometry, task: str) -> None:
        self._engines = engines
        self._geometry = geometry
        self._task = task

    def encode(self, grids: Sequence[np.ndarray]) -> np.ndarray:
        """Codes [B, K] of macroblock grids [T, 2, rows, columns] in x10 scale."""
        size = self._geometry.motion_grid
        motion = np.stack([model_motion(grid, size) for grid in grids])  # [B, 2, T, gh, gw]
        return self._engines.get("motion_encoder", task=self._task)(motion=motion)["codes"]

    def decode(self, codes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Codes [B, K] -> motion [B, 2, T, h, w] in x1 scale at `size` = (h, w)."""
        motion = self._engines.get("motion_decoder", task=self._task)(codes=codes)["motion"]
        return bicubic(motion, size) / np.float32(TOKENIZER_SCALE)
