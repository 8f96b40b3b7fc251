"""Attention with fused or separate projections, open in how logits become weights.

Contract: both modules take a `Weigh` function from logits to weights, because the visual tokenizer needs a
softmax under a keep policy (reference semantics §6.4) and the key-frame decoder an ordinary one (§7). All
projections have biases; logits are scaled by head_dim ** -0.5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Weigh = Callable[[torch.Tensor], torch.Tensor]  # logits [B, H, Q, K] -> weights [B, H, Q, K]


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """Ordinary softmax over the keys."""
    return logits.softmax(dim=-1)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, C] -> [B, heads, N, C / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weigh: Weigh) -> torch.Tensor:
    """query [B, H, Q, d], key and value [B, H, K, d] -> [B, Q, H * d]."""
    logits = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5  # [B, H, Q, K]
    return (weigh(logits) @ value).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Self-attention with one fused projection, ordered (query, key, value)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, weigh: Weigh = softmax) -> torch.Tensor:
        """x [B, N, C] -> [B, N, C]."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(attend(query, key, value, weigh))


class CrossAttention(nn.Module):
    """Attention from one sequence to another with separate projections of the same width."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor, weigh: Weigh = softmax) -> torch.Tensor:
        """x [B, Q, C], context [B, K, C] -> [B, Q, C]."""
        query = split_heads(self.query(x), self.heads)
        key, value = split_heads(self.key(context), self.heads), split_heads(self.value(context), self.heads)
        return self.proj(attend(query, key, value, weigh))
