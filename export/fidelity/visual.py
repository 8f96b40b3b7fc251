"""Golden cases of pictures as tokens and tokens as conditions (d, e, f)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from export.fidelity import configs
from export.fidelity.backends import Call, Engines
from export.fidelity.golden import Golden
from export.fidelity.measure import Measurement, close, equal
from runtime.geometry import Geometry
from runtime.vocabulary import Vocabulary
from videolavit.config import ModelConfig, VisualTokenizerConfig
from videolavit.models.eva import EvaVisionTransformer
from videolavit.models.visual_tokenizer import TokenMerger, TokenPredictor, policies, policy_softmax

TOKENIZER, VISION, CONDITIONS, ROWS = 2e-5, 4e-5, 1e-5, 1e-6


def predictor_and_merger(golden: Golden, engines: Engines) -> Iterator[Measurement]:
    """Token predictor under two policies, merger under a given decision, its first block in pieces (§6.2, §6.4)."""
    config = _tokenizer(golden)
    inputs, outputs = golden.inputs, golden.outputs
    tokens, width = inputs["features"].shape[1:]
    features = ("B", tokens, width)
    module = configs.fill(TokenPredictor(width), golden.weights, "token_predictor.")
    predictor = engines.part(module, {"features": features, "policy": ("B", tokens, 1)}, {"scores": ("B", tokens, 2)})
    for name in outputs:
        if name.startswith("pred_score_"):
            policy = inputs[name.removeprefix("pred_score_")]
            scores = predictor(features=inputs["features"], policy=policy)["scores"]
            yield close("keep log-probabilities", scores, outputs[name], TOKENIZER)
    merger = configs.fill(TokenMerger(config), golden.weights, "causal_encoder.")
    given = {"features": features, "keep": ("B", tokens)}
    values = {"features": inputs["features"], "keep": inputs["hard_keep_decision"]}
    merged = engines.part(merger, given, {"merged": features})(**values)["merged"]
    yield close("merged features", merged, outputs["merged"], TOKENIZER)
    taps = engines.part(_FirstBlock(merger), given, dict.fromkeys(_TAPS, features))(**values)
    for tap, name in _TAPS.items():
        yield close(f"{tap.replace('_', ' ')} of the first block", taps[tap], outputs[name], TOKENIZER)


def visual_tokenizer(golden: Golden, engines: Engines) -> Iterator[Measurement]:
    """Pictures to codes and to embeddings, both under a given keep decision (§6)."""
    config = _tokenizer(golden)
    vocabulary = Vocabulary(visual_codes=config.codes)
    checkpoint = configs.checkpoint(golden, tokenizer_model(config, vocabulary), {"visual_tokenizer": ""})
    inputs, outputs = golden.inputs, golden.outputs
    encoded = engines.engine(checkpoint, "visual_encoder")(pixels=inputs["image"])
    yield close("keep log-probabilities", encoded["keep_logits"], outputs["pred_score"], TOKENIZER)
    drawn = (encoded["keep_logits"] + inputs["gumbel_noise"]).argmax(axis=-1) == 0  # [B, N]
    yield equal("keep decision from noise", drawn, outputs["keep_decision_from_gumbel_noise"] > 0)
    keep = inputs["hard_keep_decision"]
    kept = keep > 0
    yield equal("tokens per picture", kept.sum(axis=1), outputs["kept_per_image"])
    yield equal("tokens per picture", kept.sum(axis=1), outputs["token_nums"])
    merged = engines.engine(checkpoint, "visual_merger")(features=encoded["features"], keep=keep)
    codes = merged["codes"][kept]  # [n]
    yield equal("ids", codes + vocabulary.first_visual, outputs["token_ids_concat"])
    spans = [vocabulary.image_span(row[here]) for row, here in zip(merged["codes"], kept, strict=True)]
    yield equal("ids between markers", list(chain.from_iterable(spans)), outputs["token_ids_with_special_concat"])
    yield close("code rows", golden.weights["quantize.embedding.weight"][codes], outputs["quantize"], ROWS)
    yield close("embeddings", merged["embeds"][kept], outputs["encode_features_concat"], TOKENIZER)
    features = ("B", *encoded["features"].shape[1:])
    part = engines.part(
        _QuantizerInput(checkpoint.component("visual_tokenizer")),
        {"features": features, "keep": ("B", features[1])},
        {"vectors": ("B", features[1], config.code_dim)},
    )
    vectors = part(features=encoded["features"], keep=keep)["vectors"][kept]
    yield close("quantiser input", vectors, outputs["to_quantizer_features"], TOKENIZER)


def eva(golden: Golden, engines: Engines) -> Iterator[Measurement]:
    """EVA vision transformer (§6.1): features before the final norm, and the head nothing uses."""
    config = configs.eva(golden.config)
    module = configs.fill(EvaVisionTransformer(config), golden.weights)
    image, outputs = golden.inputs["image"], golden.outputs
    pixels = {"pixels": ("B", *image.shape[1:])}
    features = {"features": ("B", *outputs["all_features"].shape[1:])}
    found = engines.part(Call(module, "forward_features"), pixels, features)(pixels=image)
    yield close("features", found["features"], outputs["all_features"], VISION)
    if "forward_default" in outputs:
        found = engines.part(module, pixels, {"logits": ("B", config.classes)})(pixels=image)
        yield close("class logits", found["logits"], outputs["forward_default"], VISION)


def keyframe_decoder(golden: Golden, engines: Engines) -> Iterator[Measurement]:
    """Ragged lists of visual ids to the conditions of the key-frame UNet (§7)."""
    config = configs.keyframe_decoder(golden.config)
    vocabulary = Vocabulary(visual_codes=golden.config["n_code"])
    model = ModelConfig(
        name="golden",
        vocabulary=vocabulary,
        visual_tokenizer=configs.codebook_only(vocabulary.visual_codes, config.code_dim),
        keyframe_decoder=config,
    )
    prefixes = {"keyframe_decoder": "", "visual_tokenizer": "visual_tokenizer."}
    checkpoint = configs.checkpoint(golden, model, prefixes, partial=("visual_tokenizer",))
    codes, counts = padded_codes(golden, vocabulary)
    found = engines.engine(checkpoint, "keyframe_conditioner")(codes=codes, counts=counts)
    yield close("prompt embeddings", found["prompt_embeds"], golden.outputs["prompt_embeds"], CONDITIONS)
    yield close("pooled embedding", found["pooled"], golden.outputs["pooled_prompt_embeds"], CONDITIONS)


def keyframe_decoder_host(golden: Golden) -> Iterator[Measurement]:
    """Codes among generated ids."""
    codes, counts = padded_codes(golden, Vocabulary(visual_codes=golden.config["n_code"]))
    yield equal("codes per picture", counts, golden.inputs["token_num"])
    codebook = golden.weights["visual_tokenizer.quantize.embedding.weight"]
    rows = np.concatenate([codebook[row[:count]] for row, count in zip(codes, counts, strict=True)])
    yield close("code rows", rows, golden.inputs["quantized_concat"], ROWS)


def padded_codes(golden: Golden, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """The case's lists `token_ids_i` as codes [B, L] right-padded with 0, and counts [B]."""
    rows = [vocabulary.visual_codes_of(ids) for ids in golden.listed(golden.inputs, "token_ids")]
    counts = np.array([len(row) for row in rows])
    return np.stack([np.pad(row, (0, counts.max() - len(row))) for row in rows]), counts


def tokenizer_model(config: VisualTokenizerConfig, vocabulary: Vocabulary) -> ModelConfig:
    """A model around a visual tokenizer: its engines read the picture's size from the geometry."""
    geometry = Geometry(image_size=config.eva.image_size, patch_size=config.eva.patch_size)
    return ModelConfig(name="golden", visual_tokenizer=config, geometry=geometry, vocabulary=vocabulary)


def _tokenizer(golden: Golden) -> VisualTokenizerConfig:
    return configs.visual_tokenizer(golden.config, golden.config["eva"], golden.config["llm_dim"])


# tap of the merger's first block -> name in the file
_TAPS = {
    "vision_norm": "ln_vision",
    "causal_attention": "block0_causal_attn_of_norm0_x",
    "cross_attention": "block0_cross_attn_of_norm1_x",
    "output": "block0",
}


class _FirstBlock(nn.Module):
    """What the merger's first block is made of."""

    def __init__(self, merger: TokenMerger) -> None:
        super().__init__()
        self.merger = merger

    def forward(self, features: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        block: Any = self.merger.blocks[0]
        causal, dropped = policies(keep)
        origin = self.merger.ln_vision(features)
        first = block.token_causal_attn(block.norm0(features), lambda logits: policy_softmax(logits, causal))
        second = block.token_cross_attn(block.norm1(features), origin, lambda logits: policy_softmax(logits, dropped))
        return origin, first, second, block(features, origin, causal, dropped)


class _QuantizerInput(nn.Module):
    """Features and decision -> what the quantiser reads, for every position."""

    def __init__(self, tokenizer: nn.Module) -> None:
        super().__init__()
        self.tokenizer: Any = tokenizer

    def forward(self, features: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        merged = self.tokenizer.merge(features, keep)
        return self.tokenizer.encode_task_layer(merged)
