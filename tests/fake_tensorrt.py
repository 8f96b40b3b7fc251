"""A TensorRT library and a GPU made of numpy, as far as the runtime asks anything of them.

A plan file holds the name of a `Program`, which says its tensors, profiles and what a run computes. Memory on the fake
device is host memory behind made-up addresses; using an address that was freed is a KeyError.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np


class DataType(Enum):
    """Name and size in bytes."""

    FLOAT, HALF, BF16, INT32, INT64, BOOL = "float", "half", "bf16", "int32", "int64", "bool"

    @property
    def itemsize(self) -> int:
        return {"float": 4, "half": 2, "bf16": 2, "int32": 4, "int64": 8, "bool": 1}[self.value]


TensorIOMode = Enum("TensorIOMode", "NONE INPUT OUTPUT")
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64}
Shape = tuple[int, ...]


class FakeDevice:
    """A `runtime.backends.cuda.Device`; `events` is what it was asked to do, in order.

    Engines of one that `compiles` may keep their kernels, as those of TensorRT-RTX from 1.0 on.
    """

    compiles = True

    def __init__(self, compute_capability: str = "8.9") -> None:
        self.compute_capability, self.stream = compute_capability, 7
        self.memory: dict[int, bytearray] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.events: list[str] = []
        self.recording: list[Callable[[], None]] | None = None
        self._next = 4096

    def allocate(self, size: int) -> int:
        self._next += 1 << 24
        self.memory[self._next] = bytearray(b"\xff" * max(size, 1))  # not zero, as real memory
        self.events.append("allocate")
        return self._next

    def free(self, address: int) -> None:
        del self.memory[address]

    def upload(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self.memory[address][: array.nbytes] = array.tobytes()
        self.events.append("upload")

    def download(self, array: np.ndarray, address: int) -> None:
        array[...] = np.frombuffer(self.memory[address], array.dtype, array.size).reshape(array.shape)

    def clear(self, address: int, size: int) -> None:
        self.memory[address][:size] = bytes(size)

    def synchronize(self) -> None:
        self.events.append("synchronize")

    def begin_capture(self) -> None:
        self.recording = []

    def end_capture(self) -> int:
        assert self.recording is not None
        actions, self.recording = self.recording, None
        handle = len(self.events) + 1
        self.graphs[handle] = actions
        self.events.append("capture")
        return handle

    def launch(self, graph: int) -> None:
        self.events.append("launch")
        for action in self.graphs[graph]:
            action()

    def free_graph(self, graph: int) -> None:
        del self.graphs[graph]

    def view(self, address: int, shape: Shape, dtype: Any) -> np.ndarray:
        """The device memory at an address as an array that writes through."""
        size = int(np.prod(shape))
        return np.frombuffer(self.memory[address], dtype, size).reshape(shape)


@dataclass
class Program:
    """Tensors in order: name -> (type, shape with -1 where free); `outputs` gives their shapes from the inputs'."""

    inputs: dict[str, tuple[str, Shape]]
    outputs: dict[str, str]
    output_shapes: Callable[[dict[str, Shape]], dict[str, Shape]]
    compute: Callable[[dict[str, np.ndarray]], None]
    profiles: Sequence[dict[str, tuple[Shape, Shape, Shape]]]
    aliases: dict[str, str] = field(default_factory=dict)
    capturable: bool = True
    activations: int = 64


class FakeContext:
    def __init__(self, program: Program, device: FakeDevice) -> None:
        self._program, self._device = program, device
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self.changes = 0  # what a graph recorded before a change does is undefined

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.changes += 1
        self._device.events.append(f"profile {index}")
        return stream == self._device.stream

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        self.changes += 1
        self._shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> Shape:
        return self._program.output_shapes(self._shapes)[name]

    def update_device_memory_size_for_shapes(self) -> int:
        return self._program.activations

    def set_device_memory(self, address: int, size: int) -> None:
        self._scratch = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.changes += 1
        self._addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self._program.capturable

    def execute_async_v3(self, stream: int) -> bool:
        address, size = self._scratch
        assert size >= self._program.activations and address in self._device.memory
        shapes = self._shapes | self._program.output_shapes(self._shapes)
        types = {name: kind for name, (kind, _) in self._program.inputs.items()} | self._program.outputs
        addresses, changes = dict(self._addresses), self.changes

        def act() -> None:
            assert changes == self.changes, "the context of a recorded run was changed"
            self._program.compute(
                {n: self._device.view(addresses[n], shapes[n], NUMPY[kind]) for n, kind in types.items()}
            )

        if self._device.recording is None:
            self._device.events.append("run")
            act()
        else:
            self._device.recording.append(act)
        return True


class FakeEngine:
    def __init__(self, program: Program, device: FakeDevice) -> None:
        self.program, self._device = program, device
        self._names = [*program.inputs, *program.outputs]
        self.num_io_tensors, self.num_optimization_profiles = len(self._names), len(program.profiles)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.program.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.program.inputs[name][0] if name in self.program.inputs else self.program.outputs[name]]

    def get_tensor_shape(self, name: str) -> Shape:
        return self.program.inputs[name][1]

    def get_tensor_profile_shape(self, name: str, index: int) -> tuple[Shape, Shape, Shape]:
        declared = self.program.inputs[name][1]
        return self.program.profiles[index].get(name, (declared, declared, declared))

    def get_aliased_input_tensor(self, output: str) -> str:
        return self.program.aliases.get(output, "")

    def create_execution_context(self, how: Any) -> FakeContext:
        strategy, cache = (how.strategy, how.cache) if isinstance(how, FakeRuntimeConfig) else (how, None)
        assert strategy == "user managed"
        kernel = f"kernel {id(self.program)}".encode()
        if cache is None or cache.content != kernel:
            self._device.events.append("compile")
        if cache is not None:
            cache.content = kernel
        return FakeContext(self.program, self._device)


class FakeRtxEngine(FakeEngine):
    """An engine whose kernels are compiled when a context is made, and may be cached."""

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig()


class FakeRuntimeConfig:
    def __init__(self) -> None:
        self.strategy: Any = "static"
        self.cache: FakeRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.cache = cache
        return True


class FakeRuntimeCache:
    """`driver` stands for everything the library compares before it takes what was kept."""

    driver = b"580 "

    def __init__(self) -> None:
        self.content = b""

    def serialize(self) -> bytes:
        return self.driver + self.content

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(self.driver):
            return False
        self.content = blob.removeprefix(self.driver)
        return True


def fake_library(device: FakeDevice, programs: dict[str, Program], loaded: list[str]) -> types.SimpleNamespace:
    """A module like `tensorrt_rtx`, version 1.7.1. `loaded` collects what was deserialised and refitted."""

    class Runtime:
        def __init__(self, log: Any) -> None:
            self._log = log

        def deserialize_cuda_engine(self, content: Any) -> FakeEngine | None:
            name = bytes(content).decode()
            if name not in programs:
                self._log.log("error", "the magic number\n is wrong")
                return None
            loaded.append(name)
            return (FakeRtxEngine if device.compiles else FakeEngine)(programs[name], device)

    class Refitter:
        def __init__(self, engine: FakeEngine, log: Any) -> None:
            pass

        def refit_cuda_engine(self) -> bool:
            return True

    class OnnxParserRefitter:
        def __init__(self, refitter: Refitter, log: Any) -> None:
            pass

        def refit_from_file(self, path: str) -> bool:
            loaded.append(f"refit {path.rpartition('/')[2]}")
            return True

    class ILogger:
        Severity = types.SimpleNamespace(ERROR="error", INTERNAL_ERROR="internal")

    return types.SimpleNamespace(
        __version__="1.7.1",
        ILogger=ILogger,
        Runtime=Runtime,
        Refitter=Refitter,
        OnnxParserRefitter=OnnxParserRefitter,
        TensorIOMode=TensorIOMode,
        ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="user managed"),
    )
