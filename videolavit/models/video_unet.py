"""Video UNet: denoises the latents of a clip under its motion (reference semantics §9.1).

Contract: one forward sees all frames of a clip and predicts v for the four noisy latent channels of each. The number of
frames is whatever the input has; latent height and width must be divisible by 2 ** (levels - 1), 8 officially. Written
without data-dependent branches, so that it exports with batch, height and width dynamic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videolavit.config import VideoUNetConfig
from videolavit.models.video_unet_blocks import (
    SinusoidMlp,
    SpatioTemporalResBlock,
    SpatioTemporalTransformer,
    sinusoid,
)

ATTENTION_DOWN_EPS = UP_EPS = 1e-6  # GroupNorm of residual blocks, by where they stand
PLAIN_DOWN_EPS = MID_EPS = OUT_EPS = 1e-5
TIME_IDS = 3  # (fps, motion bucket, noise level) of the added conditioning


class DownSample(nn.Module):
    """Convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, C, h / 2, w / 2]."""
        return self.conv(x)


class UpSample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, C, 2h, 2w]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by a transformer unless `heads` is None.

    `resnets`, `attentions` and the sampler lists carry the official names; a sampler list that a level does not have
    is left out, as it is there.
    """

    def __init__(
        self,
        in_channels: list[int],
        channels: int,
        emb_dim: int,
        eps: float,
        groups: int,
        heads: int | None,
        context_dim: int,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            SpatioTemporalResBlock(size, channels, emb_dim, eps, groups) for size in in_channels
        )
        self.attentions = nn.ModuleList(
            []
            if heads is None
            else [SpatioTemporalTransformer(channels, heads, context_dim, groups) for _ in in_channels]
        )

    def step(self, index: int, x: Tensor, emb: Tensor, states: Tensor, frames: int) -> Tensor:
        """Residual block `index` and its transformer; x [B*T, C, h, w] -> [B*T, channels, h, w]."""
        x = self.resnets[index](x, emb, frames)
        return self.attentions[index](x, states, frames) if len(self.attentions) else x


class DownLevel(Level):
    """One level of the way down."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        layers: int,
        emb_dim: int,
        groups: int,
        heads: int | None,
        context_dim: int,
        last: bool,
    ) -> None:
        eps = PLAIN_DOWN_EPS if heads is None else ATTENTION_DOWN_EPS
        super().__init__([in_channels] + [channels] * (layers - 1), channels, emb_dim, eps, groups, heads, context_dim)
        if not last:
            self.downsamplers = nn.ModuleList([DownSample(channels)])
        self.last = last

    def forward(self, x: Tensor, emb: Tensor, states: Tensor, frames: int) -> list[Tensor]:
        """x [B*T, Cin, h, w] -> the maps the way up will want, the last one being the level's output."""
        maps = []
        for index in range(len(self.resnets)):
            x = self.step(index, x, emb, states, frames)
            maps.append(x)
        if not self.last:
            maps.append(self.downsamplers[0](x))
        return maps


class MidLevel(Level):
    """Residual block, transformer, residual block at the lowest resolution."""

    def __init__(self, channels: int, emb_dim: int, groups: int, heads: int, context_dim: int) -> None:
        super().__init__([channels], channels, emb_dim, MID_EPS, groups, heads, context_dim)
        self.resnets.append(SpatioTemporalResBlock(channels, channels, emb_dim, MID_EPS, groups))

    def forward(self, x: Tensor, emb: Tensor, states: Tensor, frames: int) -> Tensor:
        """[B*T, C, h, w] -> the same shape."""
        x = self.step(0, x, emb, states, frames)
        return self.resnets[1](x, emb, frames)


class UpLevel(Level):
    """One level of the way up; every residual block also reads a map of the way down."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        skip_channels: list[int],
        emb_dim: int,
        groups: int,
        heads: int | None,
        context_dim: int,
        last: bool,
    ) -> None:
        hidden = [in_channels] + [channels] * (len(skip_channels) - 1)
        joined = [size + skip for size, skip in zip(hidden, skip_channels, strict=True)]
        super().__init__(joined, channels, emb_dim, UP_EPS, groups, heads, context_dim)
        if not last:
            self.upsamplers = nn.ModuleList([UpSample(channels)])
        self.last = last

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor, states: Tensor, frames: int) -> Tensor:
        """x [B*T, Cin, h, w]; takes its skips from the end of the list -> [B*T, C, 2h, 2w] (last level: h, w)."""
        for index in range(len(self.resnets)):
            x = self.step(index, torch.cat([x, skips.pop()], dim=1), emb, states, frames)
        return x if self.last else self.upsamplers[0](x)


class VideoUNet(nn.Module):
    """The official model with the default configuration."""

    def __init__(self, config: VideoUNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, heads, context_dim = config.block_out_channels, config.heads, config.cross_attention_dim
        levels, emb_dim, groups = len(widths), 4 * widths[0], config.norm_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = SinusoidMlp(widths[0], emb_dim, emb_dim)
        self.add_embedding = SinusoidMlp(TIME_IDS * config.time_id_dim, emb_dim, emb_dim)

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # channels of the maps the way down leaves, in order
        for level, width in enumerate(widths):
            last = level == levels - 1
            self.down_blocks.append(
                DownLevel(
                    widths[max(level - 1, 0)],
                    width,
                    config.layers_per_block,
                    emb_dim,
                    groups,
                    None if last else heads[level],
                    context_dim,
                    last,
                )
            )
            skips += [width] * (config.layers_per_block + (not last))
        self.mid_block = MidLevel(widths[-1], emb_dim, groups, heads[-1], context_dim)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            taken = [skips.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(
                UpLevel(
                    widths[min(level + 1, levels - 1)],
                    widths[level],
                    taken,
                    emb_dim,
                    groups,
                    None if level == levels - 1 else heads[level],
                    context_dim,
                    level == 0,
                )
            )
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], OUT_EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor, time_ids: Tensor) -> Tensor:
        """Predict v.

        Args:
            sample: [B, T, 10, h, w] scaled noisy latents, image latents and motion, concatenated.
            timestep: [], [1] or [B] float32; the scheduler's c_noise.
            states: [B, T, 256, D] context of the motion condition encoder.
            time_ids: [B, 3].

        Returns:
            [B, T, 4, h, w].
        """
        frames = sample.shape[1]
        emb = self._embedding(timestep, time_ids, sample)
        x = self.conv_in(sample.flatten(0, 1))  # [B*T, C, h, w]
        skips = [x]
        for down in self.down_blocks:
            skips += down(skips[-1], emb, states, frames)
        x = self.mid_block(skips[-1], emb, states, frames)
        for up in self.up_blocks:
            x = up(x, skips, emb, states, frames)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return x.unflatten(0, (-1, frames))

    def _embedding(self, timestep: Tensor, time_ids: Tensor, like: Tensor) -> Tensor:
        """[B, E]: time step and time ids, through the SiLU that every residual block would start with."""
        time = sinusoid(timestep.reshape(-1), self.config.block_out_channels[0])  # [1 or B, C]
        ids = sinusoid(time_ids.flatten(), self.config.time_id_dim)  # [B*3, d]
        ids = ids.reshape(-1, TIME_IDS * self.config.time_id_dim)  # [B, 3*d]
        return F.silu(self.time_embedding(time.to(like.dtype)) + self.add_embedding(ids.to(like.dtype)))
