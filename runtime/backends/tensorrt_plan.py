"""A TensorRT plan on a GPU: checked, deserialised, and run on buffers that the caller owns.

Contract: a plan is checked against the manifest's record of what it was built for, library version and GPU, before a
byte of it is deserialised; what does not fit is a BundleError with one line. All plans of a process run on one stream,
one after the other, and share one piece of activation memory of the size the hungriest needs. A run that repeats the
one before it, shapes and addresses alike, is recorded as a CUDA graph and from then on launched as one. Kernels that
TensorRT-RTX compiles are kept on disk when the plan is closed or given up (`kernel_cache`). What is given up without
being closed, plan, context or buffer, gives back its memory on the device with its last reference.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends import tensorrt_library
from runtime.backends.checks import Shape, describe
from runtime.backends.cuda import Device
from runtime.backends.kernel_cache import kernel_cache
from runtime.bundle import EngineEntry
from runtime.errors import BundleError, EnvironmentProblem, UsageError

PLAN = ".plan"  # suffix of the files that are plans; others are the weights of plans built without them
OLDEST_PORTABLE = (8, 0)  # TensorRT-RTX plans for no GPU in particular run from Ampere on
_SCRATCH = ""  # among the names of tensors: the activation memory
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}


def check_built_for(name: str, entry: EngineEntry, installed: str, compute_capability: str) -> None:
    """Whether a plan runs with library `installed` on a GPU of `compute_capability`. Raises BundleError."""
    built_for = entry.built_for
    if built_for is None:
        raise BundleError(f"engine {name}: its manifest does not say what it was built for; export the bundle again")
    if built_for.library != installed:
        raise BundleError(
            f"engine {name}: built with {built_for.library}, this machine has {installed}; "
            "install that version or export the bundle again here"
        )
    wanted = built_for.compute_capabilities
    fits = compute_capability in wanted if wanted else _number(compute_capability) >= OLDEST_PORTABLE
    if not fits:
        what = ", ".join(wanted) if wanted else f"{OLDEST_PORTABLE[0]}.{OLDEST_PORTABLE[1]} and later"
        raise BundleError(
            f"engine {name}: built for compute capability {what}, this GPU has {compute_capability}; "
            f"export the bundle again for {compute_capability}"
        )


def _number(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


class Buffer:
    """Memory on the device that grows when asked for more and keeps its address otherwise."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.address, self.size = 0, 0
        self._release: Callable[[], object] = _nothing

    def at_least(self, size: int) -> int:
        """Address of at least `size` bytes; growing loses the content."""
        if size > self.size or not self.address:
            self.free()
            self.address, self.size = self._device.allocate(size), size
            self._release = _with(self, self._device.free, self.address)
        return self.address

    def free(self) -> None:
        self._release()
        self._release = _nothing
        self.address, self.size = 0, 0


class Scratch(Buffer):
    """The activation memory that the plans of a device share; freed when the last of them is closed."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._users = 0

    def join(self) -> None:
        self._users += 1

    def leave(self) -> None:
        self._users -= 1
        if not self._users:
            self.free()


def _nothing() -> None:
    """There is nothing to give back."""


def _with(owner: object, release: Callable[[int], None], handle: int) -> Callable[[], object]:
    """`release(handle)` once: when it is called, or else with the last reference to `owner`."""
    finalizer = weakref.finalize(owner, release, handle)
    finalizer.atexit = False  # the process gives back everything at its end
    return finalizer


@cache
def scratch_of(device: Device) -> Scratch:
    return Scratch(device)


class Plan:
    """One deserialised plan.

    Attributes: `inputs` and `outputs`, names in the plan's order.
    """

    def __init__(self, backend: str, name: str, files: Sequence[Path], device: Device, digest: str = "") -> None:
        """`files` is the plan and, for a plan without weights, the ONNX file to take them from.

        `digest` is the plan's SHA-256, by which its kernels are kept; without one, none are.
        """
        self._backend, self._name, self._device = backend, name, device
        trt = tensorrt_library.library(backend)
        self._engine = _deserialise(backend, name, files[0])
        if len(files) > 1:
            _refit(backend, name, self._engine, files[1])
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self.inputs = tuple(n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT)
        self.outputs = tuple(n for n in names if n not in self.inputs)
        self._ranges = [self._profile(i) for i in range(self._engine.num_optimization_profiles)]
        self._strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        version = tensorrt_library.version(backend)
        capability = device.compute_capability
        self._kernels = kernel_cache(self._engine, digest, version, capability) if digest else None
        if self._kernels is not None:
            self._kernels.config.set_execution_context_allocation_strategy(self._strategy)
            # Also for plans that are let go of without being closed.
            self._save_kernels = weakref.finalize(self, self._kernels.save)
        # They know their plan: known from here, the two would keep each other, and the device's memory with them.
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self._scratch = scratch_of(device)
        self._scratch.join()
        self._leave = weakref.finalize(self, self._scratch.leave)
        self._leave.atexit = False

    def context(self) -> Context:
        """Something to run the plan with; closed with the plan. Raises EnvironmentProblem."""
        how = self._strategy if self._kernels is None else self._kernels.config
        context = self._engine.create_execution_context(how)
        if context is None:
            raise EnvironmentProblem(f"engine {self._name}: no execution context: {self.last_error()}")
        made = Context(self, context, self._device, self._scratch)
        self._contexts.add(made)
        return made

    def dtype(self, name: str) -> np.dtype:
        """numpy's type of an input or output. Raises BundleError for one numpy does not have."""
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise BundleError(f"engine {self._name}: {name} is {kind}; export the bundle again with float32 outputs")
        return np.dtype(_DTYPES[kind])

    def item_bytes(self, name: str) -> int:
        """Bytes of an element of an input or output, also of a type numpy does not have."""
        return int(self._engine.get_tensor_dtype(name).itemsize)

    def declared(self, name: str) -> Shape:
        """Shape of an input or output; -1 where it is free."""
        return tuple(self._engine.get_tensor_shape(name))

    def aliased(self, output: str) -> bool:
        """Whether an output must have the memory of an input."""
        find = getattr(self._engine, "get_aliased_input_tensor", None)  # older libraries alias nothing
        return bool(find and find(output))

    def most(self, name: str, axis: int) -> int:
        """The largest size of an axis of an input that every profile takes."""
        return min(ranges[name][1][axis] for ranges in self._ranges)

    def covering(self, shapes: Mapping[str, Shape]) -> int:
        """The first profile that has inputs of these shapes. Raises UsageError when none has."""
        for index, ranges in enumerate(self._ranges):
            if all(_within(shape, *ranges[name]) for name, shape in shapes.items()):
                return index
        built = "; ".join(_misses(shapes, ranges) for ranges in self._ranges)
        raise UsageError(
            f"engine {self._name}: cannot run {describe(shapes)}; built for {built}; "
            "choose such a size, or export the bundle with this one among its buckets"
        )

    def must(self, done: bool, what: str) -> None:
        """Raise EnvironmentProblem with the library's reason unless `done`."""
        if not done:
            raise EnvironmentProblem(f"engine {self._name}: TensorRT refused {what}: {self.last_error()}")

    def last_error(self) -> str:
        """What the library complained about last; it is forgotten."""
        return tensorrt_library.last_error(self._backend)

    def close(self) -> None:
        """Free the plan; the caller's buffers stay its own."""
        if self._engine is None:
            return
        if self._kernels is not None:
            self._save_kernels()
        for context in list(self._contexts):
            context.close()
        self._contexts.clear()
        self._kernels = None
        self._engine = None
        self._leave()

    def _profile(self, index: int) -> dict[str, tuple[Shape, Shape]]:
        """Smallest and largest shape of every input."""
        ranges = {}
        for name in self.inputs:
            low, _, high = self._engine.get_tensor_profile_shape(name, index)
            ranges[name] = (tuple(low), tuple(high))
        return ranges


class Context:
    """Runs of a plan, one after the other.

    A recording holds for the shapes and addresses it was made with, and only until its context is told others: there is
    one at most, and whoever takes turns between two sets of buffers has a context for each.
    """

    def __init__(self, plan: Plan, context: Any, device: Device, scratch: Scratch) -> None:
        self._plan, self._context, self._device, self._scratch = plan, context, device, scratch
        self._profile = 0  # of a new context
        self._shapes: dict[str, Shape] = {}
        self._memory = 0  # bytes of activations at these shapes
        self._addresses: dict[str, int] = {}
        self._graph = 0  # the recording; 0 is none
        self._release_graph: Callable[[], object] = _nothing
        self._recordable = True

    def set_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Prepare for inputs of these shapes; shapes of the outputs. Raises UsageError when no profile covers them."""
        if shapes != self._shapes:
            profile = self._plan.covering(shapes)
            self._forget()
            self._shapes = {}  # what is half set is set again
            if profile != self._profile:
                self._plan.must(self._context.set_optimization_profile_async(profile, self._device.stream), "a profile")
                self._profile = profile
            for name, shape in shapes.items():
                self._plan.must(self._context.set_input_shape(name, shape), f"shape {list(shape)} of {name}")
            self._memory = self._context.update_device_memory_size_for_shapes()
            self._shapes = dict(shapes)
        return {name: tuple(self._context.get_tensor_shape(name)) for name in self._plan.outputs}

    def run(self, addresses: Mapping[str, int]) -> None:
        """Put one run at the shapes last set on the stream; `addresses` are of all inputs and outputs."""
        scratch = self._scratch.at_least(self._memory)
        wanted = {**addresses, _SCRATCH: scratch}
        if wanted != self._addresses:
            self._forget()
            self._context.set_device_memory(scratch, self._scratch.size)
            for name, address in addresses.items():
                self._plan.must(self._context.set_tensor_address(name, address), f"the address of {name}")
            self._enqueue()  # once unrecorded: what changed is worked out in the first run
            self._addresses = wanted
        elif self._graph or self._record():
            self._device.launch(self._graph)
        else:
            self._enqueue()

    def close(self) -> None:
        self._forget()
        self._context = None

    def _record(self) -> bool:
        """Record a run; False when this plan cannot be recorded, for now or at all."""
        capturable = getattr(self._context, "is_stream_capturable", None)
        if not self._recordable or (capturable and not capturable(self._device.stream)):
            return False
        self._device.begin_capture()
        try:
            recorded = self._context.execute_async_v3(self._device.stream)
        finally:
            self._graph = self._device.end_capture()
            if self._graph:
                self._release_graph = _with(self, self._device.free_graph, self._graph)
        if not (recorded and self._graph):
            self._free_graph()
            self._plan.last_error()
            self._recordable = False
        return bool(self._graph)

    def _enqueue(self) -> None:
        self._plan.must(self._context.execute_async_v3(self._device.stream), "the run")

    def _forget(self) -> None:
        """Drop addresses and recording: the context is about to change."""
        self._addresses = {}
        self._free_graph()

    def _free_graph(self) -> None:
        self._release_graph()
        self._release_graph = _nothing
        self._graph = 0


def _within(shape: Shape, low: Shape, high: Shape) -> bool:
    return len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))


def _misses(shapes: Mapping[str, Shape], ranges: Mapping[str, tuple[Shape, Shape]]) -> str:
    """The ranges that shapes are outside of."""
    return ", ".join(f"{name} {_span(*ranges[name])}" for name in shapes if not _within(shapes[name], *ranges[name]))


def _span(low: Shape, high: Shape) -> str:
    return f"[{', '.join(str(a) if a == b else f'{a}-{b}' for a, b in zip(low, high, strict=True))}]"


def _deserialise(backend: str, name: str, path: Path) -> Any:
    trt = tensorrt_library.library(backend)
    runtime = trt.Runtime(tensorrt_library.log(backend))
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise BundleError(
            f"engine {name}: {backend} cannot read its plan: {tensorrt_library.last_error(backend)}; export it again"
        )
    return engine


def _refit(backend: str, name: str, engine: Any, weights: Path) -> None:
    trt, log = tensorrt_library.library(backend), tensorrt_library.log(backend)
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not (parser.refit_from_file(str(weights)) and refitter.refit_cuda_engine()):
        raise BundleError(
            f"engine {name}: weights of {weights.name} do not fit its plan: {tensorrt_library.last_error(backend)}; "
            "export it again"
        )
