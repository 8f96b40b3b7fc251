"""Graph -> ONNX file.

Contract: `trace` runs torch's TorchScript-based exporter (fast, and dynamic in every free dimension) on a module;
`write_model` stores the result, weights in float16 where that is exact, in one file, or with the weights beside it
when a single file would come near protobuf's limit of 2 GiB. A graph's inputs and outputs have exactly the
names and dimensions of its signature.
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
from export.graphs.language_model import build_language_model
from export.graphs.registry import GRAPHS, LANGUAGE_MODEL
from export.precision import store_losslessly_as_float16
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


def engine_model(checkpoint: Checkpoint, name: str) -> onnx.ModelProto:
    """The ONNX model of engine `name` with the checkpoint's weights in float32."""
    config = checkpoint.config
    if name == LANGUAGE_MODEL:
        return build_language_model(config.language_model, config.vocabulary.size, _arrays(checkpoint, LANGUAGE_MODEL))
    graph = GRAPHS[name]
    if graph.write is not None:
        return graph.write(config, _arrays(checkpoint, graph.components[0]))
    return trace(torch_module(checkpoint, graph), graph, graph.signature(config))


def torch_module(checkpoint: Checkpoint, graph: Graph) -> nn.Module:
    """The torch module of a graph with the checkpoint's weights, in eval mode."""
    return graph.build(checkpoint.config, *map(checkpoint.component, graph.components)).eval()


def trace(module: nn.Module, graph: Graph, signature: Signature) -> onnx.ModelProto:
    """Export `module` at the graph's example sizes."""
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
        )
        model = onnx.load(path)
    for value in model.graph.output:
        set_shape(value, signature.outputs[value.name])
    shorten_names(model.graph)
    return model


def write_model(model: onnx.ModelProto, path: Path) -> list[Path]:
    """Write and check `model`; returns the files, the model's own first."""
    model = store_losslessly_as_float16(model)
    files = [path]
    if model.ByteSize() > SINGLE_FILE_LIMIT:
        data = path.with_suffix(".onnx.data")
        onnx.save_model(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=data.name)
        files.append(data)
    else:
        onnx.save_model(model, path)
    # ONNX Runtime's own operators are unknown to the checker; they are judged when the engine is loaded.
    if all(onnx.defs.has(node.op_type, node.domain) for node in model.graph.node):
        onnx.checker.check_model(path)
    return files


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


def _arrays(checkpoint: Checkpoint, component: str) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in checkpoint.weights.tensors(component)}


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
    """Our translation of `unflatten`, in place while exporting.

    The library's own hides the result's shape from shape inference, which then falls back to the traced sizes: later
    reshapes are baked at the example's batch. It is also ten nodes where one does.
    """
    torch.onnx.register_custom_op_symbolic("aten::unflatten", _unflatten, OPSET)
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic("aten::unflatten", OPSET)


def _unflatten(g: Any, x: Any, dim: Any, sizes: Any) -> Any:
    """Reshape to (axes before: copied, `sizes`, axes behind: read from the input)."""
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
