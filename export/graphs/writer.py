"""Write an ONNX graph node by node.

Contract: names are given by the caller and become node and value names alike, so every node says which module it
comes from; a node's first output is named as the node. Nothing is traced. Each constant passes through one
`store` function, which may keep it in the model or put its bytes elsewhere and return a tensor that refers to
them: no array is kept by the writer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Store = Callable[[np.ndarray, str], TensorProto]  # (array, name) -> tensor, as onnx.numpy_helper.from_array

OPSET, IR_VERSION = 21, 10  # what ONNX Runtime 1.22, the oldest we support, reads with room to spare


class GraphWriter:
    """Collects nodes, constants, inputs and outputs; `model()` puts them together."""

    def __init__(self, store: Store = numpy_helper.from_array) -> None:
        self._store = store
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def constant(self, name: str, array: np.ndarray) -> str:
        self._constants.append(self._store(np.ascontiguousarray(array), name))
        return name

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        outputs: Sequence[str] = (),
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node and return the name of its first output. An empty string is an input or output left out."""
        outputs = tuple(outputs) or (name,)
        self._nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def model(self, name: str, opset: int = OPSET) -> onnx.ModelProto:
        """The model. A later `opset` than the default brings the IR version that came with it."""
        domains = {node.domain for node in self._nodes}
        opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in sorted(domains - {""}))]
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, self._constants)
        version = max(IR_VERSION, helper.find_min_ir_version_for(opsets[:1]))
        return helper.make_model(graph, opset_imports=opsets, ir_version=version, producer_name="videolavit")
