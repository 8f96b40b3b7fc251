"""Engines of the video detokenizer: spatio-temporal UNet and both halves of its VAE.

Contract: the decoder takes one video of N frames, because its temporal convolutions must not mix two videos
(reference semantics §9.4, step 9).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from export.graphs.graph import Graph, Input, Signature, uniform
from export.graphs.keyframe import OTHER_PIXELS, PIXELS, VaeEncoder, vae_encoder
from videolavit.config import ModelConfig
from videolavit.models.video_unet import VideoUNet


def video_unet(config: ModelConfig, unet: VideoUNet) -> nn.Module:
    """sample [B,T,10,h,w], timestep [1], states [B,T,256,C], time_ids [B,3] -> v [B,T,4,h,w]: the component itself."""
    return unet


class VideoVaeDecoder(nn.Module):
    """latents [N,4,h,w] -> frames [N,3,H,W]."""

    def __init__(self, config: ModelConfig, vae: Any) -> None:
        super().__init__()
        self.decoder: Any = vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        frames = latents.shape[0]
        is_picture = torch.zeros(1, frames, dtype=latents.dtype)
        return self.decoder(latents, image_only_indicator=is_picture, num_frames=frames)


def _unet(config: ModelConfig) -> Signature:
    unet, encoder = config.video_unet, config.motion_encoder
    frames = config.geometry.frames
    context = encoder.grid[0] * encoder.grid[1]
    return Signature(
        {
            "sample": Input(("B", frames, unet.in_channels, "h", "w")),
            "timestep": Input((1,), uniform(-1.5, 1.6)),
            "states": Input(("B", frames, context, encoder.out_dim)),
            "time_ids": Input(("B", 3), uniform(0, 127)),
        },
        {"v": ("B", frames, unet.out_channels, "h", "w")},
    )


def _vae_decoder(config: ModelConfig) -> Signature:
    return Signature({"latents": Input(("N", 4, "h", "w"))}, {"frames": ("N", 3, "H", "W")})


GRAPHS = {
    "video_unet": Graph(
        ("video_unet",),
        video_unet,
        _unet,
        {"B": 2, "h": 16, "w": 16},
        ({"B": 1, "h": 8, "w": 16}, {"B": 1, "h": 24, "w": 8}),
    ),
    "video_vae_encoder": Graph(("video_vae",), VaeEncoder, vae_encoder, PIXELS, OTHER_PIXELS),
    "video_vae_decoder": Graph(
        ("video_vae",),
        VideoVaeDecoder,
        _vae_decoder,
        {"N": 8, "h": 16, "w": 16},
        ({"N": 3, "h": 8, "w": 16}, {"N": 1, "h": 16, "w": 8}),
    ),
}
