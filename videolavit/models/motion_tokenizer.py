"""Motion tokenizer: a vector-quantised autoencoder over clips of motion (reference semantics §4).

Contract: motion is [B, 2, T, rows, columns] with channels (x, y), ten times larger than the video detokenizer wants
it; a clip becomes `tokens` codes in (t, h, w) order and comes back at the same scale. `reconstruct` and
`reconstruct_from_codes` also resize and divide by ten, which is what the detokenizer takes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.errors import UsageError
from videolavit.config import MotionTokenizerConfig
from videolavit.models.motion_resize import resize_motion
from videolavit.models.quantizer import VectorQuantizer
from videolavit.models.spatiotemporal import SpatioTemporalBlock

MOTION_SCALE = 10.0  # tokenizer scale / detokenizer scale

# Per encoder stage: stride (t, h, w) and the zero padding of F.pad (w left, right, h top, bottom, t front, back).
DOWN = (
    ((1, 2, 2), (0, 1, 0, 1, 1, 1)),
    ((2, 1, 1), (1, 1, 1, 1, 0, 1)),
    ((2, 1, 1), (1, 1, 1, 1, 0, 1)),
    ((2, 2, 2), (0, 1, 0, 1, 0, 1)),
)
UP = ((2.0, 2.0, 2.0), (2.0, 1.0, 1.0), (2.0, 1.0, 1.0), (1.0, 2.0, 2.0))  # per decoder stage, factor (t, h, w)
REDUCTION = (8, 4, 4)  # (t, h, w) cells that one code covers: the product of the strides


class DownSample(nn.Module):
    """Strided 3-D convolution on zero-padded input."""

    def __init__(self, dim: int, stride: tuple[int, int, int], padding: tuple[int, ...]) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv3d(dim, dim, 3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, t, h, w] -> [B, C, t', h', w']."""
        return self.conv(F.pad(x, self.padding))


class UpSample(nn.Module):
    """Nearest-neighbour repetition, then a 3-D convolution that keeps the size."""

    def __init__(self, dim: int, factor: tuple[float, float, float]) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv3d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, t, h, w] -> [B, C, t', h', w']."""
        return self.conv(F.interpolate(x, scale_factor=self.factor, mode="nearest"))


def _blocks(config: MotionTokenizerConfig) -> nn.ModuleList:
    return nn.ModuleList(
        SpatioTemporalBlock(config.dim, config.heads, config.mlp_ratio) for _ in range(sum(config.stages))
    )


def _stages(blocks: nn.ModuleList, sizes: tuple[int, ...]) -> list[list[nn.Module]]:
    """The flat block list cut into stages; it is flat because the official parameter names number it through."""
    rest = iter(blocks)
    return [[next(rest) for _ in range(size)] for size in sizes]


def _run(blocks: list[nn.Module], x: Tensor) -> Tensor:
    """Blocks over x [B, C, t, h, w], which keeps its layout: they want positions flat and channels last."""
    height, width = x.shape[3:]
    x = x.flatten(3).permute(0, 2, 3, 1)  # [B, t, h*w, C]
    for block in blocks:
        x = block(x)
    return x.permute(0, 3, 1, 2).unflatten(3, (height, width))


class MotionEncoder(nn.Module):
    """Motion -> features on the token grid (reference semantics §4.3)."""

    def __init__(self, config: MotionTokenizerConfig) -> None:
        super().__init__()
        rows, columns = config.grid
        self.stages = config.stages
        self.in_proj = nn.Linear(config.channels, config.dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows * columns, config.dim))
        self.temp_pos = nn.Parameter(torch.zeros(1, config.frames, config.dim))
        self.blocks = _blocks(config)
        self.down_sample_layers = nn.ModuleList(DownSample(config.dim, *step) for step in DOWN)
        self.norm = nn.LayerNorm(config.dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.temp_pos, std=0.02)

    def forward(self, motion: Tensor) -> Tensor:
        """[B, 2, T, rows, columns] -> [B, t, h, w, C]."""
        height, width = motion.shape[3:]
        x = self.in_proj(motion.flatten(3).permute(0, 2, 3, 1))  # [B, T, S, C]
        x = x + self.pos_embed.unsqueeze(1) + self.temp_pos.unsqueeze(2)
        x = x.permute(0, 3, 1, 2).unflatten(3, (height, width))  # [B, C, T, rows, columns]
        for blocks, down in zip(_stages(self.blocks, self.stages), self.down_sample_layers, strict=True):
            x = down(_run(blocks, x))
        return self.norm(x.permute(0, 2, 3, 4, 1))


class MotionDecoder(nn.Module):
    """Code vectors on the token grid -> features on the motion grid (reference semantics §4.4)."""

    def __init__(self, config: MotionTokenizerConfig) -> None:
        super().__init__()
        self.stages = config.stages
        self.in_proj = nn.Linear(config.code_dim, config.dim)
        self.blocks = _blocks(config)
        self.up_sample_layers = nn.ModuleList(UpSample(config.dim, factor) for factor in UP)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, t, h, w, d] -> [B, T, rows, columns, C]."""
        x = self.in_proj(vectors).permute(0, 4, 1, 2, 3)  # [B, C, t, h, w]
        for blocks, up in zip(_stages(self.blocks, self.stages), self.up_sample_layers, strict=True):
            x = _run(blocks, up(x))
        return self.norm(x.permute(0, 2, 3, 4, 1))


class MotionTokenizer(nn.Module):
    """Motion <-> discrete codes.

    Raises:
        UsageError: frames or grid of the configuration are not multiples of the reduction (8, 4, 4).
    """

    def __init__(self, config: MotionTokenizerConfig) -> None:
        super().__init__()
        size = (config.frames, *config.grid)
        if any(cells % factor for cells, factor in zip(size, REDUCTION, strict=True)):
            raise UsageError(
                f"motion tokenizer: frames, rows, columns {size} are not multiples of {REDUCTION}; "
                "change the configuration"
            )
        self.config = config
        self.token_grid = tuple(cells // factor for cells, factor in zip(size, REDUCTION, strict=True))  # (t, h, w)
        self.tokens = self.token_grid[0] * self.token_grid[1] * self.token_grid[2]
        self.encoder = MotionEncoder(config)
        self.decoder = MotionDecoder(config)
        self.encode_task_layer = nn.Sequential(
            nn.Linear(config.dim, config.dim), nn.Tanh(), nn.Linear(config.dim, config.code_dim)
        )
        self.decode_task_layer = nn.Sequential(
            nn.Linear(config.dim, config.dim), nn.Tanh(), nn.Linear(config.dim, config.channels)
        )
        self.quantize = VectorQuantizer(config.codes, config.code_dim)

    def features(self, motion: Tensor) -> Tensor:
        """motion [B, 2, T, rows, columns] -> what the quantiser reads, [B, t, h, w, d]."""
        return self.encode_task_layer(self.encoder(motion))

    def encode(self, motion: Tensor) -> Tensor:
        """motion [B, 2, T, rows, columns] -> codes [B, tokens] int64, 0-based, in (t, h, w) order."""
        _, ids = self.quantize.tokenize(self.features(motion))
        return ids.reshape(-1, self.tokens)

    def decode(self, vectors: Tensor) -> Tensor:
        """Code vectors [B, t, h, w, d] -> motion [B, 2, T, rows, columns]."""
        return self.decode_task_layer(self.decoder(vectors)).permute(0, 4, 1, 2, 3)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """codes [B, tokens] -> motion [B, 2, T, rows, columns], still ten times the detokenizer's scale."""
        return self.decode(self.quantize.lookup(codes).unflatten(1, self.token_grid))

    def reconstruct(self, motion: Tensor, height: int, width: int) -> Tensor:
        """Motion through its codes and back, as the detokenizer takes it (reference semantics §4.5).

        Args:
            motion: [B, 2, T, rows, columns], tokenizer scale.
            height, width: wanted size; the latent size of the video, pixels / 8.

        Returns:
            [B, 2, T, height, width] at the detokenizer's scale.

        Raises:
            UsageError: motion is not on this tokenizer's grid.
        """
        expected = (self.config.channels, self.config.frames, *self.config.grid)
        if tuple(motion.shape[1:]) != expected:
            raise UsageError(f"motion of shape {tuple(motion.shape)}: this tokenizer takes [B, {str(expected)[1:-1]}]")
        return self.reconstruct_from_codes(self.encode(motion), height, width)

    def reconstruct_from_codes(self, codes: Tensor, height: int, width: int) -> Tensor:
        """codes [B, tokens] -> motion [B, 2, T, height, width] at the detokenizer's scale (§4.5).

        Raises:
            UsageError: the number of codes is not the one a clip has.
        """
        if codes.shape[-1] != self.tokens:
            raise UsageError(f"{codes.shape[-1]} motion codes: a clip of this tokenizer has exactly {self.tokens}")
        return resize_motion(self.decode_codes(codes), height, width) / MOTION_SCALE
