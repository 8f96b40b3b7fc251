"""A checkpoint's tensors as arrays, one at a time, without what was read staying in memory.

Contract: `arrays` yields (name, array) in the type in which a tensor is stored, bfloat16 included. A tensor of a
checkpoint is usually a view of a mapped file, whose pages count as this process's memory once they have been read and
stay as long as the file is open. They are handed back as soon as the tensor is no longer used; on systems where that
is not possible, they stay.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

# MADV_PAGEOUT of Linux: unlike MADV_DONTNEED it never loses content, wherever a tensor may lie.
_PAGE_OUT = 21
_advise = ctypes.CDLL(None).madvise if sys.platform == "linux" else None


def arrays(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors' values; memory is shared with the tensors."""
    for name, tensor in tensors:
        yield name, _array(tensor)


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        array = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    else:
        array = tensor.numpy()
    if _advise is not None:
        weakref.finalize(array, _page_out, array.ctypes.data, array.nbytes).atexit = False
    return array


def _page_out(address: int, size: int) -> None:
    """Let go of the whole pages in a range of memory; none of it is lost, a mapped file is read again when needed."""
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if _advise is not None and end > start:
        _advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGE_OUT)
