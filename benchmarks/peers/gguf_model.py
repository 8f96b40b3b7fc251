"""The model in llama.cpp's format, from the same safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

_BLOCKS = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_LAYERS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(source: Path, target: Path, precision: str) -> None:
    """`source`, a folder of transformers, as `target`: F32, Q8_0, or Q4_0 with its last matrix in Q8_0.

    The table of embeddings stays in F16 where matrices are integers: rows of it are looked up, not multiplied.
    """
    import gguf
    from safetensors import safe_open

    kinds = gguf.GGMLQuantizationType
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    matrix = {"fp32": kinds.F32, "int8": kinds.Q8_0, "int4": kinds.Q4_0}[precision]
    with safe_open(source / "model.safetensors", "np") as stored:
        for name in stored.keys():  # noqa: SIM118
            array = stored.get_tensor(name).astype(np.float32)
            part = name.removesuffix(".weight").rpartition(".")[2]
            if part in heads:
                array = _interleaved(array, heads[part])
            kind = kinds.F32 if array.ndim == 1 else matrix
            if precision != "fp32" and part == "embed_tokens":
                kind = kinds.F16
            if precision == "int4" and part == "lm_head":
                kind = kinds.Q8_0
            writer.add_tensor(_name(name), gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of every head as llama.cpp rotates them: pairs side by side, not half a head apart."""
    return matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


def _name(name: str) -> str:
    plain = name.removesuffix(".weight").removeprefix("model.")
    if plain in _BLOCKS:
        return f"{_BLOCKS[plain]}.weight"
    _, layer, part = plain.split(".", 2)
    return f"blk.{layer}.{_LAYERS[part]}.weight"
