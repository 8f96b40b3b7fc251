"""Engines of the motion tokenizer and of the motion condition encoder.

Contract: the tokenizer's motion is at ten times the detokenizer's scale (reference semantics §4.1); dividing and
resizing is the caller's.
"""

from __future__ import annotations

from torch import Tensor, nn

from export.graphs.graph import Graph, Input, Signature, integers
from videolavit.config import ModelConfig
from videolavit.models.motion_encoder import MotionConditionEncoder
from videolavit.models.motion_tokenizer import MotionTokenizer


class MotionEncoder(nn.Module):
    """motion [B,2,T,gh,gw] -> codes [B,K] int64."""

    def __init__(self, config: ModelConfig, tokenizer: MotionTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, motion: Tensor) -> Tensor:
        return self.tokenizer.encode(motion)


class MotionDecoder(nn.Module):
    """codes [B,K] int64 -> motion [B,2,T,gh,gw]."""

    def __init__(self, config: ModelConfig, tokenizer: MotionTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, codes: Tensor) -> Tensor:
        return self.tokenizer.decode_codes(codes)


def motion_conditioner(config: ModelConfig, encoder: MotionConditionEncoder) -> nn.Module:
    """motion [B,2,T,16,16] -> states [B,T,256,C]: the component itself."""
    return encoder


def _field(config: ModelConfig) -> tuple[int | str, ...]:
    return ("B", config.motion_tokenizer.channels, config.motion_tokenizer.frames, *config.motion_tokenizer.grid)


def _encoder(config: ModelConfig) -> Signature:
    return Signature({"motion": Input(_field(config))}, {"codes": ("B", config.geometry.motion_tokens)})


def _decoder(config: ModelConfig) -> Signature:
    codes = Input(("B", config.geometry.motion_tokens), integers(config.vocabulary.motion_codes))
    return Signature({"codes": codes}, {"motion": _field(config)})


def _conditioner(config: ModelConfig) -> Signature:
    rows, columns = config.motion_encoder.grid
    frames = config.geometry.frames
    return Signature(
        {"motion": Input(("B", config.motion_encoder.channels, frames, rows, columns))},
        {"states": ("B", frames, rows * columns, config.motion_encoder.out_dim)},
    )


GRAPHS = {
    "motion_encoder": Graph(("motion_tokenizer",), MotionEncoder, _encoder, {"B": 2}, ({"B": 1},)),
    "motion_decoder": Graph(("motion_tokenizer",), MotionDecoder, _decoder, {"B": 2}, ({"B": 1},)),
    "motion_conditioner": Graph(("motion_encoder",), motion_conditioner, _conditioner, {"B": 2}, ({"B": 1},)),
}
