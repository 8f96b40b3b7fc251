"""Resize of motion fields to another grid, frame by frame.

Contract: bicubic with coefficient -0.75, half-pixel centres and no antialiasing, also when shrinking; values keep
their scale and aspect ratio is ignored (reference semantics §4.5, §5).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize_motion(motion: Tensor, height: int, width: int) -> Tensor:
    """motion [B, C, T, h, w] -> [B, C, T, height, width], computed in float32 and returned in the input's type."""
    channels, frames = motion.shape[1:3]
    flat = motion.flatten(0, 2).unsqueeze(1).float()  # [B*C*T, 1, h, w]
    sized = F.interpolate(flat, size=(height, width), mode="bicubic", align_corners=False, antialias=False)
    return sized.reshape(-1, channels, frames, height, width).to(motion.dtype)
