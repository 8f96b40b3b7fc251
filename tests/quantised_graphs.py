"""Which products of an ONNX graph are computed from codes."""

from __future__ import annotations

import onnx


def products(model: onnx.ModelProto) -> dict[str, bool]:
    """Convolutions and products of matrices by name, and whether both factors come from codes."""
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    return {
        node.name: all(made_by.get(name) == "DequantizeLinear" for name in node.input[:2])
        for node in model.graph.node
        if node.op_type in ("Conv", "MatMul", "Gemm")
    }
