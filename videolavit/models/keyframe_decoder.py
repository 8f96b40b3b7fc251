"""Visual codes to the conditions of the key-frame UNet (reference semantics §7).

Contract: the module takes code vectors, not ids; the codebook belongs to the visual tokenizer. Pictures of
different length are right-padded and told apart by `counts`; `pad_codes` builds both. Parameter names equal the
official `highres_tokenizer_decoder.bin`, which is loaded strictly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from runtime.errors import UsageError
from videolavit.config import KeyframeDecoderConfig
from videolavit.models.attention import CrossAttention, SelfAttention, Weigh, attend, softmax, split_heads
from videolavit.models.spatiotemporal import Mlp

PADDING_LOGIT = -10000.0  # added to the logits of padding keys; representable in half precision


def pad_codes(codes: Sequence[Sequence[int]], patches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged codes as one batch.

    A picture of more than `patches` codes loses the surplus: the model has positions for no more.

    Args:
        codes: visual codes from 0, one list a picture.
        patches: most codes a picture may have.

    Returns:
        codes [B, L] int64, right-padded with 0, and counts [B] int64.

    Raises:
        UsageError: there is no picture, or a picture has no code.
    """
    rows = [torch.as_tensor(row, dtype=torch.int64)[:patches] for row in codes]
    if not rows or any(len(row) == 0 for row in rows):
        raise UsageError("a picture has no visual tokens: nothing to decode; try another seed or prompt")
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


class DecoderBlock(nn.Module):
    """Self-attention over the queries, cross-attention to the codes, MLP; all pre-norm."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm0 = nn.LayerNorm(dim)
        self.self_attn = SelfAttention(dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: torch.Tensor, codes: torch.Tensor, weigh: Weigh) -> torch.Tensor:
        """x [B, P, C] and codes [B, L, C] -> [B, P, C]."""
        x = x + self.self_attn(self.norm0(x))
        x = x + self.cross_attn(self.norm1(x), codes, weigh)
        return x + self.mlp(self.norm2(x))


class AttentionPool(nn.Module):
    """One vector from a sequence: the mean token attends to itself and every token."""

    def __init__(self, patches: int, dim: int, heads: int, out_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1 + patches, dim) * dim**-0.5)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.c_proj = nn.Linear(dim, out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, P, C] -> [B, out_dim]."""
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding  # [B, 1 + P, C]
        query = split_heads(self.q_proj(x[:, :1]), self.heads)  # only the mean token's answer is used
        key, value = split_heads(self.k_proj(x), self.heads), split_heads(self.v_proj(x), self.heads)
        return self.c_proj(attend(query, key, value, softmax))[:, 0]


class KeyframeDecoder(nn.Module):
    """Code vectors -> prompt embeddings and pooled embedding of the key-frame UNet."""

    def __init__(self, config: KeyframeDecoderConfig) -> None:
        super().__init__()
        dim, hidden = config.width, int(config.width * config.mlp_ratio)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches, dim))
        self.query_embed = nn.Parameter(torch.zeros(1, config.patches, dim))
        self.in_proj = nn.Linear(config.code_dim, dim)
        self.blocks = nn.ModuleList(DecoderBlock(dim, config.heads, hidden) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)
        self.decode_task_layer = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, config.out_dim))
        self.unet_proj_1 = nn.Linear(config.out_dim, config.projections[0])
        self.unet_proj_2 = nn.Linear(config.out_dim, config.projections[1])
        self.unet_attnpool = AttentionPool(config.patches, config.out_dim, config.heads, config.pooled_dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.query_embed, std=0.02)

    def reconstruct(self, vectors: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Visual features [B, P, out_dim] from code vectors; arguments as in `forward`."""
        length = vectors.shape[1]
        codes = self.in_proj(vectors) + self.pos_embed[:, :length]  # [B, L, C]
        padding = torch.arange(length, device=counts.device) >= counts[:, None]  # [B, L]
        bias = padding[:, None, None, :].to(codes.dtype) * PADDING_LOGIT  # [B, 1, 1, L]

        def weigh(logits: torch.Tensor) -> torch.Tensor:
            return softmax(logits + bias)

        x = self.query_embed.expand(vectors.shape[0], -1, -1)  # [B, P, C]
        for block in self.blocks:
            x = block(x, codes, weigh)
        return self.decode_task_layer(self.norm(x))

    def forward(self, vectors: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Conditions of the key-frame UNet.

        Args:
            vectors: [B, L, d] rows of the visual codebook, right-padded with anything finite; L at most `patches`.
            counts: [B] real codes of every picture, at least 1.

        Returns:
            prompt embeddings [B, P, sum(projections)] and pooled embedding [B, pooled_dim].
        """
        features = self.reconstruct(vectors, counts)  # [B, P, out_dim]
        prompt = torch.cat([self.unet_proj_1(features), self.unet_proj_2(features)], dim=-1)
        return prompt, self.unet_attnpool(features)
