"""The decoder, written node by node around its attention flavour; weights are named here and filled in later.

Contract: `outline` gives the nodes, inputs and outputs of the engine described in `export.language_model`, and
the list of weights that its nodes name but that have no values yet. Query, key and value share one matrix, and so do
gate and up: larger products are faster and read their input once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from export.graphs.writer import GraphWriter
from export.language_model.attention import ATTENTION, Frame
from export.language_model.formats import Format
from export.language_model.weights import Weight, from_heads, fused, plain
from runtime.errors import UsageError
from videolavit.config import LanguageModelConfig


@dataclass(frozen=True)
class Outline:
    """A model whose weights are missing, and what they are to be: each with its format."""

    model: onnx.ModelProto
    weights: tuple[tuple[Weight, Format], ...]


def outline(
    config: LanguageModelConfig, vocabulary_size: int, attention: str, formats: tuple[Format, Format]
) -> Outline:
    """The engine's graph without its weights.

    Args:
        attention: flavour, a key of `ATTENTION`.
        formats: of the layers, and of the vocabulary matrix.

    Raises UsageError for an unknown flavour and for sizes that a format cannot take.
    """
    if attention not in ATTENTION:
        raise UsageError(f"attention {attention!r}: not known; choose from {', '.join(sorted(ATTENTION))}")
    flavour, (layers, vocabulary) = ATTENTION[attention], formats
    width, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.heads, config.kv_heads
    head = width // heads
    wide = -(-head // flavour.head_multiple) * flavour.head_multiple
    graph = GraphWriter()
    weights: list[tuple[Weight, Format]] = []

    def linear(x: str, name: str, weight: Weight, inputs: int) -> str:
        """x [B, S, in] through a bias-free linear layer."""
        weights.append((weight, layers))
        return layers.linear(graph, x, name, weight, inputs)

    def scale(name: str) -> str:
        weight = plain(f"{name}.weight", f"model.{name}.weight", (width,))
        weights.append((weight, Format(layers.dtype)))
        return weight.name

    graph.input("inputs_embeds", TensorProto.FLOAT, ("B", "S", width))
    graph.input("past_lengths", TensorProto.INT32, ("B",))
    graph.input("new_lengths", TensorProto.INT32, ("B",))
    frame = Frame(graph, config, layers.dtype, wide)
    operators = flavour.prepare(frame)

    residual = frame.from_float(frame.inputs_embeds, "inputs_embeds_narrow")  # [B, S, D]
    hidden = ""
    for i in range(config.layers):
        layer = f"layers.{i}"
        norm = f"{layer}.input_layernorm"
        if i == 0:
            hidden = operators.norm(residual, norm, scale(norm))
        else:
            hidden, residual = operators.add_norm(hidden, residual, norm, scale(norm))
        mixer = f"{layer}.self_attn"
        parts = {f"model.{mixer}.{part}_proj.weight": (n * head, width) for part, n in _heads(heads, kv_heads)}
        qkv = linear(hidden, f"{mixer}.qkv", fused(f"{mixer}.qkv.weight", parts, head, wide), width)
        name = f"{mixer}.o_proj"
        out = from_heads(f"{name}.weight", f"model.{name}.weight", (width, heads * head), head, wide)
        hidden = linear(operators.attend(i, qkv), name, out, heads * wide)
        norm = f"{layer}.post_attention_layernorm"
        hidden, residual = operators.add_norm(hidden, residual, norm, scale(norm))

        mlp = f"{layer}.mlp"
        parts = {f"model.{mlp}.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        both = linear(hidden, f"{mlp}.gate_up", fused(f"{mlp}.gate_up.weight", parts), width)
        gate, up = f"{mlp}.gate", f"{mlp}.up"
        graph.node("Split", [both], f"{mlp}.split", [gate, up], axis=-1, num_outputs=2)  # [B, S, I] each
        sigmoid = graph.node("Sigmoid", [gate], f"{mlp}.sigmoid")
        silu = graph.node("Mul", [gate, sigmoid], f"{mlp}.silu")
        product = graph.node("Mul", [silu, up], f"{mlp}.product")
        name = f"{mlp}.down_proj"
        hidden = linear(product, name, plain(f"{name}.weight", f"model.{name}.weight", (width, inner)), inner)

    # The vocabulary is large: only each row's last real position goes through the head.
    one = graph.constant("last.one", np.array(1, np.int32))
    last_index = graph.node("Sub", [frame.new_lengths, one], "last.index")  # [B]
    last_index = graph.node("Cast", [last_index], "last.index_int64", to=TensorProto.INT64)
    last_index = graph.node("Unsqueeze", [last_index, frame.integers("last.axis", 1)], "last.index_column")
    hidden, _ = operators.add_norm(
        graph.node("GatherND", [hidden, last_index], "last.hidden", batch_dims=1),  # [B, D]
        graph.node("GatherND", [residual, last_index], "last.residual", batch_dims=1),
        "norm",
        scale("norm"),
    )
    head_weight = plain("lm_head.weight", "lm_head.weight", (vocabulary_size, width))
    weights.append((head_weight, vocabulary))
    logits = vocabulary.linear(graph, hidden, "lm_head", head_weight, width)
    graph.node("Cast", [logits], "logits", to=TensorProto.FLOAT)  # no operation in float32, and removed at load
    graph.output("logits", TensorProto.FLOAT, ("B", vocabulary_size))
    for i in range(config.layers):
        for part in ("key", "value"):
            graph.output(f"present_{part}_{i}", layers.dtype, ("B", kv_heads, "C", wide))
    opset = max(flavour.opset, layers.opset, vocabulary.opset)
    return Outline(graph.model("language_model", opset), tuple(weights))


def _heads(heads: int, kv_heads: int) -> list[tuple[str, int]]:
    return [("q", heads), ("k", kv_heads), ("v", kv_heads)]
