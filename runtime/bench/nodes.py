"""ONNX models of a single operator, for measuring what a device can do; made without the onnx package.

Contract: a few messages of ONNX's protocol buffers, written by hand. Every dimension is free.
"""

from __future__ import annotations

import numpy as np

_IR_VERSION, _OPSET = 8, 13
_TYPES = {np.dtype(np.float32): 1, np.dtype(np.float16): 10}


def single_node(op: str, inputs: tuple[str, ...], dtype: np.dtype) -> bytes:
    """The model y = op(*inputs), all matrices of `dtype` (float32 or float16), for an InferenceSession."""
    names = [*inputs, "y"]
    values = {name: _value(name, _TYPES[np.dtype(dtype)]) for name in names}
    node = b"".join(_bytes(1, name.encode()) for name in inputs) + _bytes(2, b"y") + _bytes(4, op.encode())
    graph = _bytes(1, node) + _bytes(2, b"g") + b"".join(_bytes(11, values[name]) for name in inputs)
    graph += _bytes(12, values["y"])
    return _number(1, _IR_VERSION) + _bytes(7, graph) + _bytes(8, _number(2, _OPSET))


def _value(name: str, kind: int) -> bytes:
    """A matrix's declaration."""
    shape = b"".join(_bytes(1, _bytes(2, f"{name}{axis}".encode())) for axis in range(2))
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, _number(1, kind) + _bytes(2, shape)))


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
