"""Golden cases of motion as tokens and as context (a, b, c): quantiser, motion tokenizer, motion condition encoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from export.fidelity import configs
from export.fidelity.backends import Call, Engines
from export.fidelity.golden import Golden
from export.fidelity.measure import Measurement, close, equal
from export.graphs.graph import Input, integers
from runtime.geometry import Geometry
from runtime.motion.grid import TOKENIZER_SCALE
from runtime.resize import bicubic
from runtime.vocabulary import Vocabulary
from videolavit.config import ModelConfig, MotionTokenizerConfig
from videolavit.models.quantizer import VectorQuantizer

ROWS, FEATURES, RECONSTRUCTION, CONTEXT = 1e-6, 3e-5, 5e-6, 3e-5


def quantizer(golden: Golden, engines: Engines) -> Iterator[Measurement]:
    """Vector quantiser (reference semantics §3): `z` to rows and ids, `ids` to rows."""
    codes, dim = golden.config["n_embed"], golden.config["embedding_dim"]
    module = configs.fill(VectorQuantizer(codes, dim), golden.weights)
    z, ids = golden.inputs["z"], golden.inputs["ids"]
    axes = tuple(f"z{axis}" for axis in range(z.ndim - 1))
    tokenize = engines.part(Call(module, "tokenize"), {"z": (*axes, dim)}, {"rows": ("N", dim), "codes": ("N",)})
    found = tokenize(z=z)
    yield equal("ids", found["codes"], golden.outputs["indices"])
    yield close("code rows", found["rows"], golden.outputs["quantize"], ROWS)
    axes = tuple(f"i{axis}" for axis in range(ids.ndim))
    lookup = engines.part(Call(module, "lookup"), {"ids": Input(axes, integers(codes))}, {"rows": (*axes, dim)})
    yield close("code rows of given ids", lookup(ids=ids)["rows"], golden.outputs["from_id"], ROWS)


def motion_tokenizer(golden: Golden, engines: Engines) -> Iterator[Measurement]:
    """Motion tokenizer (§4): every stage from motion to codes and back to motion at other sizes."""
    config = configs.motion_tokenizer(golden.config)
    checkpoint = configs.checkpoint(golden, tokenizer_model(config), {"motion_tokenizer": ""})
    module = checkpoint.component("motion_tokenizer")
    motion, outputs = golden.inputs["motion"], golden.outputs
    tokens = outputs["encoder_features"].shape[1:4]
    part = engines.part(
        _Features(module),
        {"motion": ("B", *motion.shape[1:])},
        {"features": ("B", *tokens, config.dim), "vectors": ("B", *tokens, config.code_dim)},
    )
    found = part(motion=motion)
    yield close("encoder features", found["features"], outputs["encoder_features"], FEATURES)
    yield close("quantiser input", found["vectors"], outputs["to_quantizer_features"], FEATURES)
    codes = engines.engine(checkpoint, "motion_encoder")(motion=motion)["codes"]
    yield equal("codes", codes, outputs["tokens"])
    yield equal("codes", codes.reshape(-1), outputs["encode_ids_flat"])
    rows = golden.weights["quantize.embedding.weight"][codes].reshape(-1, *tokens, config.code_dim)
    yield close("code rows", rows, outputs["encode_quantize"], ROWS)
    decoder = engines.engine(checkpoint, "motion_decoder")
    decoded = decoder(codes=codes)["motion"]
    yield close("decoded motion", decoded, outputs["decode"], FEATURES)
    for name, size in _reconstructions(golden):
        given = "from_token" in name
        field = decoder(codes=golden.inputs["tokens_for_reconstruct"])["motion"] if given else decoded
        resized = engines.resize(field, size) / np.float32(TOKENIZER_SCALE)
        yield close("reconstructed motion", resized, outputs[name], RECONSTRUCTION)


def motion_tokenizer_host(golden: Golden) -> Iterator[Measurement]:
    """The resize behind the motion decoder (§4.5) on the stored decoded motion."""
    for name, size in _reconstructions(golden):
        if "from_token" not in name:
            found = bicubic(golden.outputs["decode"], size) / np.float32(TOKENIZER_SCALE)
            yield close("reconstructed motion", found, golden.outputs[name], RECONSTRUCTION)


def condition_encoder(golden: Golden, engines: Engines) -> Iterator[Measurement]:
    """Motion condition encoder (§5), on its own grid and from motion of another size."""
    encoder = configs.motion_encoder(golden.config)
    for name, output in (("motion_16x16", "forward_16x16"), ("motion_any", "encode_motion")):
        motion = golden.inputs[name]
        model = configs.with_frames(ModelConfig(name="golden", motion_encoder=encoder), motion.shape[2])
        checkpoint = configs.checkpoint(golden, model, {"motion_encoder": ""})
        states = engines.engine(checkpoint, "motion_conditioner")(motion=engines.resize(motion, encoder.grid))
        what = "states" if name == "motion_16x16" else "states of resized motion"
        yield close(what, states["states"], golden.outputs[output], CONTEXT)


def condition_encoder_host(golden: Golden) -> Iterator[Measurement]:
    """The resize to the encoder's grid."""
    grid = configs.motion_encoder(golden.config).grid
    found = bicubic(golden.inputs["motion_any"], grid)
    yield close("resized motion", found, golden.outputs["encode_motion_resized_input"], RECONSTRUCTION)


class _Features(nn.Module):
    """Motion -> encoder features and what the quantiser reads."""

    def __init__(self, tokenizer: nn.Module) -> None:
        super().__init__()
        self.tokenizer: Any = tokenizer

    def forward(self, motion: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.tokenizer.encoder(motion)
        return features, self.tokenizer.encode_task_layer(features)


def tokenizer_model(config: MotionTokenizerConfig) -> ModelConfig:
    """A model around a motion tokenizer: its engines read frames, grid and codes from geometry and vocabulary."""
    return ModelConfig(
        name="golden",
        motion_tokenizer=config,
        geometry=Geometry(frames=config.frames, motion_grid=config.grid),
        vocabulary=Vocabulary(motion_codes=config.codes),
    )


def _reconstructions(golden: Golden) -> Iterator[tuple[str, tuple[int, int]]]:
    """Stored reconstructions and their (rows, columns)."""
    for name in golden.outputs:
        if name.startswith("reconstruct_"):
            rows, columns = name.rpartition("_")[2].split("x")
            yield name, (int(rows), int(columns))
