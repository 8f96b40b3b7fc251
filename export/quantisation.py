"""Weight-only quantisation of matrices, symmetric, in the QDQ layout that ONNX Runtime and TensorRT both read.

Contract: a matrix W [out, in] becomes integer codes [in, out] and positive scales, with W^T ~ codes * scale. Scales are
exact in float16, so engines that compute in float16 and in float32 see the same weights. Zero is code 0. Int4 scales
stand for `block` consecutive inputs of one output, [in / block, out]; so do int8 scales, unless they stand for a whole
output, [out]. The scale of an int4 block is the one of a few candidates with the least squared error. Codes in 8-bit
floating point (E4M3) always have a scale for a whole output. Only a slab of the matrix is in float32 at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ml_dtypes import float8_e4m3fn

from runtime.errors import UsageError

LIMITS = {4: (-8, 7), 8: (-127, 127)}  # smallest and largest code
# Magnitude that a block's largest weight is coded as. 7 clips nothing; more makes finer steps at the price of clipping.
CANDIDATES = {4: (7.0, 7.5, 8.0, 8.75), 8: (127.0,)}
FP8_LARGEST = 448.0  # of E4M3, which has no infinity
BLOCKS = (64, 32, 16)  # sizes tried, in this order, where the caller names none
SLAB = 1 << 19  # elements in float32 at a time: they stay in the processor's cache


@dataclass(frozen=True)
class Quantised:
    """`codes` [in, out] int8, `scales` float16 [in / block, out], or [out] when `block` is 0."""

    codes: np.ndarray
    scales: np.ndarray
    block: int

    def dequantised(self) -> np.ndarray:
        """The matrix [in, out] float32 that an engine computes with."""
        scales = self.scales.astype(np.float32)
        if self.block:
            scales = np.repeat(scales, self.block, axis=0)
        return self.codes * scales


def block_for(inputs: int, name: str) -> int:
    """Block size for a matrix with `inputs` columns [out, in]. Raises UsageError when none divides them."""
    for block in BLOCKS:
        if inputs % block == 0:
            return block
    raise UsageError(
        f"{name}: {inputs} inputs are not a multiple of {BLOCKS[-1]}, so they cannot be quantised in blocks; "
        "choose fp32 or fp16"
    )


def quantise(matrix: np.ndarray, bits: int, block: int) -> Quantised:
    """Quantise `matrix` [out, in] of any float type.

    Args:
        bits: 4 or 8.
        block: inputs a scale stands for, a divisor of `in`; 0 for all inputs of an output.

    A matrix with values that are not finite, or too large for float16 scales, gets scales that are not finite.
    """
    outputs, inputs = matrix.shape
    groups = inputs // block if block else 1
    codes = np.empty((inputs, outputs), np.int8)
    scales = np.empty((groups, outputs), np.float16)
    rows = max(1, SLAB // inputs)
    for start in range(0, outputs, rows):
        slab = matrix[start : start + rows].astype(np.float32).reshape(-1, groups, inputs // groups)  # [n, groups, b]
        with np.errstate(all="ignore"):
            coded, scale = _quantise_slab(slab, bits)
        codes[:, start : start + rows] = coded.reshape(-1, inputs).T
        scales[:, start : start + rows] = scale.T
    return Quantised(codes, scales if block else scales[0], block)


def quantise_fp8(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`matrix` [out, in] of any float type -> codes [out, in] float8_e4m3fn, and scales [out] float16.

    The largest weight of an output has the largest code. A matrix with values that are not finite, or too large for
    float16 scales, gets scales that are not finite.
    """
    codes = np.empty(matrix.shape, float8_e4m3fn)
    scales = np.empty(len(matrix), np.float16)
    rows = max(1, SLAB // matrix.shape[1])
    for start in range(0, len(matrix), rows):
        slab = matrix[start : start + rows].astype(np.float32)
        with np.errstate(all="ignore"):
            scale = _round_up(np.abs(slab).max(axis=1) / np.float32(FP8_LARGEST))
            codes[start : start + rows] = slab / scale.astype(np.float32)[:, None]
        scales[start : start + rows] = scale
    return codes, scales


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Codes of any shape in row-major pairs, the first in the low half of its byte; an odd last one is padded."""
    flat = codes.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.int8(0))
    flat = flat.view(np.uint8)
    packed: np.ndarray = flat[1::2] << 4
    packed |= flat[0::2] & 15
    return packed


def _quantise_slab(slab: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """[n, groups, b] float32 -> int8 codes of that shape and float16 scales [n, groups]."""
    largest = np.abs(slab).max(axis=-1)  # [n, groups]
    first, *others = CANDIDATES[bits]
    scale = _round_up(largest / np.float32(first))
    coded = _codes(slab, scale, bits)
    if not others:
        return coded.astype(np.int8), scale
    least = _squared_error(slab, coded, scale)
    for candidate in others:
        trial = _round_up(largest / np.float32(candidate))
        trial_coded = _codes(slab, trial, bits)
        squared = _squared_error(slab, trial_coded, trial)
        better = squared < least
        coded[better] = trial_coded[better]
        scale[better], least[better] = trial[better], squared[better]
    return coded.astype(np.int8), scale


def _codes(slab: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """Codes, still in float32."""
    coded = slab / scale.astype(np.float32)[..., None]
    np.rint(coded, out=coded)
    return np.clip(coded, *LIMITS[bits], out=coded)


def _squared_error(slab: np.ndarray, coded: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Sum over each block, [n, groups]."""
    error = coded * scale.astype(np.float32)[..., None]
    error -= slab
    return np.einsum("ngb,ngb->ng", error, error)


def _round_up(scale: np.ndarray) -> np.ndarray:
    """The next float16 that is not smaller, and not zero: a smaller one would push the largest weight off the range."""
    half = scale.astype(np.float16)
    half = np.where(half < scale, np.nextafter(half, np.float16(np.inf)), half)
    return np.maximum(half, np.finfo(np.float16).smallest_subnormal)
