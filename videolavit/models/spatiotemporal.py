"""Attention over space, then over time: the block shared by the motion tokenizer and the motion condition encoder.

Contract: `SpatioTemporalBlock` maps [B, T, S, C] to the same shape and is made of two `BiasedAttention`s and an `Mlp`,
which the vision transformer uses as well (reference semantics §4.2, §5, §6.1). Nothing here depends on the sizes B, T
and S, so the block exports with all of them dynamic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.errors import UsageError


class BiasedAttention(nn.Module):
    """Full self-attention with learned query and value biases; the keys have none (reference semantics §4.2)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise UsageError(f"attention width {dim} is not a multiple of its {heads} heads; change one of them")
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the tokens N of x [.., N, C]; returns [.., N, C]."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])  # [3C]
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # [.., heads, N, C / heads]
            for part in F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1)
        )
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(out.transpose(-3, -2).flatten(-2))


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[.., C] -> [.., C]."""
        return self.fc2(F.gelu(self.fc1(x)))


class SpatioTemporalBlock(nn.Module):
    """Pre-norm attention over positions, attention over frames, MLP (reference semantics §4.2)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm0 = nn.LayerNorm(dim)
        self.spatial_attention = BiasedAttention(dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.temporal_attention = BiasedAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, S, C] -> [B, T, S, C]."""
        frames, positions, dim = x.shape[1:]
        x = x.reshape(-1, positions, dim)  # [B*T, S, C]
        x = x + self.spatial_attention(self.norm0(x))
        x = x.reshape(-1, frames, positions, dim).transpose(1, 2).reshape(-1, frames, dim)  # [B*S, T, C]
        x = x + self.temporal_attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x.reshape(-1, positions, frames, dim).transpose(1, 2)
