"""Engines of the key-frame detokenizer: conditions, UNet, and both halves of its VAE.

Contract: latents leave the encoder as the mode of the posterior, not scaled, and enter the decoder already divided by
the scaling factor (reference semantics §8).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from export.graphs.graph import Graph, Input, Signature, Sizes, integers, uniform
from videolavit.config import ModelConfig
from videolavit.models.keyframe_decoder import KeyframeDecoder
from videolavit.models.visual_tokenizer import DynamicVisualTokenizer


class KeyframeConditioner(nn.Module):
    """codes [B,L] int64 right-padded with 0, counts [B] int64 -> prompt_embeds [B,P,Dp], pooled [B,Dq]."""

    def __init__(self, config: ModelConfig, tokenizer: DynamicVisualTokenizer, decoder: KeyframeDecoder) -> None:
        super().__init__()
        self.quantize = tokenizer.quantize
        self.decoder = decoder

    def forward(self, codes: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        return self.decoder(self.quantize.lookup(codes), counts)


class KeyframeUNet(nn.Module):
    """latents [B,4,h,w], timestep [1], prompt_embeds, pooled, time_ids [B,6] -> noise [B,4,h,w]."""

    def __init__(self, config: ModelConfig, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, pooled: Tensor, time_ids: Tensor
    ) -> Tensor:
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        return self.unet(latents, timestep, prompt_embeds, added_cond_kwargs=conditions, return_dict=False)[0]


class VaeEncoder(nn.Module):
    """image [B,3,H,W] in [-1,1] -> latents [B,4,h,w]; serves both VAEs."""

    def __init__(self, config: ModelConfig, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, image: Tensor) -> Tensor:
        return self.vae.encode(image, return_dict=False)[0].mode()


class KeyframeVaeDecoder(nn.Module):
    """latents [B,4,h,w] -> image [B,3,H,W]."""

    def __init__(self, config: ModelConfig, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False)[0]


def _counts(generator: np.random.Generator, shape: tuple[int, ...], sizes: Sizes) -> np.ndarray:
    return generator.integers(1, sizes["L"] + 1, shape)


def _conditioner(config: ModelConfig) -> Signature:
    decoder = config.keyframe_decoder
    return Signature(
        {"codes": Input(("B", "L"), integers(config.vocabulary.visual_codes)), "counts": Input(("B",), _counts)},
        {"prompt_embeds": ("B", decoder.patches, sum(decoder.projections)), "pooled": ("B", decoder.pooled_dim)},
    )


def _unet(config: ModelConfig) -> Signature:
    decoder = config.keyframe_decoder
    latents = ("B", 4, "h", "w")
    return Signature(
        {
            "latents": Input(latents),
            "timestep": Input((1,), uniform(0, 999)),
            "prompt_embeds": Input(("B", decoder.patches, sum(decoder.projections))),
            "pooled": Input(("B", decoder.pooled_dim)),
            "time_ids": Input(("B", 6), uniform(0, config.geometry.max_side)),
        },
        {"noise": latents},
    )


def vae_encoder(config: ModelConfig) -> Signature:
    """Signature of both VAE encoders."""
    return Signature({"image": Input(("B", 3, "H", "W"), uniform(-1, 1))}, {"latents": ("B", 4, "h", "w")})


def _vae_decoder(config: ModelConfig) -> Signature:
    return Signature({"latents": Input(("B", 4, "h", "w"))}, {"image": ("B", 3, "H", "W")})


PIXELS = {"B": 1, "H": 128, "W": 128}
OTHER_PIXELS = ({"B": 2, "H": 64, "W": 128},)
LATENTS = {"B": 2, "h": 16, "w": 16}
OTHER_LATENTS = ({"B": 1, "h": 8, "w": 16}, {"B": 3, "h": 16, "w": 8})

GRAPHS = {
    "keyframe_conditioner": Graph(
        ("visual_tokenizer", "keyframe_decoder"),
        KeyframeConditioner,
        _conditioner,
        {"B": 2, "L": 3},
        ({"B": 1, "L": 1}, {"B": 3, "L": 64}),
    ),
    "keyframe_unet": Graph(("keyframe_unet",), KeyframeUNet, _unet, LATENTS, OTHER_LATENTS),
    "keyframe_vae_encoder": Graph(("keyframe_vae",), VaeEncoder, vae_encoder, PIXELS, OTHER_PIXELS),
    "keyframe_vae_decoder": Graph(("keyframe_vae",), KeyframeVaeDecoder, _vae_decoder, LATENTS, OTHER_LATENTS),
}
