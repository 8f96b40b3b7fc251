"""Attention, its cache and its norms in the operators of one runtime: the language model's three flavours.

Contract: a flavour turns the fused query-key-value [B, S, (H + 2K) d'] of a layer into its context [B, S, H d'],
writes the new positions to the cache, and declares the cache's inputs. B rows, S new positions, C cache capacity, H/K
query/key heads, d' head width, a multiple of the flavour's `head_multiple`.

    gqa     ONNX Runtime's GroupQueryAttention and fused norms
    native  TensorScatter and Attention of opset 24, RMSNormalization and RotaryEmbedding of opset 23
    plain   operators of opset 18: ScatterElements, MatMul, Softmax
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from export.graphs.writer import GraphWriter
from videolavit.config import LanguageModelConfig

CONTRIB = "com.microsoft"
LOWEST = np.float32(-1e30)  # a score that no softmax sees; finite, because a row of infinities would be NaN


@dataclass(frozen=True)
class Frame:
    """What a flavour works in.

    Attributes:
        dtype: TensorProto type of activations, cache and norms.
        wide: head width d' in the graph.
        past_lengths, new_lengths, inputs_embeds: names of the graph's inputs.
    """

    graph: GraphWriter
    config: LanguageModelConfig
    dtype: int
    wide: int
    past_lengths: str = "past_lengths"
    new_lengths: str = "new_lengths"
    inputs_embeds: str = "inputs_embeds"

    @property
    def head(self) -> int:
        """Head width of the checkpoint."""
        return self.config.hidden_size // self.config.heads

    def cache(self, layer: int) -> tuple[str, str]:
        """Declare the past keys and values of a layer, [B, K, C, d'] each."""
        shape = ("B", self.config.kv_heads, "C", self.wide)
        key, value = (self.graph.input(f"past_{part}_{layer}", self.dtype, shape) for part in ("key", "value"))
        return key, value

    def integers(self, name: str, *values: int) -> str:
        return self.graph.constant(name, np.array(values, np.int64))

    def typed(self, name: str, array: np.ndarray) -> str:
        """A constant in the frame's type."""
        return self.graph.constant(name, array.astype(helper.tensor_dtype_to_np_dtype(self.dtype)))

    def as_float(self, value: str, name: str) -> str:
        """`value` in float32."""
        if self.dtype == TensorProto.FLOAT:
            return value
        return self.graph.node("Cast", [value], name, to=TensorProto.FLOAT)

    def from_float(self, value: str, name: str) -> str:
        """A float32 `value` in the frame's type."""
        if self.dtype == TensorProto.FLOAT:
            return value
        return self.graph.node("Cast", [value], name, to=self.dtype)


Attend = Callable[[int, str], str]  # (layer, query-key-value) -> context
Norm = Callable[[str, str, str], str]  # (x, name, name of the scale [D]) -> normed x
AddNorm = Callable[[str, str, str, str], tuple[str, str]]  # (x, residual, name, scale) -> normed sum, sum


@dataclass(frozen=True)
class Operators:
    """A flavour at work in one graph."""

    attend: Attend
    norm: Norm
    add_norm: AddNorm


@dataclass(frozen=True)
class AttentionFlavour:
    """`opset` is the lowest that has its operators."""

    prepare: Callable[[Frame], Operators]
    head_multiple: int
    opset: int


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


def _rope_constants(frame: Frame) -> tuple[str, str]:
    """Cosines and sines [P, d' / 2]; the widened part of a head is zero, any angle will do for it."""
    padding = [(0, 0), (0, (frame.wide - frame.head) // 2)]
    cos, sin = (np.pad(table, padding) for table in rope_tables(frame.config))
    return frame.typed("rope.cos", cos), frame.typed("rope.sin", sin)


def _group_query_attention(frame: Frame) -> Operators:
    """Rotary embedding, cache update and attention in one operator.

    It rotates heads of a multiple of 16 only. It takes a call for a prompt when `total_sequence_length` is S, and then
    ignores the past. The graph therefore gives S + max(past_lengths), not the longest row's real length: a prefill
    padded further than its longest row stays a prompt. `seqlens_k` is each row's real length after the call minus one.
    """
    graph, config = frame.graph, frame.config
    rope = _rope_constants(frame)
    lengths = graph.node("Add", [frame.past_lengths, frame.new_lengths], "attention.lengths")  # [B]
    one = graph.constant("attention.one", np.array(1, np.int32))
    seqlens = graph.node("Sub", [lengths, one], "attention.seqlens_k")  # [B]
    shape = graph.node("Shape", [frame.inputs_embeds], "attention.steps_int64", start=1, end=2)  # [1]
    steps = graph.node("Cast", [shape], "attention.steps", to=TensorProto.INT32)
    longest = graph.node("ReduceMax", [frame.past_lengths], "attention.longest_past", keepdims=1)  # [1]
    total = graph.node("Add", [longest, steps], "attention.total_length")  # [1]

    def attend(layer: int, qkv: str) -> str:
        name = f"layers.{layer}.self_attn.attention"
        return graph.node(
            "GroupQueryAttention",
            [qkv, "", "", *frame.cache(layer), seqlens, total, *rope],
            name,
            [name, f"present_key_{layer}", f"present_value_{layer}"],
            domain=CONTRIB,
            num_heads=config.heads,
            kv_num_heads=config.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=frame.head**-0.5,
        )

    def norm(x: str, name: str, scale: str) -> str:
        return graph.node("SimplifiedLayerNormalization", [x, scale], name, axis=-1, epsilon=config.rms_norm_eps)

    def add_norm(x: str, residual: str, name: str, scale: str) -> tuple[str, str]:
        total = f"{name}.residual"
        outputs = [name, "", "", total]
        epsilon = config.rms_norm_eps
        op = "SkipSimplifiedLayerNormalization"
        return graph.node(op, [x, residual, scale], name, outputs, domain=CONTRIB, epsilon=epsilon), total

    return Operators(attend, norm, add_norm)


def _native(frame: Frame) -> Operators:
    """Operators of their own for cache and attention, which TensorRT has from 10.15 on.

    A boolean mask says what a position sees. `is_causal` with `nonpad_kv_seqlen` would be shorter, but TensorRT-RTX
    builds such a graph and ignores the lengths.
    """
    graph = frame.graph
    rope = _rope_constants(frame)
    places = _places(frame)

    def attend(layer: int, qkv: str) -> str:
        name = f"layers.{layer}.self_attn"
        query, key, value = _split_heads(frame, qkv, name)
        query = graph.node("RotaryEmbedding", [query, *rope, places.positions], f"{name}.query_rope")
        key = graph.node("RotaryEmbedding", [key, *rope, places.positions], f"{name}.key_rope")
        present = [
            graph.node(
                "TensorScatter",
                [past, new, places.past],
                f"{name}.scatter_{part}",
                [f"present_{part}_{layer}"],
                axis=2,
                mode="linear",
            )
            for part, past, new in zip(("key", "value"), frame.cache(layer), (key, value), strict=True)
        ]
        operands = [query, *present, places.mask]
        context = graph.node("Attention", operands, f"{name}.attention", scale=frame.head**-0.5)
        return _merge_heads(frame, context, name)

    def norm(x: str, name: str, scale: str) -> str:
        return graph.node("RMSNormalization", [x, scale], name, axis=-1, epsilon=frame.config.rms_norm_eps)

    return Operators(attend, norm, _adding(graph, norm))


def _plain(frame: Frame) -> Operators:
    """Nothing but what old parsers know. Norms and the softmax are computed in float32."""
    graph, config = frame.graph, frame.config
    heads, kv_heads, wide = config.heads, config.kv_heads, frame.wide
    places = _places(frame)
    column = frame.integers("rope.column", 1)
    cos, sin = (  # [B, 1, S, d'/2]
        graph.node(
            "Unsqueeze", [graph.node("Gather", [table, places.positions], f"{table}_rows"), column], f"{table}_row"
        )
        for table in _rope_constants(frame)
    )
    axes = frame.integers("attention.index_axes", 1, 3)
    index = graph.node("Unsqueeze", [places.positions, axes], "attention.index")  # [B, 1, S, 1]
    scale = frame.typed("attention.scale", np.array(frame.head**-0.5, np.float32))
    lowest = graph.constant("attention.lowest", np.array(LOWEST))
    last = frame.integers("norm.axes", -1)
    epsilon = graph.constant("norm.epsilon", np.array(config.rms_norm_eps, np.float32))
    per_key = frame.integers("attention.per_key", 0, kv_heads, -1, wide)
    per_key_scores = frame.integers("attention.per_key_scores", 0, kv_heads, -1, 0)
    per_query = frame.integers("attention.per_query", 0, heads, -1, 0)

    def rotate(x: str, name: str) -> str:
        """x [B, n, S, d'] turned by its positions' angles."""
        first, second = f"{name}.first", f"{name}.second"
        graph.node("Split", [x], f"{name}.split", [first, second], axis=-1, num_outputs=2)
        parts = [
            graph.node(
                op,
                [
                    graph.node("Mul", [kept, cos], f"{name}.{half}_cos"),
                    graph.node("Mul", [other, sin], f"{name}.{half}_sin"),
                ],
                f"{name}.{half}_turned",
            )
            for half, op, kept, other in (("first", "Sub", first, second), ("second", "Add", second, first))
        ]
        return graph.node("Concat", parts, name, axis=-1)

    def attend(layer: int, qkv: str) -> str:
        name = f"layers.{layer}.self_attn"
        query, key, value = _split_heads(frame, qkv, name)
        query, key = rotate(query, f"{name}.query_rope"), rotate(key, f"{name}.key_rope")
        present = []
        for part, past, new in zip(("key", "value"), frame.cache(layer), (key, value), strict=True):
            shape = graph.node("Shape", [new], f"{name}.{part}_shape")
            where = graph.node("Expand", [index, shape], f"{name}.{part}_index")  # [B, K, S, d']
            outputs = [f"present_{part}_{layer}"]
            present.append(graph.node("ScatterElements", [past, where, new], f"{name}.scatter_{part}", outputs, axis=2))
        # Query heads of one key head stand one after the other: a reshape lines them up with it.
        query = graph.node("Mul", [query, scale], f"{name}.query_scaled")
        query = graph.node("Reshape", [query, per_key], f"{name}.query_per_key")  # [B, K, (H/K) S, d']
        turned = graph.node("Transpose", [present[0]], f"{name}.key_columns", perm=[0, 1, 3, 2])
        scores = graph.node("MatMul", [query, turned], f"{name}.key_scores")  # [B, K, (H/K) S, C]
        scores = graph.node("Reshape", [scores, per_query], f"{name}.scores")  # [B, H, S, C]
        scores = frame.as_float(scores, f"{name}.scores_float")
        scores = graph.node("Where", [places.mask, scores, lowest], f"{name}.masked_scores")
        weights = graph.node("Softmax", [scores], f"{name}.weights", axis=-1)
        weights = frame.from_float(weights, f"{name}.weights_narrow")
        weights = graph.node("Reshape", [weights, per_key_scores], f"{name}.weights_per_key")
        context = graph.node("MatMul", [weights, present[1]], f"{name}.key_context")  # [B, K, (H/K) S, d']
        return _merge_heads(frame, graph.node("Reshape", [context, per_query], f"{name}.context"), name)

    def norm(x: str, name: str, scale: str) -> str:
        x = frame.as_float(x, f"{name}.float")
        square = graph.node("Mul", [x, x], f"{name}.square")
        mean = graph.node("ReduceMean", [square, last], f"{name}.mean", keepdims=1)
        root = graph.node("Sqrt", [graph.node("Add", [mean, epsilon], f"{name}.raised")], f"{name}.root")
        x = frame.from_float(graph.node("Div", [x, root], f"{name}.unit"), f"{name}.narrow")
        return graph.node("Mul", [x, scale], name)

    return Operators(attend, norm, _adding(graph, norm))


@dataclass(frozen=True)
class _Places:
    """`past` [B], `positions` [B, S] (int64) and `mask` [B, 1, S, C], true where a position may look."""

    past: str
    positions: str
    mask: str


def _places(frame: Frame) -> _Places:
    graph = frame.graph
    zero, one = graph.constant("places.zero", np.array(0)), graph.constant("places.one", np.array(1))
    column, row = frame.integers("places.column", 1), frame.integers("places.row", 0)

    def count(value: str, axis: int, name: str) -> str:
        """0, 1, ... up to the size of an axis."""
        size = graph.node("Shape", [value], f"{name}_shape", start=axis, end=axis + 1)
        return graph.node("Range", [zero, graph.node("Squeeze", [size, row], f"{name}_size"), one], name)

    past = graph.node("Cast", [frame.past_lengths], "places.past", to=TensorProto.INT64)
    steps = count(frame.inputs_embeds, 1, "places.steps")
    first = graph.node("Unsqueeze", [past, column], "places.first")  # [B, 1]
    positions = graph.node("Add", [first, steps], "places.positions")
    axes = frame.integers("places.mask_axes", 1, 3)
    looking = graph.node("Unsqueeze", [positions, axes], "places.looking")  # [B, 1, S, 1]
    mask = graph.node("LessOrEqual", [count("past_key_0", 2, "places.cache"), looking], "places.mask")
    return _Places(past, positions, mask)


def _split_heads(frame: Frame, qkv: str, name: str) -> tuple[str, str, str]:
    """[B, S, (H + 2K) d'] -> query [B, H, S, d'], key and value [B, K, S, d']."""
    graph, config, wide = frame.graph, frame.config, frame.wide
    shape = frame.integers(f"{name}.heads_shape", 0, 0, config.heads + 2 * config.kv_heads, wide)
    heads = graph.node("Reshape", [qkv, shape], f"{name}.heads_last")
    heads = graph.node("Transpose", [heads], f"{name}.heads", perm=[0, 2, 1, 3])  # [B, H + 2K, S, d']
    sizes = frame.integers(f"{name}.split_sizes", config.heads, config.kv_heads, config.kv_heads)
    query, key, value = (f"{name}.{part}" for part in ("query", "key", "value"))
    graph.node("Split", [heads, sizes], f"{name}.split", [query, key, value], axis=1)
    return query, key, value


def _merge_heads(frame: Frame, context: str, name: str) -> str:
    """[B, H, S, d'] -> [B, S, H d']."""
    graph = frame.graph
    context = graph.node("Transpose", [context], f"{name}.context_heads", perm=[0, 2, 1, 3])
    shape = frame.integers(f"{name}.context_shape", 0, 0, frame.config.heads * frame.wide)
    return graph.node("Reshape", [context, shape], f"{name}.context_merged")


def _adding(graph: GraphWriter, norm: Norm) -> AddNorm:
    """`norm` of a sum, for runtimes that fuse the two themselves."""

    def add_norm(x: str, residual: str, name: str, scale: str) -> tuple[str, str]:
        total = graph.node("Add", [x, residual], f"{name}.residual")
        return norm(total, name, scale), total

    return add_norm


ATTENTION: dict[str, AttentionFlavour] = {
    "gqa": AttentionFlavour(_group_query_attention, head_multiple=16, opset=21),
    "native": AttentionFlavour(_native, head_multiple=2, opset=24),
    "plain": AttentionFlavour(_plain, head_multiple=2, opset=18),
}
