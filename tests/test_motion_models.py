"""Vector quantiser, motion tokenizer and motion condition encoder against the reference's numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import Golden, assert_close, load

from runtime.errors import UsageError
from videolavit.config import PRESETS, MotionConditionConfig, MotionTokenizerConfig
from videolavit.models.motion_encoder import MotionConditionEncoder
from videolavit.models.motion_tokenizer import MotionTokenizer
from videolavit.models.quantizer import VectorQuantizer


def _fill(module: torch.nn.Module, golden: Golden) -> None:
    module.load_state_dict({key: torch.from_numpy(value) for key, value in golden.weights.items()}, strict=True)
    module.eval().requires_grad_(False)


def _quantizer() -> tuple[Golden, VectorQuantizer]:
    golden = load("a_vector_quantizer")
    quantizer = VectorQuantizer(golden.meta["config"]["n_embed"], golden.meta["config"]["embedding_dim"])
    _fill(quantizer, golden)
    return golden, quantizer


def _tokenizer(name: str) -> tuple[Golden, MotionTokenizer]:
    golden = load(name)
    c = golden.meta["config"]
    config = MotionTokenizerConfig(
        channels=c["decoder_out_dim"],
        frames=c["num_frames"],
        grid=tuple(c["grid_hw"]),
        dim=c["dim"],
        heads=c["num_heads"],
        stages=tuple(c["stages"]),
        mlp_ratio=c["mlp_ratio"],
        codes=c["n_embed"],
        code_dim=c["embed_dim"],
    )
    tokenizer = MotionTokenizer(config)
    _fill(tokenizer, golden)
    return golden, tokenizer


def test_quantizer_matches_reference() -> None:
    golden, quantizer = _quantizer()
    rows, ids = quantizer.tokenize(torch.from_numpy(golden.inputs["z"]))
    np.testing.assert_array_equal(ids.numpy(), golden.outputs["indices"])
    assert_close(rows, golden.outputs["quantize"], 1e-6)
    assert_close(quantizer.lookup(torch.from_numpy(golden.inputs["ids"])), golden.outputs["from_id"], 1e-6)


def test_quantizer_takes_the_first_of_equal_codes() -> None:
    quantizer = VectorQuantizer(4, 2)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    _, ids = quantizer.tokenize(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
    assert ids.tolist() == [1, 0]


def test_quantizer_measures_distances_in_float32() -> None:
    """Two codes that half precision cannot tell apart at this distance."""
    quantizer = VectorQuantizer(2, 2).half()
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.9995, 0.0], [1.0, 0.0]]))
    rows, ids = quantizer.tokenize(torch.tensor([[1.0, 0.0]], dtype=torch.float16))
    assert ids.tolist() == [1]
    assert rows.dtype == torch.float16


@pytest.mark.parametrize("name", ["b_motion_tokenizer_real_grid", "b_motion_tokenizer_square"])
def test_motion_tokenizer_matches_reference(name: str) -> None:
    golden, tokenizer = _tokenizer(name)
    motion = torch.from_numpy(golden.inputs["motion"])
    assert_close(tokenizer.encoder(motion), golden.outputs["encoder_features"], 3e-5)
    assert_close(tokenizer.features(motion), golden.outputs["to_quantizer_features"], 3e-5)
    codes = tokenizer.encode(motion)
    np.testing.assert_array_equal(codes.numpy(), golden.outputs["tokens"])
    assert_close(tokenizer.decode(torch.from_numpy(golden.outputs["encode_quantize"])), golden.outputs["decode"], 3e-5)
    assert_close(tokenizer.decode_codes(codes), golden.outputs["decode"], 3e-5)
    sizes = [key.removeprefix("reconstruct_") for key in golden.outputs if key.startswith("reconstruct_")]
    assert sizes
    for size in sizes:
        codes_name = "tokens_for_reconstruct" if size.startswith("from_token_") else None
        height, width = map(int, size.removeprefix("from_token_").split("x"))
        if codes_name:
            result = tokenizer.reconstruct_from_codes(torch.from_numpy(golden.inputs[codes_name]), height, width)
        else:
            result = tokenizer.reconstruct(motion, height, width)
        assert_close(result, golden.outputs[f"reconstruct_{size}"], 5e-6)


def test_motion_tokenizer_of_the_shapes_preset() -> None:
    preset = PRESETS["tiny"]
    tokenizer = MotionTokenizer(preset.motion_tokenizer).eval().requires_grad_(False)
    geometry = preset.geometry
    motion = torch.randn(2, 2, geometry.frames, *geometry.motion_grid)
    codes = tokenizer.encode(motion)
    assert tokenizer.token_grid == geometry.motion_token_grid
    assert codes.shape == (2, geometry.motion_tokens)
    assert tokenizer.decode_codes(codes).shape == motion.shape


def test_motion_tokenizer_refuses_what_does_not_fit() -> None:
    config = MotionTokenizerConfig(frames=8, grid=(4, 8), dim=16, heads=2, stages=(1, 1, 1, 1), codes=8, code_dim=4)
    tokenizer = MotionTokenizer(config)
    with pytest.raises(UsageError, match="exactly 2"):
        tokenizer.reconstruct_from_codes(torch.zeros(1, 3, dtype=torch.int64), 4, 8)
    with pytest.raises(UsageError, match="2, 8, 4, 8"):
        tokenizer.reconstruct(torch.zeros(1, 2, 8, 8, 4), 4, 8)
    with pytest.raises(UsageError, match="multiples"):
        MotionTokenizer(replace(config, frames=12))


def test_motion_condition_encoder_matches_reference() -> None:
    golden = load("c_motion_condition_encoder")
    c = golden.meta["config"]
    config = MotionConditionConfig(
        channels=c["in_channel"],
        grid=tuple(c["img_size"]),
        dim=c["dim"],
        heads=c["num_heads"],
        depth=c["depth"],
        mlp_ratio=c["mlp_ratio"],
        out_dim=c["out_channel"],
    )
    encoder = MotionConditionEncoder(config)
    _fill(encoder, golden)
    inputs, outputs = golden.inputs, golden.outputs
    assert_close(encoder(torch.from_numpy(inputs["motion_16x16"])), outputs["forward_16x16"], 3e-5)
    assert_close(encoder.encode(torch.from_numpy(inputs["motion_any"])), outputs["encode_motion"], 3e-5)
