"""A UNet whose products with weights are computed in 8-bit integers or 8-bit floating point.

Contract: `quantise_unet` puts QuantizeLinear and DequantizeLinear around the convolutions and matrix products of a
traced model: symmetric, one scale a tensor for activations and one an output channel for weights. Stay as they were:
the first and the last convolution; those that read features no norm has brought into one range (`FLOAT`); products with
few weights; everything about time, whose products are Gemm nodes; and what has no weight, attention's own products and
norms among it. Weights are quantised when they are streamed.

Integers: of activations TensorRT takes signed codes alone. ONNX Runtime wants unsigned ones on most processors; around
128 they are the same numbers. It computes a convolution in integers only when its result is quantised too, and takes
its bias only as an integer of a scale that depends on both factors; so its results get a scale of their own, and the
bias is always added behind. TensorRT joins it with the convolution again.

Floating point (E4M3, largest value 448): steps are a share of the value, so nothing is gained by cutting what is rare;
the largest activation seen becomes the largest code. TensorRT multiplies the codes. ONNX Runtime rounds to them and
multiplies what they stand for, which shows what fp8 costs a model and saves no time; in float16 it does so, while in
float32 it takes the products for integer ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.calibration import Clip
from export.hollow import Traced, Weight
from export.quantisation import FP8_LARGEST, LIMITS, quantise, quantise_fp8

FEWEST = 1024  # elements of a weight: below, an integer product saves nothing
# The ends, and what reads the stream of features between blocks, which no norm has brought into one range.
FLOAT = re.compile(r"(^|\.)(conv_in|conv_out|conv_shortcut|downsamplers|upsamplers)\.")
# Versions of operators and of the format from which on float16 can be quantised, and which ONNX Runtime needs for fp8.
_HALF, _FP8 = (19, 9), (21, 10)


@dataclass(frozen=True)
class CodeForm:
    """How a product's factors are coded.

    Attributes:
        activations, weights: types of `onnx.TensorProto`.
        zero: the activations' code of zero; the weights' is 0.
        largest: magnitude of the largest code, counted from zero.
        results: whether results of convolutions are coded too.
    """

    activations: int
    weights: int
    zero: int
    largest: float
    results: bool

    @property
    def floating(self) -> bool:
        return self.weights != TensorProto.INT8


ONNX_RUNTIME_INT8 = CodeForm(TensorProto.UINT8, TensorProto.INT8, 128, LIMITS[8][1], results=True)
TENSORRT_INT8 = CodeForm(TensorProto.INT8, TensorProto.INT8, 0, LIMITS[8][1], results=False)
FP8 = CodeForm(TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FN, 0, FP8_LARGEST, results=False)


@dataclass(frozen=True)
class _Part(Weight):
    """Half of a quantised weight.

    Attributes:
        outputs: axis of the output channels in the graph's form.
        kind: type of the codes.
    """

    outputs: int = 0
    kind: int = TensorProto.INT8

    def quantised(self, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes in the graph's form, and scales [out] float32."""
        form = super().turned(array)
        rows = np.moveaxis(form, self.outputs, 0)  # [out, ...]
        flat = rows.reshape(len(rows), -1)
        if self.kind == TensorProto.INT8:
            result = quantise(flat, 8, 0)
            codes, scales = result.codes.T, result.scales
        else:
            codes, scales = quantise_fp8(flat)
        return np.moveaxis(codes.reshape(rows.shape), 0, self.outputs), scales.astype(np.float32)


class _Codes(_Part):
    def turned(self, array: np.ndarray) -> np.ndarray:
        return self.quantised(array)[0]


class _Scales(_Part):
    def turned(self, array: np.ndarray) -> np.ndarray:
        return self.quantised(array)[1]


def quantise_unet(traced: Traced, clips: Mapping[str, Clip], form: CodeForm) -> Traced:
    """`traced`, in float32 or narrowed to float16, with its products in 8 bits.

    Args:
        clips: by the name of the weight in the checkpoint, as `export.calibration.calibrate` finds them.
    """
    model = onnx.ModelProto()
    model.CopyFrom(traced.model)
    return _Quantising(model, traced, clips, form).run()


class _Quantising:
    def __init__(self, model: onnx.ModelProto, traced: Traced, clips: Mapping[str, Clip], form: CodeForm) -> None:
        self.model, self.clips, self.form = model, clips, form
        self.signature = traced.signature
        self.weights = dict(traced.weights)
        graph = model.graph
        self.kinds = {value.name: value.type.tensor_type.elem_type for value in graph.input}
        self.made: set[str] = set()  # names of values and constants that were added
        self.nodes: list[onnx.NodeProto] = []

    def run(self) -> Traced:
        graph = self.model.graph
        for node in graph.node:
            part = self._part(node)
            if part is None:
                self.nodes.append(node)
            else:
                self._product(node, *part)
        used = {name for node in self.nodes for name in node.input}
        inputs = [value for value in graph.input if value.name in used or value.name in self.signature.inputs]
        del graph.node[:], graph.input[:]
        graph.node.extend(self.nodes)
        graph.input.extend(inputs)
        if self.form.floating or TensorProto.FLOAT16 in self.kinds.values():
            opset, version = _FP8 if self.form.floating else _HALF
            next(entry for entry in self.model.opset_import if not entry.domain).version = opset
            self.model.ir_version = max(self.model.ir_version, version)
        return Traced(self.model, self.signature, {name: w for name, w in self.weights.items() if name in used})

    def _part(self, node: onnx.NodeProto) -> tuple[str, _Part] | None:
        """The weight of a product that is to be quantised: its graph input and its source."""
        if node.op_type not in ("Conv", "MatMul") or any(name not in self.weights for name in node.input[2:]):
            return None
        name = node.input[1]
        weight = self.weights.get(name)
        if weight is None or FLOAT.search(weight.tensor) or np.prod(weight.shape) < FEWEST:
            return None
        outputs = 0 if node.op_type == "Conv" else 1
        return name, _Part(weight.component, weight.tensor, weight.shape, weight.turns, outputs, self.form.weights)

    def _product(self, node: onnx.NodeProto, name: str, part: _Part) -> None:
        kind, clip, result = self.kinds[name], self.clips[part.tensor], node.output[0]
        largest = clip.largest if self.form.floating else clip.inputs
        node.input[0] = self._coded(node.input[0], largest, kind, f"{result}.input")
        node.input[1] = self._coded_weight(name, part, kind)
        bias = node.input.pop() if len(node.input) > 2 else None
        self.nodes.append(node)
        if self.form.results and clip.results is not None:
            node.output[0] = f"{result}.exact"
            self._coded(node.output[0], clip.results, kind, result)
        if bias is not None:
            last = self.nodes[-1]
            last.output[0] = f"{result}.unbiased"
            inputs = [last.output[0], self._column(bias)]
            self.nodes.append(helper.make_node("Add", inputs, [result], name=f"{node.name}.bias"))

    def _coded(self, value: str, clip: float, kind: int, result: str) -> str:
        """Name `result` for `value` after 8-bit codes, which are made once for all that clip it at one magnitude."""
        scale = self._constant(f"scale.{clip:.4g}.{kind}", np.array(clip / self.form.largest), kind)
        zero = self._constant("zero", np.array(self.form.zero), self.form.activations)
        code = f"{value}.code.{clip:.4g}"
        if code not in self.made:
            self.made.add(code)
            self.nodes.append(helper.make_node("QuantizeLinear", [value, scale, zero], [code], name=code))
        # Each product has a node of its own here: ONNX Runtime joins none that several products read.
        self.nodes.append(helper.make_node("DequantizeLinear", [code, scale, zero], [result], name=result))
        return result

    def _coded_weight(self, name: str, part: _Part, kind: int) -> str:
        """The weight as the graph sees it, from its codes and scales."""
        coded = f"{name}.coded"
        if coded not in self.made:
            self.made.add(coded)
            form = part.turned(np.broadcast_to(np.float32(0), part.shape)).shape
            count = form[part.outputs]
            own = (part.component, part.tensor, part.shape, part.turns, part.outputs, part.kind)
            codes = self._declare(f"{name}.codes", _Codes(*own), part.kind, form)
            scales = self._declare(f"{name}.scales", _Scales(*own), kind, (count,))
            zeros = self._constant(f"{name}.zeros", np.zeros(count), part.kind)
            inputs = [codes, scales, zeros]
            self.nodes.append(
                helper.make_node("DequantizeLinear", inputs, [coded], name=f"{coded}.node", axis=part.outputs)
            )
        return coded

    def _column(self, bias: str) -> str:
        """A bias [C] as [C, 1, 1]."""
        source = self.weights[bias]
        turned = replace(source, turns=(*source.turns, ("unsqueeze", (1, 2))))
        return self._declare(f"{bias}.column", turned, self.kinds[bias], (source.shape[0], 1, 1))

    def _declare(self, name: str, weight: Weight, kind: int, shape: Sequence[int]) -> str:
        """A graph input for a weight."""
        if name not in self.weights:
            self.weights[name] = weight
            self.model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def _constant(self, name: str, array: np.ndarray, kind: int) -> str:
        if name not in self.made:
            self.made.add(name)
            typed = array.astype(helper.tensor_dtype_to_np_dtype(kind))
            self.model.graph.initializer.append(numpy_helper.from_array(typed, name))
        return name
