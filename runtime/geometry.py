"""Sizes in space and time that every room agrees on.

Contract: one clip is `frames` frames at `fps`; motion lives on a grid of 16x16 macroblocks resized to
`motion_grid`; a token covers `motion_stride` cells of that grid. Pixel sizes are (width, height) where a
user sees them and [..., H, W] in arrays.
"""

from __future__ import annotations

import msgspec

from runtime.errors import UsageError

MACROBLOCK = 16  # side of an MPEG-4 macroblock, pixels
VAE_FACTOR = 8  # pixels per latent cell, both detokenizers (reference semantics §8, §9)
CONTEXT_GRID = 16  # side of the motion grid the condition encoder reads (§5)


class Geometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Geometry of a model; the defaults are the official ones (reference semantics §1, §4, §12).

    Attributes:
        frames: frames in a clip.
        fps: frames per second of a clip for generation and understanding.
        reconstruction_fps: frames per second at which raw motion is read for reconstruction (§12.7).
        motion_grid: (rows, columns) of the motion tokenizer's grid.
        motion_stride: (frames, rows, columns) of the grid that one motion token covers.
        image_size: side of the visual tokenizer's square input, pixels.
        patch_size: side of a visual patch, pixels.
        size_multiple: frame sides must be divisible by this (VAE factor times UNet down-sampling).
        max_side: longest side a detokenizer accepts, pixels.
        keyframe_size: default (width, height) of a generated key frame.
        video_size: default (width, height) of a generated video.
    """

    frames: int = 24
    fps: int = 6
    reconstruction_fps: int = 12
    motion_grid: tuple[int, int] = (20, 36)
    motion_stride: tuple[int, int, int] = (8, 4, 4)
    image_size: int = 224
    patch_size: int = 14
    size_multiple: int = 64
    max_side: int = 1536
    keyframe_size: tuple[int, int] = (1024, 576)
    video_size: tuple[int, int] = (576, 320)

    @property
    def motion_token_grid(self) -> tuple[int, int, int]:
        """(time, rows, columns) of motion tokens; (3, 5, 9) officially."""
        t, h, w = self.motion_stride
        return -(-self.frames // t), -(-self.motion_grid[0] // h), -(-self.motion_grid[1] // w)

    @property
    def motion_tokens(self) -> int:
        """Motion tokens in a clip; 135 officially."""
        t, h, w = self.motion_token_grid
        return t * h * w

    @property
    def patches(self) -> int:
        """Visual tokens an image can have at most; 256 officially."""
        return (self.image_size // self.patch_size) ** 2

    def check_size(self, flag: str, size: tuple[int, int]) -> tuple[int, int]:
        """Return `size` (width, height) in pixels, or raise UsageError naming `flag`."""
        width, height = size
        m = self.size_multiple
        fits = all(m <= side <= self.max_side and side % m == 0 for side in size)
        if not fits:
            raise UsageError(
                f"{flag} {width}x{height}: both sides must be multiples of {m} from {m} to {self.max_side}; "
                f"this model's own size is {self.video_size[0]}x{self.video_size[1]}"
            )
        return size
