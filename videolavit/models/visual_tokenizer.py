"""Dynamic visual tokenizer: a picture becomes as many tokens as it needs (reference semantics §6).

    pixels ─EVA─► features ─predictor─► keep or drop ─merger─► merged features ─┬─► codes       (generation)
                                                                                └─► embeddings  (understanding)

Contract: nothing here draws random numbers. The keep decision is an argument, 1 keep and 0 drop, drawn by the
caller with `keep_decision`; every position gets a code and an embedding and the caller selects the kept ones,
so that each step has fixed shapes. Parameter names equal the official `tokenizer_encoder.bin`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from runtime.vocabulary import Vocabulary
from videolavit.config import VisualTokenizerConfig
from videolavit.models.attention import CrossAttention, SelfAttention
from videolavit.models.eva import EvaVisionTransformer
from videolavit.models.quantizer import VectorQuantizer
from videolavit.models.spatiotemporal import Mlp

POLICY_EPS = 1e-6  # leak of the policy softmax; makes the weights uniform where nothing is allowed


def keep_decision(log_probs: torch.Tensor, gumbel: torch.Tensor) -> torch.Tensor:
    """Sampled keep decision (§6.3, temperature 1): [B, N] of exactly 0 and 1.

    Args:
        log_probs: [B, N, 2] of `keep_logits`; column 0 = keep.
        gumbel: [B, N, 2] independent Gumbel(0, 1) noise.
    """
    scores = log_probs + gumbel
    return (scores[..., 0] >= scores[..., 1]).to(log_probs.dtype)


def policy_softmax(logits: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
    """Softmax over the keys that `policy` allows, in float32 (§6.4).

    The row maximum is taken over all keys and a forbidden key keeps a weight of up to POLICY_EPS / K; with no
    key allowed every weight is exactly 1 / K.

    Args:
        logits: [B, H, Q, K].
        policy: 0/1, broadcastable to `logits`.
    """
    scores = logits.float()
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True)) * policy
    total = weights.sum(dim=-1, keepdim=True)
    return ((weights + POLICY_EPS / logits.shape[-1]) / (total + POLICY_EPS)).to(logits.dtype)


class TokenPredictor(nn.Module):
    """Says for every patch how likely it is kept (§6.2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, features: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [B, N, 2], column 0 = keep.

        Args:
            features: [B, N, C].
            policy: [B, N, 1] weights of the tokens in the global half; all ones at inference.
        """
        local, shared = self.in_conv(features).chunk(2, dim=-1)  # [B, N, C / 2] each
        mean = (shared * policy).sum(dim=1, keepdim=True) / policy.sum(dim=1, keepdim=True)  # [B, 1, C / 2]
        return self.out_conv(torch.cat([local, mean.expand_as(local)], dim=-1))


def policies(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Who may look at whom (§6.4), as 0/1 factors.

    Args:
        keep: [B, N].

    Returns:
        causal [B, 1, N, N]: kept tokens up to the own position, and oneself; dropped [B, 1, 1, N].
    """
    tokens = keep.shape[1]
    own = torch.eye(tokens, dtype=keep.dtype, device=keep.device)  # [N, N]
    earlier = torch.ones_like(own).tril(-1)
    return (own + earlier * keep[:, None, :])[:, None], (1 - keep)[:, None, None, :]


class MergerBlock(nn.Module):
    """Causal attention to kept tokens, attention to dropped ones, MLP; all pre-norm."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm0 = nn.LayerNorm(dim)
        self.token_causal_attn = SelfAttention(dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.token_cross_attn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)

    def forward(
        self, x: torch.Tensor, origin: torch.Tensor, causal: torch.Tensor, dropped: torch.Tensor
    ) -> torch.Tensor:
        """x and origin [B, N, C], policies causal [B, 1, N, N] and dropped [B, 1, 1, N] -> [B, N, C]."""
        x = x + self.token_causal_attn(self.norm0(x), partial(policy_softmax, policy=causal))
        x = x + self.token_cross_attn(self.norm1(x), origin, partial(policy_softmax, policy=dropped))
        return x + self.mlp(self.norm2(x))


class TokenMerger(nn.Module):
    """Folds the dropped patches into the kept ones (§6.4)."""

    def __init__(self, config: VisualTokenizerConfig) -> None:
        super().__init__()
        dim = config.eva.width
        self.ln_vision = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(
            MergerBlock(dim, config.heads, int(dim * config.mlp_ratio)) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Merged features [B, N, C]; only kept positions carry meaning.

        Args:
            features: [B, N, C] as they leave the vision transformer.
            keep: [B, N], 1 = keep, 0 = drop; gradients flow through it.
        """
        causal, dropped = policies(keep.to(torch.float32))
        origin = self.ln_vision(features)
        x = features
        for block in self.blocks:
            x = block(x, origin, causal, dropped)
        return self.norm(x)


class DynamicVisualTokenizer(nn.Module):
    """EVA, token predictor, merger and quantiser of one picture at a time (§6)."""

    def __init__(self, config: VisualTokenizerConfig) -> None:
        super().__init__()
        dim = config.eva.width
        self.encoder = EvaVisionTransformer(config.eva)
        self.token_predictor = TokenPredictor(dim)
        self.causal_encoder = TokenMerger(config)
        self.quantize = VectorQuantizer(config.codes, config.code_dim)
        self.encode_task_layer = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, config.code_dim))
        self.vit_proj = nn.Linear(dim, config.llm_dim)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patch features: pixels [B, 3, S, S] -> [B, N, W], class token removed."""
        return self.encoder.forward_features(pixels)[:, 1:]

    def keep_logits(self, features: torch.Tensor) -> torch.Tensor:
        """features [B, N, W] -> log-probabilities [B, N, 2], column 0 = keep."""
        return self.token_predictor(features, torch.ones_like(features[..., :1]))

    def merge(self, features: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """features [B, N, W] and keep [B, N] -> merged features [B, N, W]."""
        return self.causal_encoder(features, keep)

    def codes(self, merged: torch.Tensor) -> torch.Tensor:
        """merged [B, N, W] -> codes [B, N] int64 from 0, one for every position, dropped ones too."""
        _, ids = self.quantize.tokenize(self.encode_task_layer(merged))
        return ids.reshape(merged.shape[:2])

    def embeds(self, merged: torch.Tensor) -> torch.Tensor:
        """merged [B, N, W] -> language model embeddings [B, N, D], one for every position."""
        return self.vit_proj(merged)

    def tokenize(
        self, pixels: torch.Tensor, keep: torch.Tensor, vocabulary: Vocabulary, add_special: bool = True
    ) -> list[list[int]]:
        """Ids of every picture as they stand in a sequence (§6.5).

        Args:
            pixels: [B, 3, S, S].
            keep: [B, N], 1 = keep.
            add_special: put image_start before and image_end after every picture.
        """
        codes = self.codes(self.merge(self.features(pixels), keep))  # [B, N]
        spans = [vocabulary.image_span(row[kept].tolist()) for row, kept in zip(codes, keep > 0.5, strict=True)]
        return spans if add_special else [span[1:-1] for span in spans]

    def encode_features(self, pixels: torch.Tensor, keep: torch.Tensor) -> list[torch.Tensor]:
        """Embeddings of the kept tokens of every picture, [n_i, D] each (§6.5); nothing is quantised."""
        embeds = self.embeds(self.merge(self.features(pixels), keep))  # [B, N, D]
        return [row[kept] for row, kept in zip(embeds, keep > 0.5, strict=True)]
