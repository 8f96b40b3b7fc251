"""The few CUDA calls engines need, behind an interface of our own.

Contract: addresses and handles are plain integers. `open_device` is the only place where CUDA is imported; without the
package, a driver or a GPU it raises EnvironmentProblem. Every call that CUDA refuses raises EnvironmentProblem with
CUDA's own words. Copies are ordered by the stream; a host array must live until the stream is synchronised.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from runtime.errors import EnvironmentProblem

_INSTALL = "pip install cuda-bindings"


class Device(Protocol):
    """One GPU and one stream on it. `compute_capability` is written like "8.9"; `stream` is the stream's address."""

    compute_capability: str
    stream: int

    def __hash__(self) -> int: ...

    def allocate(self, size: int) -> int:
        """Address of `size` new bytes on the device."""
        ...

    def free(self, address: int) -> None: ...

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device."""
        ...

    def download(self, array: np.ndarray, address: int) -> None:
        """Fill a contiguous array from the device."""
        ...

    def clear(self, address: int, size: int) -> None:
        """Set bytes to zero."""
        ...

    def synchronize(self) -> None:
        """Wait for everything the stream was given."""
        ...

    def begin_capture(self) -> None:
        """Record what the stream is given from now on instead of running it."""
        ...

    def end_capture(self) -> int:
        """Stop recording; handle of a graph that can be launched, or 0 when what was recorded cannot be one."""
        ...

    def launch(self, graph: int) -> None: ...

    def free_graph(self, graph: int) -> None: ...


@lru_cache(maxsize=1)
def open_device() -> Device:
    """The process's current GPU. Raises EnvironmentProblem."""
    try:
        api = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise EnvironmentProblem(
            f"cuda-bindings cannot be imported ({error}); run `{_INSTALL}` in the release that fits the driver"
        ) from error
    return CudaDevice(api)


class CudaDevice:
    """A Device on `cuda.bindings.runtime`, given as `api`."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self._graphs: dict[int, Any] = {}  # handle -> CUDA's object
        count = self._call("cudaGetDeviceCount")
        if not count:
            raise EnvironmentProblem("CUDA: there is no GPU; run ONNX engines on the CPU instead")
        device = self._call("cudaGetDevice")
        names = (f"cudaDevAttrComputeCapability{part}" for part in ("Major", "Minor"))
        attributes = (getattr(api.cudaDeviceAttr, name) for name in names)
        major, minor = (self._call("cudaDeviceGetAttribute", attribute, device) for attribute in attributes)
        self.compute_capability = f"{major}.{minor}"
        self._stream = self._call("cudaStreamCreateWithFlags", api.cudaStreamNonBlocking)
        self.stream = int(self._stream)

    def allocate(self, size: int) -> int:
        return int(self._call("cudaMalloc", max(size, 1)))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def upload(self, address: int, array: np.ndarray) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def download(self, array: np.ndarray, address: int) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)

    def clear(self, address: int, size: int) -> None:
        self._call("cudaMemsetAsync", address, 0, size, self._stream)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def begin_capture(self) -> None:
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)

    def end_capture(self) -> int:
        # A capture that something inside forbade ends in an error and leaves the stream usable.
        status, graph = self._api.cudaStreamEndCapture(self._stream)
        if status != self._api.cudaError_t.cudaSuccess or not int(graph):
            self._api.cudaGetLastError()
            return 0
        try:
            ready = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)
        self._graphs[int(ready)] = ready
        return int(ready)

    def launch(self, graph: int) -> None:
        self._call("cudaGraphLaunch", self._graphs[graph], self._stream)

    def free_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", self._graphs.pop(graph))

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._api, name)(*arguments)
        if status != self._api.cudaError_t.cudaSuccess:
            raise EnvironmentProblem(f"CUDA: {name} failed: {self._words(status)}; see `videolavit doctor`")
        return values[0] if values else None

    def _words(self, status: Any) -> str:
        _, text = self._api.cudaGetErrorString(status)
        return text.decode() if isinstance(text, bytes) else str(text)
