"""Building blocks of the video UNet: residual blocks and transformers over space and over time.

Contract: feature maps are [B*T, C, h, w], frames of one video next to each other; `frames` (T) is a plain int, while B,
h and w may be dynamic in an export. Parameter names are those of diffusers. The transformer departs from Stable Video
Diffusion in what the temporal part attends to (reference semantics §9.1).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.errors import UsageError
from runtime.geometry import CONTEXT_GRID

TRANSFORMER_GROUP_EPS = 1e-6


def sinusoid(values: Tensor, dim: int) -> Tensor:
    """values [N] -> [N, dim] float32: cosines, then sines, of dim / 2 frequencies from 1 down towards 1/10000."""
    half = dim // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float().unsqueeze(-1) * exponent.exp()  # [N, dim / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class SinusoidMlp(nn.Module):
    """Linear, SiLU, Linear over a sinusoidal embedding."""

    def __init__(self, in_dim: int, hidden: int, out_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, hidden)
        self.linear_2 = nn.Linear(hidden, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[.., in_dim] -> [.., out_dim]."""
        return self.linear_2(F.silu(self.linear_1(x)))


class Mixer(nn.Module):
    """Learned blend: sigmoid(m) * spatial + (1 - sigmoid(m)) * temporal."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, spatial: Tensor, temporal: Tensor) -> Tensor:
        """Two tensors of one shape -> their blend."""
        alpha = torch.sigmoid(self.mix_factor)
        return alpha * spatial + (1.0 - alpha) * temporal


class SpatialResBlock(nn.Module):
    """3x3 residual block on every frame."""

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, eps: float, groups: int) -> None:
        super().__init__()
        self.channels = out_channels
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut: nn.Module = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.conv_shortcut = nn.Identity()

    def forward(self, x: Tensor, emb: Tensor, frames: int) -> Tensor:
        """x [B*T, Cin, h, w], emb [B, E] -> [B*T, Cout, h, w]."""
        out = self.conv1(F.silu(self.norm1(x)))
        shift = self.time_emb_proj(emb).repeat(1, frames)  # [B, T*Cout]
        out = out + shift.reshape(-1, self.channels, 1, 1)  # shift [B*T, Cout, 1, 1]
        out = self.conv2(F.silu(self.norm2(out)))
        return self.conv_shortcut(x) + out


def along_time(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """x [B, C, T, h*w] through a (3, 1, 1) convolution, computed in two dimensions: faster on a CPU."""
    return F.conv2d(x, conv.weight.squeeze(-1), conv.bias, padding=(1, 0))


class TemporalResBlock(nn.Module):
    """Residual block along time; its norms see all frames of a video together."""

    def __init__(self, channels: int, emb_dim: int, eps: float, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
        self.time_emb_proj = nn.Linear(emb_dim, channels)
        self.norm2 = nn.GroupNorm(groups, channels, eps)
        self.conv2 = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, C, T, h, w], emb [B, E] -> [B, C, T, h, w]."""
        height, width = x.shape[3:]
        x = x.flatten(3)  # [B, C, T, h*w]
        out = along_time(F.silu(self.norm1(x)), self.conv1)
        out = out + self.time_emb_proj(emb)[:, :, None, None]
        out = x + along_time(F.silu(self.norm2(out)), self.conv2)
        return out.unflatten(3, (height, width))


class SpatioTemporalResBlock(nn.Module):
    """Spatial, then temporal residual block, blended."""

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, eps: float, groups: int) -> None:
        super().__init__()
        self.spatial_res_block = SpatialResBlock(in_channels, out_channels, emb_dim, eps, groups)
        self.temporal_res_block = TemporalResBlock(out_channels, emb_dim, eps, groups)
        self.time_mixer = Mixer()

    def forward(self, x: Tensor, emb: Tensor, frames: int) -> Tensor:
        """x [B*T, Cin, h, w], emb [B, E] (already through SiLU) -> [B*T, Cout, h, w]."""
        x = self.spatial_res_block(x, emb, frames)
        spatial = x.unflatten(0, (-1, frames)).transpose(1, 2)  # [B, C, T, h, w]
        mixed = self.time_mixer(spatial, self.temporal_res_block(spatial, emb))
        return mixed.transpose(1, 2).flatten(0, 1)


class Attention(nn.Module):
    """Multi-head attention without query, key and value biases; the key width may differ from the query's."""

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        if dim % heads:
            raise UsageError(
                f"video UNet: {dim} channels are not a multiple of their {heads} heads; change one of them"
            )
        self.heads = heads
        self.head_dim = dim // heads
        self.scale = self.head_dim**-0.5
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [N, L, C], context [N, S, D] -> [N, L, C]."""
        return self.attend(x, self.to_k(context), self.to_v(context))

    def attend(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The same with projected keys and values [N, S, C]."""
        q, k, v = (
            part.reshape(*part.shape[:2], self.heads, self.head_dim).transpose(1, 2)  # [N, heads, L or S, C / heads]
            for part in (self.to_q(x), keys, values)
        )
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.to_out[0](out.transpose(1, 2).reshape(*x.shape[:2], self.heads * self.head_dim))


class GatedLinear(nn.Module):
    """Linear to twice the width; one half, through exact GELU, gates the other."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[.., dim] -> [.., hidden]."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated linear unit and a Linear back; index 1 of `net` is the dropout of the official names."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GatedLinear(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[.., C] -> [.., C]."""
        return self.net(x)


class SpatialTransformerBlock(nn.Module):
    """Within one frame: self-attention, attention to that frame's motion tokens, feed-forward."""

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """x [B*T, h*w, C], states [B*T, 256, D] -> [B*T, h*w, C]."""
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), states)
        return x + self.ff(self.norm3(x))


class TemporalTransformerBlock(nn.Module):
    """Within one pixel: feed-forward, self-attention over frames, attention to the pixel's motion, feed-forward."""

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(dim)
        self.ff_in = FeedForward(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, states: Tensor, cells: Tensor) -> Tensor:
        """One motion token per frame is the context of a pixel (reference semantics §9.1, step 5).

        Args:
            x: [B, T, h*w, C].
            states: [B, T, 256, D].
            cells: [h*w] index of the motion token that lies under each pixel.

        Returns:
            [B, T, h*w, C].
        """
        frames, pixels, dim = x.shape[1:]
        x = x.transpose(1, 2).reshape(-1, frames, dim)  # [B*h*w, T, C]
        x = x + self.ff_in(self.norm_in(x))
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        # A nearest resize only repeats tokens, so 256 are projected and the results repeated, not h*w projected.
        keys, values = (
            project(states).index_select(2, cells).transpose(1, 2).reshape(-1, frames, dim)  # [B*h*w, T, C]
            for project in (self.attn2.to_k, self.attn2.to_v)
        )
        x = x + self.attn2.attend(self.norm2(x), keys, values)
        x = x + self.ff(self.norm3(x))
        return x.unflatten(0, (-1, pixels)).transpose(1, 2)


def motion_cells(height: int, width: int, device: torch.device) -> Tensor:
    """[height * width] index into the 16x16 motion grid of each pixel of a map, by nearest resize."""
    rows = (torch.arange(height, device=device) * CONTEXT_GRID).div(height, rounding_mode="trunc")
    columns = (torch.arange(width, device=device) * CONTEXT_GRID).div(width, rounding_mode="trunc")
    return (rows[:, None] * CONTEXT_GRID + columns).flatten()


class SpatioTemporalTransformer(nn.Module):
    """Spatial and temporal transformer over a feature map, blended, with a residual around both."""

    def __init__(self, dim: int, heads: int, context_dim: int, groups: int) -> None:
        super().__init__()
        self.dim = dim
        self.norm = nn.GroupNorm(groups, dim, TRANSFORMER_GROUP_EPS)
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList([SpatialTransformerBlock(dim, heads, context_dim)])
        self.temporal_transformer_blocks = nn.ModuleList([TemporalTransformerBlock(dim, heads, context_dim)])
        self.time_pos_embed = SinusoidMlp(dim, 4 * dim, dim)
        self.time_mixer = Mixer()
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, states: Tensor, frames: int) -> Tensor:
        """x [B*T, C, h, w], states [B, T, 256, D] -> [B*T, C, h, w]."""
        height, width = x.shape[2:]
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [B*T, h*w, C]
        order = sinusoid(torch.arange(frames, device=x.device), self.dim).to(x.dtype)  # [T, C]
        order = self.time_pos_embed(order).unsqueeze(1)  # [T, 1, C]
        cells = motion_cells(height, width, x.device)
        tokens = self.transformer_blocks[0](tokens, states.flatten(0, 1))
        spatial = tokens.unflatten(0, (-1, frames))  # [B, T, h*w, C]
        temporal = self.temporal_transformer_blocks[0](spatial + order, states, cells)
        mixed = self.time_mixer(spatial, temporal).flatten(0, 1)
        return x + self.proj_out(mixed).transpose(1, 2).unflatten(2, (height, width))
