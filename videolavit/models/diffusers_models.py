"""The three diffusion modules taken unchanged from diffusers, built from our configurations.

Contract: key-frame UNet and VAE (reference semantics §8.1) and video VAE (§9.2); weights are random, parameter names
are those of diffusers and therefore of the official files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, UNet2DConditionModel
from torch import nn

from videolavit.config import KeyframeUNetConfig, KeyframeVaeConfig, VideoVaeConfig

TIME_IDS = 6  # (original height, width, crop top, left, target height, width)
LATENT_CHANNELS = 4


def build_keyframe_unet(config: KeyframeUNetConfig) -> UNet2DConditionModel:
    """SDXL-type UNet conditioned on prompt embeddings, a pooled embedding and six time ids."""
    attends = [layers is not None for layers in config.transformer_layers]
    return UNet2DConditionModel(
        sample_size=config.sample_size,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_groups,
        cross_attention_dim=config.cross_attention_dim,
        # A plain block has no transformer, but diffusers wants a number for it.
        transformer_layers_per_block=tuple(layers or 1 for layers in config.transformer_layers),
        attention_head_dim=config.heads,  # the library's name for the number of heads
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=config.time_id_dim,
        projection_class_embeddings_input_dim=config.pooled_dim + TIME_IDS * config.time_id_dim,
    )


def build_keyframe_vae(config: KeyframeVaeConfig) -> AutoencoderKL:
    """Image autoencoder of the key-frame model."""
    levels = len(config.block_out_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_groups,
        scaling_factor=config.scaling_factor,
        sample_size=config.sample_size,
    )


def build_video_vae(config: VideoVaeConfig) -> AutoencoderKLTemporalDecoder:
    """Autoencoder whose decoder also convolves over time."""
    with _norm_groups(config.norm_groups):
        return AutoencoderKLTemporalDecoder(
            in_channels=3,
            out_channels=3,
            latent_channels=LATENT_CHANNELS,
            down_block_types=("DownEncoderBlock2D",) * len(config.block_out_channels),
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            scaling_factor=config.scaling_factor,
            sample_size=config.sample_size,
        )


@contextmanager
def _norm_groups(groups: int) -> Iterator[None]:
    """Every GroupNorm made inside has `groups` groups; the library's temporal decoder has no argument for its 32."""
    make = nn.GroupNorm.__init__

    def make_with(self: nn.GroupNorm, num_groups: int, num_channels: int, *args: Any, **kwargs: Any) -> None:
        make(self, groups, num_channels, *args, **kwargs)

    nn.GroupNorm.__init__ = make_with  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.GroupNorm.__init__ = make  # type: ignore[method-assign]
