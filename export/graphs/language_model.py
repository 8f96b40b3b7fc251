"""The `language_model` engine: a Llama decoder with a KV cache, written node by node (reference semantics §10).

Contract, with B rows, S new positions, C cache capacity, D width, V vocabulary, H/K query/key heads, d head width:

    inputs_embeds [B, S, D] float32     new positions, right-padded
    past_lengths  [B] int32             positions each row has in the cache
    new_lengths   [B] int32             real positions among the S, at least 1
    past_key_i, past_value_i            [B, K, C, d'] float32, layer i
    logits [B, V] float32               at each row's last real position
    present_key_i, present_value_i      [B, K, C, d'] float32, the same buffers as the past ones

d' is d rounded up to what the attention operator takes (official sizes: d' = d = 128). The widened part of a head is
zero in every weight, so it changes no result.

The caller binds one buffer as past and present, so the cache is updated in place. Three kinds of call are right:
prefill (`past_lengths` all 0, any S, any `new_lengths` <= S), one token a row (S = 1, any `past_lengths`), and a
continuation with S > 1 of a single row without padding (B = 1, `new_lengths` = S). A padded position is written to
the cache behind the row's end and overwritten by the next token before anything reads it. C is at least every
row's past length + S and at most `max_positions`.

How attention and its cache are expressed is one function, chosen by `attention`; the rest of the decoder is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from export.graphs.writer import GraphWriter, Store, weight
from runtime.errors import UsageError
from videolavit.config import LanguageModelConfig

CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class _Names:
    """Values every layer uses."""

    past_lengths: str
    new_lengths: str
    inputs_embeds: str


# (layer, fused query-key-value [B, S, (H + 2K) d']) -> context [B, S, H d']; declares and fills the layer's cache
Attend = Callable[[int, str], str]


@dataclass(frozen=True)
class AttentionFlavour:
    """A way to express attention and its cache. `head_multiple`: head widths the operator takes."""

    prepare: Callable[[GraphWriter, LanguageModelConfig, _Names, int], Attend]
    head_multiple: int


def build_language_model(
    config: LanguageModelConfig,
    vocabulary_size: int,
    weights: Mapping[str, np.ndarray],
    attention: str = "gqa",
    store: Store = numpy_helper.from_array,
) -> onnx.ModelProto:
    """The engine's graph in float32.

    Args:
        weights: Llama state-dict name -> array; each is read once, in graph order, and may be loaded on access.
        attention: flavour, a key of `ATTENTION`.
        store: what becomes of each constant.

    Raises CheckpointError for a missing or misshapen weight, UsageError for an unknown flavour.
    """
    if attention not in ATTENTION:
        raise UsageError(f"attention {attention!r}: not known; choose from {', '.join(sorted(ATTENTION))}")
    width, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.heads, config.kv_heads
    head = width // heads
    flavour = ATTENTION[attention]
    wide = -(-head // flavour.head_multiple) * flavour.head_multiple
    graph = GraphWriter(store)

    def load(name: str, rows: int, columns: int) -> np.ndarray:
        return weight(weights, f"model.{name}.weight", (rows, columns))

    def linear(x: str, name: str, matrix: np.ndarray) -> str:
        """x [B, S, in] through a bias-free linear layer with weight `matrix` [out, in]."""
        return graph.node("MatMul", [x, graph.constant(f"{name}.weight", matrix.T)], name)

    def scale(name: str) -> str:
        return graph.constant(f"{name}.weight", weight(weights, f"model.{name}.weight", (width,)))

    def add_norm(x: str, residual: str, name: str) -> tuple[str, str]:
        """RMS norm of x + residual, and the sum itself."""
        total = f"{name}.residual"
        normed = graph.node(
            "SkipSimplifiedLayerNormalization",
            [x, residual, scale(name)],
            name,
            [name, "", "", total],
            domain=CONTRIB,
            epsilon=config.rms_norm_eps,
        )
        return normed, total

    names = _Names(
        inputs_embeds=graph.input("inputs_embeds", TensorProto.FLOAT, ("B", "S", width)),
        past_lengths=graph.input("past_lengths", TensorProto.INT32, ("B",)),
        new_lengths=graph.input("new_lengths", TensorProto.INT32, ("B",)),
    )
    attend = flavour.prepare(graph, config, names, wide)

    residual = names.inputs_embeds  # [B, S, D]
    hidden = ""
    for i in range(config.layers):
        layer = f"layers.{i}"
        norm = f"{layer}.input_layernorm"
        if i == 0:
            epsilon = config.rms_norm_eps
            hidden = graph.node("SimplifiedLayerNormalization", [residual, scale(norm)], norm, axis=-1, epsilon=epsilon)
        else:
            hidden, residual = add_norm(hidden, residual, norm)
        mixer = f"{layer}.self_attn"
        counts = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
        parts = [widen_heads(load(f"{mixer}.{part}", n * head, width), head, wide) for part, n in counts.items()]
        qkv = linear(hidden, f"{mixer}.qkv", np.concatenate(parts))  # [B, S, (H + 2K) d']
        out = widen_heads(load(f"{mixer}.o_proj", width, heads * head).T, head, wide).T
        hidden = linear(attend(i, qkv), f"{mixer}.o_proj", out)
        hidden, residual = add_norm(hidden, residual, f"{layer}.post_attention_layernorm")

        mlp = f"{layer}.mlp"
        parts = [load(f"{mlp}.{part}", inner, width) for part in ("gate_proj", "up_proj")]
        both = linear(hidden, f"{mlp}.gate_up", np.concatenate(parts))
        gate, up = f"{mlp}.gate", f"{mlp}.up"
        graph.node("Split", [both], f"{mlp}.split", [gate, up], axis=-1, num_outputs=2)  # [B, S, I] each
        sigmoid = graph.node("Sigmoid", [gate], f"{mlp}.sigmoid")
        silu = graph.node("Mul", [gate, sigmoid], f"{mlp}.silu")
        product = graph.node("Mul", [silu, up], f"{mlp}.product")
        hidden = linear(product, f"{mlp}.down_proj", load(f"{mlp}.down_proj", width, inner))

    # The vocabulary is large: only each row's last real position goes through the head.
    one = graph.constant("last.one", np.array(1, np.int32))
    last_index = graph.node("Sub", [names.new_lengths, one], "last.index")  # [B]
    last_index = graph.node("Cast", [last_index], "last.index_int64", to=TensorProto.INT64)
    last_index = graph.node("Unsqueeze", [last_index, graph.constant("last.axis", np.array([1]))], "last.index_column")
    hidden, _ = add_norm(
        graph.node("GatherND", [hidden, last_index], "last.hidden", batch_dims=1),  # [B, D]
        graph.node("GatherND", [residual, last_index], "last.residual", batch_dims=1),
        "norm",
    )
    head_weight = weight(weights, "lm_head.weight", (vocabulary_size, width))
    graph.node("MatMul", [hidden, graph.constant("lm_head.weight", head_weight.T)], "lm_head", ["logits"])
    graph.output("logits", TensorProto.FLOAT, ("B", vocabulary_size))
    for i in range(config.layers):
        for part in ("key", "value"):
            graph.output(f"present_{part}_{i}", TensorProto.FLOAT, ("B", kv_heads, "C", wide))
    return graph.model("language_model")


def widen_heads(matrix: np.ndarray, head: int, wide: int) -> np.ndarray:
    """[n head, ...] -> [n wide, ...]: each half of a head is followed by zeros.

    Halves, because the rotary embedding pairs a head's element i with its element i + d/2.
    """
    if wide == head:
        return matrix
    halves = matrix.reshape(-1, head // 2, *matrix.shape[1:])  # [2n, d/2, ...]
    padding = [(0, 0), (0, (wide - head) // 2)] + [(0, 0)] * (matrix.ndim - 1)
    return np.pad(halves, padding).reshape(-1, *matrix.shape[1:])


def rope_tables(config: LanguageModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the rotary embedding, [max_positions, d / 2] float32 each.

    Angles are float32 products of float32 frequencies, as torch makes them: at large positions a float64 angle
    would be another one.
    """
    head = config.hidden_size // config.heads
    exponents = np.arange(0, head, 2, dtype=np.float32) / np.float32(head)
    frequencies = (np.float32(1.0) / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    angles = np.arange(config.max_positions, dtype=np.float32)[:, None] * frequencies  # [P, d/2]
    return np.cos(angles), np.sin(angles)


def _group_query_attention(graph: GraphWriter, config: LanguageModelConfig, names: _Names, wide: int) -> Attend:
    """ONNX Runtime's GroupQueryAttention: rotary embedding, cache update and attention in one operator.

    The operator rotates heads of a multiple of 16 only. It takes a call for a prompt when `total_sequence_length` is S,
    and then ignores the past. The graph therefore gives S + max(past_lengths), not the longest row's real length: a
    prefill padded further than its longest row stays a prompt. `seqlens_k` is each row's real length after the call
    minus one.
    """
    head = config.hidden_size // config.heads
    padding = [(0, 0), (0, (wide - head) // 2)]  # the widened part is zero, any angle will do
    cos_cache, sin_cache = (
        graph.constant(f"rope.{name}", np.pad(table, padding))
        for name, table in zip(("cos", "sin"), rope_tables(config), strict=True)
    )
    lengths = graph.node("Add", [names.past_lengths, names.new_lengths], "attention.lengths")  # [B]
    one = graph.constant("attention.one", np.array(1, np.int32))
    seqlens = graph.node("Sub", [lengths, one], "attention.seqlens_k")  # [B]
    shape = graph.node("Shape", [names.inputs_embeds], "attention.steps_int64", start=1, end=2)  # [1]
    steps = graph.node("Cast", [shape], "attention.steps", to=TensorProto.INT32)
    longest = graph.node("ReduceMax", [names.past_lengths], "attention.longest_past", keepdims=1)  # [1]
    total = graph.node("Add", [longest, steps], "attention.total_length")  # [1]

    def attend(layer: int, qkv: str) -> str:
        cache = [
            graph.input(f"past_{part}_{layer}", TensorProto.FLOAT, ("B", config.kv_heads, "C", wide))
            for part in ("key", "value")
        ]
        name = f"layers.{layer}.self_attn.attention"
        return graph.node(
            "GroupQueryAttention",
            [qkv, "", "", *cache, seqlens, total, cos_cache, sin_cache],
            name,
            [name, f"present_key_{layer}", f"present_value_{layer}"],
            domain=CONTRIB,
            num_heads=config.heads,
            kv_num_heads=config.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=head**-0.5,
        )

    return attend


ATTENTION: dict[str, AttentionFlavour] = {
    "gqa": AttentionFlavour(_group_query_attention, head_multiple=16),
}
