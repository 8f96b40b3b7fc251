"""The CUDA calls on an interface shaped like `cuda.bindings.runtime`: a status first, then what was asked for."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

from runtime.backends.cuda import CudaDevice
from runtime.errors import EnvironmentProblem

OK, INSUFFICIENT, FORBIDDEN = 0, 35, 900


class Api:
    """Copies host memory for real; everything else is written down in `calls`."""

    cudaError_t = types.SimpleNamespace(cudaSuccess=OK)
    cudaDeviceAttr = types.SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
    )
    cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down")
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")
    cudaStreamNonBlocking = 1

    def __init__(self, **results: tuple[Any, ...]) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._results: dict[str, tuple[Any, ...]] = {
            "cudaGetDeviceCount": (OK, 1),
            "cudaGetDevice": (OK, 0),
            "cudaStreamCreateWithFlags": (OK, 77),
            "cudaMalloc": (OK, 4096),
            "cudaStreamEndCapture": (OK, 55),
            "cudaGraphInstantiate": (OK, 66),
            **results,
        }

    def cudaDeviceGetAttribute(self, attribute: str, device: int) -> tuple[int, int]:
        return OK, {"major": 8, "minor": 9}[attribute]

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return OK, {INSUFFICIENT: b"driver is insufficient", 2: b"out of memory"}[status]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            return self._results.get(name, (OK,))

        return call


def test_a_device_says_what_it_is() -> None:
    device = CudaDevice(Api())
    assert (device.compute_capability, device.stream) == ("8.9", 77)


def test_copies_go_over_the_stream_with_their_size_and_direction() -> None:
    api = Api()
    device = CudaDevice(api)
    array = np.zeros(6, np.float16)
    device.upload(4096, array)
    device.download(array, 4096)
    device.clear(4096, 12)
    host = array.ctypes.data
    assert api.calls[-3:] == [
        ("cudaMemcpyAsync", 4096, host, 12, "up", 77),
        ("cudaMemcpyAsync", host, 4096, 12, "down", 77),
        ("cudaMemsetAsync", 4096, 0, 12, 77),
    ]


def test_a_recording_becomes_a_graph_that_is_launched_and_freed() -> None:
    api = Api()
    device = CudaDevice(api)
    device.begin_capture()
    graph = device.end_capture()
    device.launch(graph)
    device.free_graph(graph)
    names = [call[0] for call in api.calls]
    assert names[-4:] == ["cudaGraphInstantiate", "cudaGraphDestroy", "cudaGraphLaunch", "cudaGraphExecDestroy"]
    assert ("cudaGraphDestroy", 55) in api.calls and ("cudaGraphLaunch", 66, 77) in api.calls


def test_a_recording_that_was_forbidden_is_no_graph_and_leaves_no_error_behind() -> None:
    api = Api(cudaStreamEndCapture=(FORBIDDEN, None))
    assert CudaDevice(api).end_capture() == 0
    assert api.calls[-1] == ("cudaGetLastError",)


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ({"cudaGetDeviceCount": (INSUFFICIENT, None)}, "cudaGetDeviceCount failed: driver is insufficient"),
        ({"cudaGetDeviceCount": (OK, 0)}, "there is no GPU"),
    ],
)
def test_no_gpu_is_one_line(results: dict[str, Any], words: str) -> None:
    with pytest.raises(EnvironmentProblem, match=f"CUDA: {words}"):
        CudaDevice(Api(**results))


def test_memory_that_runs_out_is_one_line() -> None:
    with pytest.raises(EnvironmentProblem, match="CUDA: cudaMalloc failed: out of memory"):
        CudaDevice(Api(cudaMalloc=(2, None))).allocate(1 << 40)
