"""Motion condition encoder: motion vectors -> cross-attention context of the video UNet (reference semantics §5).

Contract: motion at the detokenizer's scale in, one context of rows * columns tokens per frame out. Positions in the
grid are embedded, frames are not: the UNet adds their order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from videolavit.config import MotionConditionConfig
from videolavit.models.motion_resize import resize_motion
from videolavit.models.spatiotemporal import SpatioTemporalBlock


class MotionConditionEncoder(nn.Module):
    """Twelve space-time blocks over a 16x16 motion grid."""

    def __init__(self, config: MotionConditionConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.in_proj = nn.Linear(config.channels, config.dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid[0] * config.grid[1], config.dim))
        self.blocks = nn.ModuleList(
            SpatioTemporalBlock(config.dim, config.heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.out_proj = nn.Linear(config.dim, config.out_dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, motion: Tensor) -> Tensor:
        """motion [B, 2, T, 16, 16] -> context [B, T, 256, C], tokens row by row."""
        x = self.in_proj(motion.flatten(3).permute(0, 2, 3, 1))  # [B, T, 256, dim]
        x = x + self.pos_embed.unsqueeze(1)
        for block in self.blocks:
            x = block(x)
        return self.out_proj(self.norm(x))

    def encode(self, motion: Tensor) -> Tensor:
        """motion [B, 2, T, h, w] of any size -> context [B, T, 256, C], resized to the grid first."""
        return self(resize_motion(motion, *self.grid))
