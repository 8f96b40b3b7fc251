"""Trace a graph without its weights.

Contract: a module is built on hollow parameters, one number stretched to the parameter's shape, so that tracing costs
the memory of activations only. The traced model has every weight as a graph input; `Traced.weights` says which tensor
of which component goes there, and how it is turned first. Nothing that depends on a weight's value is in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from export.graphs.graph import Graph, Signature
from export.onnx import trace
from videolavit.config import ModelConfig
from videolavit.inventory import inventory, module_of
from videolavit.models.components import build

_TURNS: dict[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]] = {
    "transpose": np.transpose,
    "squeeze": np.squeeze,
    "unsqueeze": np.expand_dims,
    "part": lambda array, part: np.split(array, part[1], part[0])[part[2]],
}


@dataclass(frozen=True)
class Weight:
    """Where the values of a graph input come from.

    Attributes:
        component, tensor: name in the checkpoint.
        shape: in the checkpoint.
        turns: ("transpose", permutation), ("squeeze", axes), ("unsqueeze", axes) or ("part", (axis, number of parts,
            which of them)), in the order of application.
    """

    component: str
    tensor: str
    shape: tuple[int, ...]
    turns: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def turned(self, array: np.ndarray) -> np.ndarray:
        """The checkpoint's array in the form that the graph takes; a view where it can be."""
        for kind, axes in self.turns:
            array = _TURNS[kind](array, axes)
        return array


@dataclass(frozen=True)
class Traced:
    """A model without weights. `weights` is keyed by graph input, `signature` has the inputs that remain."""

    model: onnx.ModelProto
    signature: Signature
    weights: dict[str, Weight] = field(default_factory=dict)

    def by_component(self) -> dict[str, dict[str, list[str]]]:
        """Component -> tensor -> graph inputs made from it."""
        result: dict[str, dict[str, list[str]]] = {}
        for name, weight in self.weights.items():
            result.setdefault(weight.component, {}).setdefault(weight.tensor, []).append(name)
        return result


def trace_hollow(config: ModelConfig, graph: Graph) -> Traced:
    """Trace `graph` at its example sizes on a model of `config`."""
    signature = graph.signature(config)
    components = _hollow_components(config, graph.components)
    module = graph.build(config, *components.values()).eval()
    owners = {
        id(tensor): Weight(component, name, tuple(tensor.shape))
        for component, owner in components.items()
        for name, tensor in owner.state_dict(keep_vars=True).items()
    }
    sources = {name: owners[id(tensor)] for name, tensor in module.state_dict(keep_vars=True).items()}
    model = trace(module, graph, signature, weights=False)
    names = [value.name for value in model.graph.input if value.name not in signature.inputs]
    return fold_turns(Traced(model, signature, {name: sources[name] for name in names}))


def fold_turns(traced: Traced) -> Traced:
    """`traced` with transpositions and axes put in or taken from weights moved from the graph into `Weight.turns`."""
    nodes = traced.model.graph.node
    constants = {node.output[0]: node for node in nodes if node.op_type == "Constant"}
    weights, folded = dict(traced.weights), set()
    for node in nodes:
        turn = _turn(node, constants) if node.input and node.input[0] in weights else None
        if turn is not None:
            source = weights[node.input[0]]
            weights[node.output[0]] = replace(source, turns=(*source.turns, turn))
            folded.add(node.output[0])
    return rewired(traced, [node for node in nodes if node.output[0] not in folded], weights)


def rewired(traced: Traced, nodes: Sequence[onnx.NodeProto], weights: Mapping[str, Weight]) -> Traced:
    """`traced` made of other `nodes`, without those whose results nothing reads.

    Args:
        weights: by graph input; those that `traced` does not have are declared, in float32.
    """
    model = onnx.ModelProto()
    model.CopyFrom(traced.model)
    graph = model.graph
    needed, living = {value.name for value in graph.output}, []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            living.append(node)
            needed.update(node.input)
    weights = {name: weight for name, weight in weights.items() if name in needed}
    inputs = [value for value in graph.input if value.name in weights or value.name in traced.signature.inputs]
    inputs += [_declaration(name, weight) for name, weight in weights.items() if name not in traced.weights]
    del graph.node[:], graph.input[:]
    graph.node.extend(living[::-1])
    graph.input.extend(inputs)
    return Traced(model, traced.signature, weights)


def _turn(node: onnx.NodeProto, constants: Mapping[str, onnx.NodeProto]) -> tuple[str, tuple[int, ...]] | None:
    """What a node does to its first input, if it is a known turn."""
    if node.op_type == "Transpose":
        return "transpose", tuple(next(a.ints for a in node.attribute if a.name == "perm"))
    if node.op_type in ("Squeeze", "Unsqueeze") and len(node.input) > 1 and node.input[1] in constants:
        axes = numpy_helper.to_array(constants[node.input[1]].attribute[0].t)
        return node.op_type.lower(), tuple(int(axis) for axis in axes)
    return None


def _declaration(name: str, weight: Weight) -> onnx.ValueInfoProto:
    """The graph input `name` for `weight`."""
    shape = weight.turned(np.broadcast_to(np.float32(0), weight.shape)).shape
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)


def _hollow_components(config: ModelConfig, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """Components without weights. Their values all differ, or the exporter would take equal ones for one parameter."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    numbers = _numbers()
    components = {}
    for name in names:
        with init_empty_weights(include_buffers=False):
            module = build(config, module_of(name))
        state = {key: next(numbers).expand(shape) for key, shape in inventory(config, name).items()}
        module.load_state_dict(state, assign=True)
        components[name] = module.eval().requires_grad_(False)
    return components


def _numbers() -> Iterator[Tensor]:
    count = 1
    while True:
        yield torch.full((), 1e-4 * count)
        count += 1
