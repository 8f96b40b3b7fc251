"""Put a checkpoint's weights into a traced model, one tensor at a time.

Contract: `write_streamed` never holds more than one tensor besides the file's own buffers. A weight that the model
takes in float32 is stored in float16 behind a Cast where that loses nothing, or in `storage` where that is given; one
taken through Gather alone is widened after it, so that a table stays narrow in memory too. Small models are one
file; above `export.onnx.SINGLE_FILE_LIMIT` bytes weights go into a second file, `NAME.onnx.data`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from export import onnx as files
from export.hollow import Traced, Weight
from export.storage import FEWEST, DataFile, as_float16, inside
from runtime.errors import CheckpointError
from runtime.files import writing
from videolavit.checkpoints import Weights

Store = Callable[[str, int, Sequence[int], np.ndarray], TensorProto]  # (name, type, shape, data) -> constant
_ITEM = {TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2}


def write_streamed(traced: Traced, weights: Weights, path: Path, storage: int | None = None) -> list[Path]:
    """Write `traced` with its weights to `path`.

    Args:
        storage: TensorProto.FLOAT16 or BFLOAT16 to store every large float32 weight in, rounding it.

    Returns: the files, the model's own first. Raises UsageError when they cannot be written, and CheckpointError for
    a weight that the checkpoint does not have.
    """
    size = sum(int(np.prod(w.shape)) * (_ITEM.get(kind, 4)) for w, kind in _kinds(traced))
    with ExitStack() as stack:
        stack.enter_context(writing(path))
        store: Store = inside
        result = [path]
        if size > files.SINGLE_FILE_LIMIT:
            result.append(path.with_suffix(".onnx.data"))
            store = DataFile(stack.enter_context(result[1].open("wb")), result[1].name)
        model = _Filling(traced, storage, store).run(weights)
        path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(path)
    return result


def _kinds(traced: Traced) -> Iterator[tuple[Weight, int]]:
    for value in traced.model.graph.input:
        if value.name in traced.weights:
            yield traced.weights[value.name], value.type.tensor_type.elem_type


class _Filling:
    def __init__(self, traced: Traced, storage: int | None, store: Store) -> None:
        self._traced, self._storage, self._store = traced, storage, store
        self._model = onnx.ModelProto()
        self._model.CopyFrom(traced.model)
        graph = self._model.graph
        self._declared = {v.name: v.type.tensor_type.elem_type for v in graph.input}
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in set(node.input):
                self._consumers.setdefault(name, []).append(node)
        self._first: list[onnx.NodeProto] = []
        self._after: dict[str, onnx.NodeProto] = {}  # output of a Gather -> the Cast behind it

    def run(self, weights: Weights) -> onnx.ModelProto:
        graph = self._model.graph
        missing = set(self._traced.weights)
        for component, tensors in self._traced.by_component().items():
            for tensor, value in weights.tensors(component):
                for name in tensors.get(tensor, ()):
                    missing.remove(name)
                    source = self._traced.weights[name]
                    if tuple(value.shape) != source.shape:
                        raise CheckpointError(
                            f"{component}: {tensor} is {list(value.shape)}, must be {list(source.shape)}"
                        )
                    graph.initializer.append(self._tensor(name, source.turned(value.numpy())))
        if missing:
            source = self._traced.weights[min(missing)]
            raise CheckpointError(f"{source.component}: weight {source.tensor} is missing; copy the checkpoint whole")
        inputs = [value for value in graph.input if value.name in self._traced.signature.inputs]
        nodes = [n for node in graph.node for n in (node, self._after.get(node.output[0])) if n is not None]
        del graph.input[:], graph.node[:]
        graph.input.extend(inputs)
        graph.node.extend(self._first + nodes)
        return self._model

    def _tensor(self, name: str, array: np.ndarray) -> TensorProto:
        kind = self._declared[name]
        if kind != TensorProto.FLOAT:
            return self._store(name, kind, array.shape, array.astype(helper.tensor_dtype_to_np_dtype(kind)))
        narrow = self._narrow(array)
        if narrow is None:
            return self._store(name, kind, array.shape, array)
        kind = self._storage or TensorProto.FLOAT16
        return self._store(self._widen(name, kind), kind, array.shape, narrow)

    def _narrow(self, array: np.ndarray) -> np.ndarray | None:
        """The array in 16 bits where it is to be stored so."""
        if array.size < FEWEST:
            return None
        if self._storage is None:
            return as_float16(array)
        with np.errstate(over="ignore"):
            return array.astype(helper.tensor_dtype_to_np_dtype(self._storage))

    def _widen(self, name: str, kind: int) -> str:
        """Put the Cast to float32 where it belongs and return the name of the narrow tensor."""
        users = self._consumers.get(name, [])
        narrow = f"{name}.narrow"
        if len(users) == 1 and users[0].op_type == "Gather" and list(users[0].input).index(name) == 0:
            node = users[0]
            result = node.output[0]
            node.input[0], node.output[0] = narrow, f"{result}.narrow"
            self._after[node.output[0]] = helper.make_node(
                "Cast", [node.output[0]], [result], name=f"{result}.cast", to=TensorProto.FLOAT
            )
        else:
            self._first.append(helper.make_node("Cast", [narrow], [name], name=f"{name}.cast", to=TensorProto.FLOAT))
        return narrow
