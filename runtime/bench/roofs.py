"""What the machine can do at best: bytes a second and floating-point operations a second.

Contract: both are measured here and now with the threads and on the device that the engines get, each the best of a few
trials, because a roof is what was reached at least once. On a CPU memory is read and copied by numpy in as many threads
as the engines have; matrices are multiplied by ONNX Runtime, the library that runs the engines. On a CUDA device ONNX
Runtime does both, copies only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.backends.onnxruntime import choose_provider, open_session
from runtime.bench.nodes import single_node
from runtime.engines import EngineOptions, processors

TRIALS = 5
CPU_BYTES = 512 << 20  # more than any cache holds
CPU_SIDE = 2048  # of the matrices that are multiplied
CUDA_BYTES = 1 << 30
CUDA_SIDE = 8192


@dataclass(frozen=True, kw_only=True)
class Roofs:
    """Limits of one device.

    Attributes:
        device: `cpu` or `cuda`.
        threads: of the CPU that were used.
        read, copy: bytes a second; of a copy those read and those written. `read` is None where it is not measured.
        matmul: floating-point operations a second in the product of two square matrices of `dtype`.
    """

    device: str
    threads: int
    read: float | None
    copy: float
    matmul: float
    dtype: str

    @property
    def bandwidth(self) -> float:
        """The higher of the two, bytes a second."""
        return max(self.copy, self.read or 0.0)


def measure_roofs(options: EngineOptions) -> Roofs:
    """Measure the device of `options`. Raises EnvironmentProblem where ONNX Runtime or the device is missing."""
    threads = options.threads or processors()
    if choose_provider(options.provider) == "cuda":
        dtype = np.dtype(np.float16)
        copy = _best(2 * CUDA_BYTES, _Bound(options, "Neg", dtype, ((CUDA_BYTES >> 13, 4096),)))
        matmul = _matmul(options, CUDA_SIDE, dtype)
        return Roofs(device="cuda", threads=threads, read=None, copy=copy, matmul=matmul, dtype=dtype.name)
    source = [np.ones(CPU_BYTES // threads // 4, np.float32) for _ in range(threads)]
    target = [np.ones_like(part) for part in source]
    with ThreadPoolExecutor(threads) as pool:
        read = _best(CPU_BYTES, lambda: list(pool.map(np.max, source)))
        copy = _best(2 * CPU_BYTES, lambda: list(pool.map(np.copyto, target, source)))
    matmul = _matmul(options, CPU_SIDE, np.dtype(np.float32))
    return Roofs(device="cpu", threads=threads, read=read, copy=copy, matmul=matmul, dtype="float32")


def higher(one: Roofs, other: Roofs) -> Roofs:
    """The best of two measurements of one device."""
    read = None if one.read is None or other.read is None else max(one.read, other.read)
    return Roofs(
        device=one.device,
        threads=one.threads,
        read=read,
        copy=max(one.copy, other.copy),
        matmul=max(one.matmul, other.matmul),
        dtype=one.dtype,
    )


def _best(amount: float, run: Callable[[], object]) -> float:
    """`amount` a second in the fastest run."""
    run()
    fastest = float("inf")
    for _ in range(TRIALS):
        started = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - started)
    return amount / fastest


def _matmul(options: EngineOptions, side: int, dtype: np.dtype) -> float:
    return _best(2.0 * side**3, _Bound(options, "MatMul", dtype, ((side, side), (side, side))))


class _Bound:
    """Runs of one operator on matrices that lie on the device already, its result too."""

    def __init__(self, options: EngineOptions, op: str, dtype: np.dtype, shapes: Sequence[tuple[int, int]]) -> None:
        import onnxruntime

        device = choose_provider(options.provider)
        names = tuple(f"x{n}" for n in range(len(shapes)))
        self._session: Any = open_session(single_node(op, names, dtype), options)
        self._binding: Any = self._session.io_binding()
        # On a CPU values are views of these arrays, which have to live as long.
        self._arrays = [np.full(shape, 0.01, dtype) for shape in (*shapes, (shapes[0][0], shapes[-1][1]))]
        self._values = [onnxruntime.OrtValue.ortvalue_from_numpy(array, device) for array in self._arrays]
        for name, value in zip(names, self._values, strict=False):
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output("y", self._values[-1])

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
