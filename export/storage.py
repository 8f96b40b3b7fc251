"""Constants of a model as they are stored: inside it, or in a data file beside it.

Contract: `DataFile` appends large constants to an open file, each at a multiple of `PAGE` so that a runtime can map it,
and gives back tensors that refer to them; small ones stay in the model. `as_float16` halves what it can without loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from onnx import TensorProto

PAGE = 4096
INLINE = 4096  # bytes; smaller constants stay in the model file
FEWEST = 256  # elements; below, the Cast behind a constant that is stored narrower costs more than it saves


def inside(name: str, dtype: int, shape: Sequence[int], data: np.ndarray) -> TensorProto:
    """A constant in the model: TensorProto type `dtype`, and its little-endian bytes as they are stored."""
    return TensorProto(name=name, data_type=dtype, dims=shape, raw_data=data.tobytes())


class DataFile:
    """Puts constants into a file that is open for writing and that models know as `location`."""

    def __init__(self, stream: BinaryIO, location: str) -> None:
        self._stream = stream
        self._location = location

    def __call__(self, name: str, dtype: int, shape: Sequence[int], data: np.ndarray) -> TensorProto:
        """As `inside`. Raises OSError when the disk is full."""
        if data.nbytes < INLINE:
            return inside(name, dtype, shape, data)
        self._stream.write(bytes(-self._stream.tell() % PAGE))
        offset = self._stream.tell()
        self._stream.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self._location), ("offset", offset), ("length", data.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def as_float16(array: np.ndarray) -> np.ndarray | None:
    """`array` in float16, or None when that would lose something."""
    if array.dtype == np.float16:
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half.astype(array.dtype), array) else None
