"""Number formats of stored weights.

Contract: what is stored narrower computes as before; a function here says exactly what it keeps.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_SMALL = 256  # elements; below, the Cast node costs more than it saves


def store_losslessly_as_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` with half the bytes where that loses nothing; results are equal bit by bit.

    Every float32 initialiser of the main graph with at least 256 elements, all exactly representable in float16, is
    stored as float16 behind a Cast to float32, which ONNX Runtime evaluates once at load. The weights of a checkpoint
    in half precision are such values. Initialisers that are also graph inputs stay, a caller may override those.
    External data must have been loaded.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    inputs = {value.name for value in graph.input}
    taken = _names(graph)
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.name in inputs:
            continue
        array = numpy_helper.to_array(tensor)
        if array.size < _SMALL:
            continue
        half = _as_float16(array)
        if half is None:
            continue
        name = _free_name(f"{tensor.name}.float16", taken)
        node = helper.make_node("Cast", [name], [tensor.name], name=f"{name}.cast", to=TensorProto.FLOAT)
        tensor.CopyFrom(numpy_helper.from_array(half, name))
        casts.append(node)
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend(casts + nodes)  # first, so that nodes of subgraphs find the values too
    return result


def _as_float16(array: np.ndarray) -> np.ndarray | None:
    """`array` in float16, or None when a bit would be lost."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    same = np.array_equal(half.astype(np.float32).view(np.uint32), np.ascontiguousarray(array).view(np.uint32))
    return half if same else None


def _names(graph: onnx.GraphProto) -> set[str]:
    """Every value name in the graph and its subgraphs."""
    names = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    for node in graph.node:
        names.update(node.input, node.output)
        for attribute in node.attribute:
            for subgraph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                names |= _names(subgraph)
    return names


def _free_name(wanted: str, taken: set[str]) -> str:
    name = wanted
    while name in taken:
        name += "_"
    taken.add(name)
    return name
