"""Arithmetic in half precision.

Contract: `narrow` rewrites a float32 model without weights (`export.hollow.Traced`) so that it computes in float16 or
bfloat16. Inputs and outputs keep their types. Stay in float32: norms, reductions, exponentials and angles (`_WIDE`);
whatever leads only to a code, an integer that has no tolerance; the cheap steps right before one of these; nodes with
a constant the narrow type does not hold; and operators that have no such type in the standard. Weights take the type
in which they are used.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.hollow import Traced

FLOAT = TensorProto.FLOAT
_LARGEST = {TensorProto.FLOAT16: 65504.0, TensorProto.BFLOAT16: 3.38e38}
_SMALLEST = {TensorProto.FLOAT16: 6.2e-5, TensorProto.BFLOAT16: 1.2e-38}  # below, precision is lost
_CODES = {"ArgMin", "ArgMax", "TopK"}
_WIDE = _CODES | {
    *("InstanceNormalization", "LayerNormalization", "GroupNormalization", "BatchNormalization", "LogSoftmax"),
    *("ReduceMean", "ReduceSum", "ReduceL2", "ReduceMax", "Pow", "Sqrt", "Reciprocal", "Exp", "Log", "Sin", "Cos"),
    *("CumSum", "Range", "Cast", "ConstantOfShape", "EyeLike"),
}
_MOVES = {
    *("Reshape", "Transpose", "Slice", "Concat", "Gather", "Unsqueeze", "Squeeze", "Expand", "Tile", "Flatten"),
    *("Split", "Identity", "Pad"),
}
_CHEAP = _MOVES | {"Add", "Sub", "Mul", "Div", "Neg", "Abs", "Clip", "Where", "Min", "Max"}


def narrow(traced: Traced, half: int) -> Traced:
    """`traced` computing in `half`, TensorProto.FLOAT16 or BFLOAT16."""
    model = onnx.ModelProto()
    model.CopyFrom(traced.model)
    _Narrowing(model, traced, half).run()
    return Traced(model, traced.signature, traced.weights)


class _Narrowing:
    def __init__(self, model: onnx.ModelProto, traced: Traced, half: int) -> None:
        self.model, self.half = model, half
        graph = model.graph
        self.opset = next(entry.version for entry in model.opset_import if not entry.domain)
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self.floats = {
            value.name
            for value in (*inferred.value_info, *graph.input, *graph.output)
            if value.type.tensor_type.elem_type == FLOAT
        }
        self.constants = {
            node.output[0]: numpy_helper.to_array(node.attribute[0].t)
            for node in graph.node
            if node.op_type == "Constant"
            and node.attribute[0].name == "value"
            and node.attribute[0].t.data_type == FLOAT
        }
        self.weights = set(traced.weights)
        self.outputs = {value.name for value in graph.output}
        self.producer = {name: node for node in graph.node for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in set(node.input):
                self.consumers.setdefault(name, []).append(node)
        self.wide = self._wide_nodes()
        self.native: dict[str, int] = {}  # type in which a float value is computed
        self.made: dict[tuple[str, int], str] = {}  # copies of values in another type
        self.nodes: list[onnx.NodeProto] = []

    def run(self) -> None:
        graph = self.model.graph
        for value in graph.input:
            if value.name in self.weights and value.name in self.floats:
                wanted = {
                    self._wanted(n, i) for n in self.consumers.get(value.name, []) for i in self._at(n, value.name)
                }
                if wanted == {self.half}:
                    value.type.tensor_type.elem_type = self.half
                    self.native[value.name] = self.half
        for node in list(graph.node):
            if node.output and node.output[0] in self.constants:
                continue
            self._place(node)
        for name in sorted(self.outputs & self.floats):
            if self.native.get(name, FLOAT) != FLOAT:
                self._rename_result(name)
        del graph.node[:]
        graph.node.extend(self.nodes)

    def _wide_nodes(self) -> set[str]:
        """Names of the first outputs of nodes that compute in float32."""
        wide: set[str] = set()
        to_codes: set[str] = set()
        for node in reversed(self.model.graph.node):
            key = node.output[0]
            users = [user for name in node.output for user in self.consumers.get(name, [])]
            inside = bool(users) and not self.outputs.intersection(node.output)
            if node.op_type in _CODES or (inside and all(user.output[0] in to_codes for user in users)):
                to_codes.add(key)
                wide.add(key)
            elif (
                node.op_type in _WIDE
                or not self._narrowable(node)
                or (node.op_type in _CHEAP and inside and all(user.output[0] in wide for user in users))
            ):
                wide.add(key)
        for node in self.model.graph.node:  # what only moves values leaves them as they come
            values = [name for name in node.input if name in self.floats and name not in self.weights]
            produced = [self.producer[name].output[0] for name in values if name in self.producer]
            if node.op_type in _MOVES and values and len(produced) == len(values) and wide.issuperset(produced):
                wide.add(node.output[0])
        return wide

    def _narrowable(self, node: onnx.NodeProto) -> bool:
        if not any(name in self.floats for name in (*node.input, *node.output)):
            return False
        for name in node.input:
            if name in self.constants:
                sizes = np.abs(self.constants[name][self.constants[name] != 0])
                if sizes.size and (sizes.max() > _LARGEST[self.half] or sizes.min() < _SMALLEST[self.half]):
                    return False
        schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        return all(self._has_type(formals[0]) for formals in (schema.inputs, schema.outputs) if formals)

    def _has_type(self, formal: onnx.defs.OpSchema.FormalParameter) -> bool:
        return ("tensor(float16)" if self.half == TensorProto.FLOAT16 else "tensor(bfloat16)") in formal.types

    def _wanted(self, node: onnx.NodeProto, index: int) -> int:
        """Type in which a node takes its float input `index`."""
        if node.output[0] in self.wide:
            return FLOAT
        formals = onnx.defs.get_schema(node.op_type, self.opset, node.domain).inputs
        formal = formals[min(index, len(formals) - 1)]
        return self.half if self._has_type(formal) else FLOAT

    @staticmethod
    def _at(node: onnx.NodeProto, name: str) -> Iterator[int]:
        return (index for index, given in enumerate(node.input) if given == name)

    def _place(self, node: onnx.NodeProto) -> None:
        for index, name in enumerate(node.input):
            if name in self.floats or name in self.constants:
                node.input[index] = self._as(name, self._wanted(node, index))
        if node.output[0] not in self.wide:
            for name in node.output:
                if name in self.floats:
                    self.native[name] = self.half
        self.nodes.append(node)

    def _as(self, name: str, kind: int) -> str:
        """Name of value `name` in type `kind`, made before the node in hand."""
        if name not in self.constants and self.native.get(name, FLOAT) == kind:
            return name
        if (name, kind) not in self.made:
            self.made[name, kind] = result = name if name in self.constants and kind == FLOAT else f"{name}.{kind}"
            if name in self.constants:
                tensor = _tensor(self.constants[name], kind)
                self.nodes.append(helper.make_node("Constant", [], [result], name=f"{result}.constant", value=tensor))
            else:
                self.nodes.append(helper.make_node("Cast", [name], [result], name=f"{result}.cast", to=kind))
        return self.made[name, kind]

    def _rename_result(self, name: str) -> None:
        """Give output `name` in float32 as before: the narrow value takes another name."""
        inner = f"{name}.{self.half}.inner"
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, value in enumerate(names):
                    if value == name:
                        names[index] = inner
        self.nodes.append(helper.make_node("Cast", [inner], [name], name=f"{name}.cast", to=FLOAT))


def _tensor(array: np.ndarray, kind: int) -> TensorProto:
    if kind == FLOAT:
        return numpy_helper.from_array(np.asarray(array, np.float32))
    return numpy_helper.from_array(np.asarray(array).astype(helper.tensor_dtype_to_np_dtype(kind)))
