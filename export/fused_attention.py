"""Attention as one operator of ONNX Runtime.

Contract: `fuse_attention` replaces the products and the softmax of attention without a mask by
com.microsoft.MultiHeadAttention, which goes over the keys in blocks and never holds all scores: of a picture they are
the largest tensor there is, and grow with the fourth power of its side. The operator takes and gives [N, L, heads * d],
as projections do, so heads are neither cut out nor joined again. Attention in any other form stays as it is. TensorRT
does not know the operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.hollow import Traced, rewired

DOMAIN = "com.microsoft"
_CUT, _CUT_TURNED = (0, 2, 1, 3), (0, 2, 3, 1)  # [N, L, heads, d] -> [N, heads, L, d], and keys -> [N, heads, d, S]


def fuse_attention(traced: Traced) -> Traced:
    """`traced`, in whatever precision, with its attention fused where it is of the exporter's form."""
    graph = traced.model.graph
    finder = _Finder(graph)
    fused = {match.result: match.nodes() for node in graph.node if (match := finder.match(node)) is not None}
    if not fused:
        return traced
    result = rewired(traced, [new for node in graph.node for new in fused.get(node.output[0], [node])], traced.weights)
    result.model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return result


@dataclass(frozen=True)
class _Match:
    """One attention: values [N, L or S, heads * d] that go in, the value that comes out, and what is between.

    `scale` is 0 where the operator's own holds, d^-0.5; `kind` is the type the result is cast to, None where it stays.
    """

    query: str
    key: str
    value: str
    result: str
    heads: int
    scale: float
    kind: int | None
    name: str

    def nodes(self) -> list[onnx.NodeProto]:
        result = self.result if self.kind is None else f"{self.result}.uncast"
        attention = helper.make_node(
            "MultiHeadAttention",
            [self.query, self.key, self.value],
            [result],
            name=self.name,
            domain=DOMAIN,
            num_heads=self.heads,
            **({"scale": self.scale} if self.scale else {}),
        )
        if self.kind is None:
            return [attention]
        return [attention, helper.make_node("Cast", [result], [self.result], name=f"{self.name}.cast", to=self.kind)]


class _Finder:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in set(node.input):
                self.readers.setdefault(name, []).append(node)

    def match(self, softmax: onnx.NodeProto) -> _Match | None:
        """The attention around the softmax over its keys; None where there is none, or it has another form."""
        scores = self._made(softmax.input[0], "MatMul") if softmax.op_type == "Softmax" else None
        mix = self._only_reader(softmax.output[0], "MatMul")
        if scores is None or mix is None or mix.input[0] != softmax.output[0]:
            return None
        left, right = (self._made(name, "Mul") for name in scores.input)
        cast = self._only_reader(mix.output[0], "Cast")
        turned = self._only_reader((cast or mix).output[0], "Transpose")
        joined = None if turned is None else self._only_reader(turned.output[0], "Reshape")
        if left is None or right is None or turned is None or joined is None or _perm(turned) != _CUT:
            return None
        query = self._before_cut(left.input[0], _CUT)
        key = self._before_cut(right.input[0], _CUT_TURNED)
        value = self._before_cut(mix.input[1], _CUT)
        scale, other = self._scale(left.input[1]), self._scale(right.input[1])
        if query is None or key is None or value is None or scale is None or scale != other:
            return None
        if not query[1] == key[1] == value[1] or len(self._sizes(joined.input[1])) != 3:
            return None
        kind = None if cast is None else int(cast.attribute[0].i)
        return _Match(query[0], key[0], value[0], joined.output[0], query[1], scale, kind, mix.name)

    def _made(self, value: str, kind: str) -> onnx.NodeProto | None:
        """The node of type `kind` that makes `value`."""
        node = self.makers.get(value)
        return node if node is not None and node.op_type == kind else None

    def _only_reader(self, value: str, kind: str) -> onnx.NodeProto | None:
        """The node of type `kind` that reads `value`, if nothing else does."""
        readers = self.readers.get(value, [])
        return readers[0] if len(readers) == 1 and readers[0].op_type == kind else None

    def _before_cut(self, value: str, perm: tuple[int, ...]) -> tuple[str, int] | None:
        """What `value` was before it was cut into heads, [N, L, heads * d], and their number."""
        turned = self._made(value, "Transpose")
        cut = None if turned is None or _perm(turned) != perm else self._made(turned.input[0], "Reshape")
        sizes = [] if cut is None else self._sizes(cut.input[1])
        return (cut.input[0], sizes[2]) if cut is not None and len(sizes) == 4 and sizes[2] else None

    def _sizes(self, shape: str) -> list[int | None]:
        """The numbers of a shape; None for one that the run decides. Empty: not even their count is known."""
        node = self.makers.get(shape)
        if node is None:
            return []
        if node.op_type == "Constant":
            return [int(size) for size in np.atleast_1d(_value(node))]
        if node.op_type == "Concat":
            parts = [self._sizes(part) for part in node.input]
            return [size for part in parts for size in part] if all(parts) else []
        if node.op_type == "Unsqueeze":
            return self._sizes(node.input[0]) or [None]  # of a number
        return []

    def _scale(self, factor: str) -> float | None:
        """The scale whose square root is `factor`; 0 where it is taken from the width of a head; else None."""
        node = self.makers.get(factor)
        while node is not None and node.op_type in ("Cast", "Sqrt", "Div"):
            if node.op_type == "Sqrt" and (root := self._made(node.input[0], "Constant")) is not None:
                return float(_value(root))
            node = self.makers.get(node.input[-1])
        return 0.0 if node is not None and node.op_type == "Slice" and self._made(node.input[0], "Shape") else None


def _perm(node: onnx.NodeProto) -> tuple[int, ...]:
    return tuple(next((a.ints for a in node.attribute if a.name == "perm"), ()))


def _value(constant: onnx.NodeProto) -> np.ndarray:
    return numpy_helper.to_array(constant.attribute[0].t)
