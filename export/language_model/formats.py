"""Number formats of the language model: in what it computes, and how its matrices are stored.

Contract: `format_of` gives the format of a precision. `encode` turns an assembled weight, a matrix [out, in] or a
vector, into the constants of the graph; `Format.linear` adds the nodes that read them. The operators want matrices as
[in, out]. Int4 models keep the vocabulary's matrix in int8: it is small beside the rest and the scores come from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from export.graphs.writer import GraphWriter
from export.language_model.weights import Weight
from export.quantisation import block_for, pack_int4, quantise
from export.settings import EngineSettings
from export.storage import FEWEST, as_float16
from runtime.errors import CheckpointError

QDQ_OPSET = 21  # brings scales for blocks, and scales in float16
_COMPUTED = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_INTEGERS = {4: TensorProto.INT4, 8: TensorProto.INT8}


@dataclass(frozen=True)
class Encoded:
    """A constant: its name, TensorProto type, shape, and little-endian bytes as they are stored."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass(frozen=True)
class Format:
    """How a weight is stored.

    Attributes:
        dtype: TensorProto type that the graph computes in.
        bits: of a matrix' integer codes; 0 where it is stored in `dtype`.
        blocked: whether int8 scales stand for blocks, which ONNX Runtime wants, or for whole outputs, as TensorRT does.
    """

    dtype: int
    bits: int = 0
    blocked: bool = True

    @property
    def opset(self) -> int:
        """The lowest opset this format can be expressed in."""
        return QDQ_OPSET if self.bits else 1

    def linear(self, graph: GraphWriter, x: str, name: str, weight: Weight, inputs: int) -> str:
        """Nodes for x [B, S, in] through the matrix `weight`, whose constants come later."""
        if self.bits:
            block = self._block(inputs, name)
            layout: dict[str, Any] = {"axis": 0, "block_size": block} if block else {"axis": 1}
            graph.node("DequantizeLinear", [f"{weight.name}.codes", f"{weight.name}.scale"], weight.name, **layout)
        return graph.node("MatMul", [x, weight.name], name)

    def encode(self, name: str, array: np.ndarray) -> Iterator[Encoded]:
        """Constants of weight `name`. A float32 one is stored as float16 where nothing is lost by that.

        Raises CheckpointError for a weight that is not finite, or too large for the type it is to be stored in.
        """
        if array.ndim == 2 and self.bits:
            quantised = quantise(array, self.bits, self._block(array.shape[1], name))
            data = pack_int4(quantised.codes) if self.bits == 4 else quantised.codes
            yield Encoded(f"{name}.codes", _INTEGERS[self.bits], quantised.codes.shape, data)
            yield self._stored(f"{name}.scale", quantised.scales)
        else:
            yield self._stored(name, array.T)

    def _block(self, inputs: int, name: str) -> int:
        return block_for(inputs, name) if self.blocked or self.bits == 4 else 0

    def _stored(self, name: str, array: np.ndarray) -> Encoded:
        dtype = self.dtype
        if dtype == TensorProto.FLOAT and array.size >= FEWEST:
            half = as_float16(array)
            if half is not None:
                dtype, array = TensorProto.FLOAT16, half
        wanted = helper.tensor_dtype_to_np_dtype(dtype)
        with np.errstate(over="ignore"):
            converted = np.ascontiguousarray(array, wanted)
        if not np.isfinite(converted).all():
            raise CheckpointError(
                f"checkpoint: {name} has values that are not finite in {TensorProto.DataType.Name(dtype).lower()}; "
                "check the checkpoint, or export in fp32"
            )
        return Encoded(name, dtype, converted.shape, converted)


def format_of(settings: EngineSettings) -> tuple[Format, Format]:
    """Formats of the model and of its vocabulary matrix.

    Integer weights are computed with in float32 by ONNX Runtime, whose processor kernels know no other type, and in
    float16 by TensorRT.
    """
    if settings.precision in _COMPUTED:
        model = Format(_COMPUTED[settings.precision])
        return model, model
    bits = {"int8": 8, "int4": 4}[settings.precision]
    onnx = settings.backend == "onnx"
    dtype = TensorProto.FLOAT if onnx else TensorProto.FLOAT16
    return Format(dtype, bits, blocked=onnx), Format(dtype, 8, blocked=onnx)
