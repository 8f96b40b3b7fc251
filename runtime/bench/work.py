"""What a call of an ONNX engine has to do: floating-point operations, and bytes of weights.

Contract: counted, not estimated: ONNX Runtime runs the model once and notes the shapes of every node at these very
sizes; the sums are taken over products of matrices, convolutions and attention, two operations per multiplication and
addition. What costs little beside them (norms, activations) is left out. The run is no measurement and takes longer
than others: of networks it is unoptimised, of language models optimised as far as integer weights stay integers, since
ONNX Runtime would otherwise widen all of them before the first product.

Attention is counted as causal: of S new positions each looks at those before it and at itself.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle import EngineEntry
from runtime.engines import EngineOptions, processors

_ITEM = {"float": 4.0, "float16": 2.0, "bfloat16": 2.0, "uint8": 1.0}
_NUMPY = {"float32": np.float32, "float16": np.float16, "int64": np.int64, "int32": np.int32, "bool": np.bool_}


@dataclass(frozen=True)
class Work:
    """`flops` of one call; `weight_bytes` of the matrices it reads, in the form in which they are multiplied."""

    flops: float = 0.0
    weight_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.weight_bytes + other.weight_bytes)


def count_call(model: Path, inputs: Mapping[str, np.ndarray], options: EngineOptions) -> Work:
    """Work of one run of `model` on the CPU. Raises what ONNX Runtime raises for inputs that do not fit."""
    return count(_profile(model, inputs, options.threads or processors(), "ORT_DISABLE_ALL"))


def count_language_model(model: Path, entry: EngineEntry, rows: int, positions: int, options: EngineOptions) -> Work:
    """Work of a prompt of `positions` in each of `rows` rows."""
    sizes = {"B": rows, "S": positions, "C": positions}
    inputs: dict[str, np.ndarray] = {}
    for tensor in entry.inputs:
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape)
        inputs[tensor.name] = np.zeros(shape, _NUMPY[tensor.dtype])
    inputs["new_lengths"] = np.full(rows, positions, np.int32)
    return count(_profile(model, inputs, options.threads or processors(), "ORT_ENABLE_EXTENDED"))


def count(nodes: Iterable[Mapping[str, Any]]) -> Work:
    """Sum over nodes as a profile has them: `op_name`, and `input_type_shape` and `output_type_shape`, each a list
    of {type: shape}."""
    flops = weights = 0.0
    for node in nodes:
        op = node["op_name"]
        given = [next(iter(value.items())) for value in node["input_type_shape"]]
        made = [next(iter(value.items())) for value in node["output_type_shape"]]
        shapes = [shape for _, shape in given]
        if op in ("MatMul", "Gemm"):
            flops += 2.0 * math.prod(made[0][1]) * _inner(op, shapes[0], made[0][1])
            if len(shapes[1]) == 2:
                weights += math.prod(shapes[1]) * _ITEM[given[1][0]]
        elif op == "MatMulNBits":  # multiplied without being widened: codes, packed into bytes, and scales
            flops += 2.0 * math.prod(made[0][1]) * shapes[0][-1]
            weights += math.prod(shapes[1]) * _ITEM[given[1][0]] + math.prod(shapes[2]) * _ITEM[given[2][0]]
        elif op in ("Conv", "ConvTranspose"):
            # A kernel [out, in / groups, ...] is applied for every element of the output; transposed, of the input.
            flops += 2.0 * math.prod(made[0][1] if op == "Conv" else shapes[0]) * math.prod(shapes[1][1:])
        elif op == "GroupQueryAttention":
            flops += _attention(*made[0][1])
        elif op == "Attention":
            rows, heads, steps, width = made[0][1]
            flops += _attention(rows, steps, heads * width)
    return Work(flops, weights)


def _inner(op: str, first: list[int], out: list[int]) -> int:
    """Length of the sums in a product; the first matrix of a Gemm may be transposed."""
    return first[-1] if op == "MatMul" else math.prod(first) // out[0]


def _attention(rows: int, steps: int, width: int) -> float:
    """Scores and their use, for new positions without a past, `width` over all heads."""
    return 2 * 2.0 * rows * width * steps * (steps + 1) / 2


def _profile(model: Path, inputs: Mapping[str, np.ndarray], threads: int, level: str) -> list[dict[str, Any]]:
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="videolavit-work-") as folder:
        settings = onnxruntime.SessionOptions()
        settings.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        settings.intra_op_num_threads = threads
        settings.enable_mem_reuse = False  # planning it takes longer than the run (runtime.backends.onnxruntime)
        settings.log_severity_level = 4
        # A weight that was packed is not among a node's inputs any more.
        settings.add_session_config_entry("session.disable_prepacking", "1")
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])
        session.run(None, dict(inputs))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = (event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"))
    return [event["args"] for event in kernels]
