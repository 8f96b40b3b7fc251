"""Writing a safetensors file one tensor at a time.

Contract: the library wants all tensors of a file at once; here they come from an iterator and only one is in memory.
Types are known only as the tensors arrive, so the header is reserved at its longest, filled in at the end and padded
with spaces, which the format allows. The result is an ordinary safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from runtime.errors import CheckpointError

DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
LONGEST = 8 * 10**15  # a byte offset no file reaches; the header is reserved for its digits
ALIGNMENT = 8


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, Tensor]]
) -> dict[str, torch.dtype]:
    """Write `tensors`, which must be those named in `shapes`, in any order; returns the type of each.

    Raises CheckpointError for a tensor that was not announced, comes twice, has another shape or a type that the
    format or this project does not know, and when one did not come.
    """
    described: dict[str, dict[str, object]] = {}
    dtypes: dict[str, torch.dtype] = {}
    length = len(_header({name: _entry("BF16", shape, LONGEST, LONGEST) for name, shape in shapes.items()}))
    with path.open("wb") as stream:
        stream.seek(8 + length)
        offset = 0
        for name, tensor in tensors:
            if shapes.get(name) != tuple(tensor.shape) or name in described or tensor.dtype not in DTYPES:
                raise CheckpointError(f"{path.name}: {name} {list(tensor.shape)} {tensor.dtype} does not belong here")
            data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
            stream.write(data.data)
            described[name] = _entry(DTYPES[tensor.dtype], shapes[name], offset, offset + data.nbytes)
            dtypes[name] = tensor.dtype
            offset += data.nbytes
        missing = [name for name in shapes if name not in described]
        if missing:
            raise CheckpointError(f"{path.name}: {len(missing)} tensors did not come, the first is {missing[0]}")
        stream.seek(0)
        stream.write(length.to_bytes(8, "little") + _header(described).ljust(length))
    return dtypes


def _entry(dtype: str, shape: tuple[int, ...], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}


def _header(entries: Mapping[str, object]) -> bytes:
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    return text.ljust(-(-len(text) // ALIGNMENT) * ALIGNMENT)
