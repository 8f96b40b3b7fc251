"""Engines of the visual tokenizer: picture to features and keep logits, features and decision to codes and embeddings.

Contract: the keep decision is drawn between the two engines by the caller (reference semantics §6.3); codes and
embeddings are given for every position and the caller takes the kept ones.
"""

from __future__ import annotations

from torch import Tensor, nn

from export.graphs.graph import Graph, Input, Signature, integers
from videolavit.config import ModelConfig
from videolavit.models.visual_tokenizer import DynamicVisualTokenizer


class VisualEncoder(nn.Module):
    """pixels [B,3,S,S] -> features [B,N,W], keep_logits [B,N,2] (log-probabilities, column 0 = keep)."""

    def __init__(self, config: ModelConfig, tokenizer: DynamicVisualTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.tokenizer.features(pixels)
        return features, self.tokenizer.keep_logits(features)


class VisualMerger(nn.Module):
    """features [B,N,W], keep [B,N] of 0 and 1 -> codes [B,N] int64, embeds [B,N,D]."""

    def __init__(self, config: ModelConfig, tokenizer: DynamicVisualTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, features: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        merged = self.tokenizer.merge(features, keep)
        return self.tokenizer.codes(merged), self.tokenizer.embeds(merged)


def _encoder(config: ModelConfig) -> Signature:
    size, patches, width = config.geometry.image_size, config.geometry.patches, config.visual_tokenizer.eva.width
    return Signature(
        {"pixels": Input(("B", 3, size, size))},
        {"features": ("B", patches, width), "keep_logits": ("B", patches, 2)},
    )


def _merger(config: ModelConfig) -> Signature:
    patches, width = config.geometry.patches, config.visual_tokenizer.eva.width
    decision = integers(2)
    return Signature(
        {
            "features": Input(("B", patches, width)),
            "keep": Input(("B", patches), lambda g, shape, sizes: decision(g, shape, sizes).astype("float32")),
        },
        {"codes": ("B", patches), "embeds": ("B", patches, config.visual_tokenizer.llm_dim)},
    )


GRAPHS = {
    "visual_encoder": Graph(("visual_tokenizer",), VisualEncoder, _encoder, {"B": 2}, ({"B": 1}, {"B": 3})),
    "visual_merger": Graph(("visual_tokenizer",), VisualMerger, _merger, {"B": 2}, ({"B": 1}, {"B": 3})),
}
