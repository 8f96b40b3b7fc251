"""Gated linear layers without a cut through their result.

Contract: `split_gates` turns x W + b, whose last axis is then cut in halves, into two products with half of W each. The
cut would copy the largest activation of a transformer block at every step; here the weights are cut, once, when they
are written. Every value keeps its name.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import onnx
from onnx import helper

from export.hollow import Traced, Weight, rewired


def split_gates(traced: Traced) -> Traced:
    """`traced` with its gated layers split, as they leave the exporter: MatMul, Add, Split into two."""
    graph = traced.model.graph
    makers = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    weights, halves = dict(traced.weights), dict[str, list[onnx.NodeProto]]()
    for cut in graph.node:
        layer = _layer(cut, makers, traced.weights)
        if layer is None or any(readers[node.output[0]] > 1 for node in layer):
            continue
        product, add = layer
        bias = next(name for name in add.input if name in traced.weights)
        halves[cut.output[0]] = nodes = []
        for which, result in enumerate(cut.output):
            matrix, offset, between = f"{product.input[1]}.{which}", f"{bias}.{which}", f"{product.output[0]}.{which}"
            weights[matrix] = _half(weights[product.input[1]], 1, which)
            weights[offset] = _half(weights[bias], 0, which)
            nodes.append(
                helper.make_node("MatMul", [product.input[0], matrix], [between], name=f"{product.name}.{which}")
            )
            nodes.append(helper.make_node("Add", [offset, between], [result], name=f"{add.name}.{which}"))
    return rewired(traced, [new for node in graph.node for new in halves.get(node.output[0], [node])], weights)


def _layer(
    cut: onnx.NodeProto, makers: dict[str, onnx.NodeProto], weights: dict[str, Weight]
) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    """The MatMul and the Add whose result `cut` divides in two, if it is such a node."""
    if cut.op_type != "Split" or len(cut.output) != 2 or len(cut.input) != 1:
        return None
    if next((a.i for a in cut.attribute if a.name == "axis"), 0) != -1:
        return None
    add = makers.get(cut.input[0])
    if add is None or add.op_type != "Add":
        return None
    products = [makers[name] for name in add.input if name in makers]
    if len(products) != 1 or products[0].op_type != "MatMul" or products[0].input[1] not in weights:
        return None
    biases = [weights[name] for name in add.input if name in weights]
    return (products[0], add) if len(biases) == 1 and len(biases[0].shape) == 1 else None


def _half(weight: Weight, axis: int, which: int) -> Weight:
    return replace(weight, turns=(*weight.turns, ("part", (axis, 2, which))))
