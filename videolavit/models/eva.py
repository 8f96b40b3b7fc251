"""EVA vision transformer, the frozen eye of the visual tokenizer (reference semantics §6.1).

Contract: parameter names equal the official `eva_vitg_psz14.bin`, which is loaded strictly; its `norm` and
`head` are kept for that reason although the tokenizer reads the features before them.
"""

from __future__ import annotations

import torch
from torch import nn

from videolavit.config import EvaConfig
from videolavit.models.spatiotemporal import BiasedAttention, Mlp


class PatchEmbedding(nn.Module):
    """Square patches as tokens, row by row: [B, 3, S, S] -> [B, N, W]."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class EvaBlock(nn.Module):
    """Pre-norm block: attention, then MLP."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.attn = BiasedAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))  # [B, 1 + N, W]
        return x + self.mlp(self.norm2(x))


class EvaVisionTransformer(nn.Module):
    """Vision transformer with a class token at index 0 and absolute positions."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        self.patch_embed = PatchEmbedding(config.patch_size, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, config.width))
        self.blocks = nn.ModuleList(EvaBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.head = nn.Linear(config.width, config.classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features of the last block, before the final norm.

        Args:
            pixels: [B, 3, S, S], normalised as in §11.5.

        Returns:
            [B, 1 + N, W]; index 0 is the class token, then the patches in raster order.
        """
        patches = self.patch_embed(pixels)  # [B, N, W]
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Class logits [B, classes] of the checkpoint's own head."""
        return self.head(self.norm(self.forward_features(pixels)[:, 0]))
