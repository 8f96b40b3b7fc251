"""Torch module -> ONNX model.

Contract: `trace` runs torch's TorchScript-based exporter (fast, and dynamic in every free dimension) on a module. The
model's inputs and outputs have exactly the names and dimensions of the graph's signature.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto
from torch import nn
from torch.onnx import symbolic_helper

from export.graphs.graph import Graph, Shape, Signature
from runtime.bundle import TensorEntry
from runtime.errors import BundleError
from videolavit.checkpoints import Checkpoint

OPSET = 18
SINGLE_FILE_LIMIT = 1_500_000_000  # bytes; above, weights go into a file of their own
TRACE_SEED = 0

DTYPES: dict[int, Any] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.INT64: "int64",
    TensorProto.INT32: "int32",
    TensorProto.BOOL: "bool",
}


def torch_module(checkpoint: Checkpoint, graph: Graph) -> nn.Module:
    """The torch module of a graph with the checkpoint's weights, in eval mode."""
    return graph.build(checkpoint.config, *map(checkpoint.component, graph.components)).eval()


def trace(module: nn.Module, graph: Graph, signature: Signature, *, weights: bool = True) -> onnx.ModelProto:
    """Export `module` at the graph's example sizes, with its weights inside or as inputs of the model."""
    example = signature.example(graph.example, TRACE_SEED)
    arguments = tuple(torch.from_numpy(example[name]) for name in signature.inputs)
    with tempfile.TemporaryDirectory(prefix="videolavit-export-") as folder, quiet(), exporter_fixes():
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            module,
            arguments,
            str(path),
            input_names=list(signature.inputs),
            output_names=list(signature.outputs),
            dynamic_axes=signature.dynamic_axes(),
            opset_version=OPSET,
            dynamo=False,
            export_params=weights,
            do_constant_folding=weights,  # of inputs it would fold what they happen to be
        )
        model = onnx.load(path)
    for value in model.graph.output:
        set_shape(value, signature.outputs[value.name])
    shorten_names(model.graph)
    return model


def tensor_entries(values: Any) -> tuple[TensorEntry, ...]:
    """The manifest's description of a model's inputs or outputs. Raises BundleError for a type engines do not have."""
    entries = []
    for value in values:
        tensor = value.type.tensor_type
        if tensor.elem_type not in DTYPES:
            raise BundleError(f"{value.name}: type {TensorProto.DataType.Name(tensor.elem_type)} is not supported")
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        entries.append(TensorEntry(name=value.name, dtype=DTYPES[tensor.elem_type], shape=shape))
    return tuple(entries)


def set_shape(value: onnx.ValueInfoProto, shape: Shape) -> None:
    dims = value.type.tensor_type.shape.dim
    del dims[:]
    for size in shape:
        dims.add(**({"dim_param": size} if isinstance(size, str) else {"dim_value": size}))


def shorten_names(graph: onnx.GraphProto) -> None:
    """Number the intermediate values: traced ones repeat a module path that the node's own name keeps."""
    kept = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    short: dict[str, str] = {}
    for node in _all_nodes(graph):
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name and name not in kept:
                    names[i] = short.setdefault(name, f"v{len(short)}")
    del graph.value_info[:]


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes of the graph and of its subgraphs, whose results are renamed along."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _all_nodes(attribute.g)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's notes on deprecation and on traced constants; parity at other sizes is the judge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def exporter_fixes() -> Iterator[None]:
    """Our translations of operators, in place while exporting."""
    for name, translation in _TRANSLATIONS.items():
        torch.onnx.register_custom_op_symbolic(name, translation, OPSET)
    try:
        yield
    finally:
        for name in _TRANSLATIONS:
            torch.onnx.unregister_custom_op_symbolic(name, OPSET)


def _unflatten(g: Any, x: Any, dim: Any, sizes: Any) -> Any:
    """Reshape to (axes before: copied, `sizes`, axes behind: read from the input).

    The library's own hides the result's shape from shape inference, which then falls back to the traced sizes: later
    reshapes are baked at the example's batch. It is also ten nodes where one does.
    """
    rank = symbolic_helper._get_tensor_rank(x)
    axis = symbolic_helper._get_const(dim, "i", "dim") % rank
    parts = [g.op("Constant", value_t=torch.zeros(axis, dtype=torch.int64))] if axis else []  # 0 copies a dimension
    if symbolic_helper._is_packed_list(sizes):
        parts += [symbolic_helper._unsqueeze_helper(g, size, [0]) for size in symbolic_helper._unpack_list(sizes)]
    else:
        parts.append(sizes)
    if axis + 1 < rank:
        parts.append(g.op("Shape", x, start_i=axis + 1))
    return g.op("Reshape", x, g.op("Concat", *parts, axis_i=0))


def _chunk(g: Any, x: Any, chunks: int, dim: int) -> Any:
    """One Split, where the library's own has a Slice for each part and ten nodes for their bounds."""
    return g.op("Split", x, axis_i=dim, num_outputs_i=chunks, outputs=chunks)


_TRANSLATIONS: dict[str, Any] = {"aten::unflatten": _unflatten, "prim::ConstantChunk": _chunk}
