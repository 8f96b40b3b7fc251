"""Engines on TensorRT and TensorRT-RTX.

Contract: an engine has a device buffer per input and output, of the size of the last call, kept between calls. The
language model's cache lives on the device only and, where the plan updates it in place, once; a plan that cannot has
two that take turns. Libraries and driver are touched when the first engine is loaded; what is missing is an
EnvironmentProblem, what does not fit this machine a BundleError, both before a plan is deserialised.

An engine's files are its plan, and for a plan without weights the ONNX model that has them. A language model whose
cache has a fixed length has one plan for each length, shortest first, named `….cLENGTH.plan`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.backends import cuda, tensorrt_library
from runtime.backends.checks import InputCheck, Shape, check_forward, check_rewind, check_start
from runtime.backends.tensorrt_plan import PLAN, Buffer, Context, Plan, check_built_for
from runtime.bundle import Bundle, EngineEntry
from runtime.engines import EngineOptions

_LENGTH = re.compile(r"\.c(\d+)\.plan$")


def prepare(entry: EngineEntry, options: EngineOptions) -> None:
    """Import what loading an engine needs. Raises EnvironmentProblem."""
    tensorrt_library.version(entry.backend)


def load_engine(bundle: Bundle, entry: EngineEntry, options: EngineOptions) -> TensorRTEngine:
    return TensorRTEngine([bundle.file(file) for file in entry.files], entry, _device_for(entry))


def load_language_model(bundle: Bundle, entry: EngineEntry, options: EngineOptions) -> TensorRTLanguageModel:
    limit = bundle.manifest.language_model.max_positions
    return TensorRTLanguageModel([bundle.file(file) for file in entry.files], entry, _device_for(entry), limit)


def _device_for(entry: EngineEntry) -> cuda.Device:
    """The GPU, when the plan was built for it and for the library installed here."""
    installed = tensorrt_library.version(entry.backend)
    device = cuda.open_device()
    check_built_for(name_of(entry), entry, installed, device.compute_capability)
    return device


def name_of(entry: EngineEntry) -> str:
    """The engine's name: its first file without suffixes."""
    return _LENGTH.sub("", entry.files[0].path).removesuffix(PLAN)


class TensorRTEngine:
    """One plan as an Engine."""

    def __init__(self, files: Sequence[Path], entry: EngineEntry, device: cuda.Device) -> None:
        name = name_of(entry)
        self._device = device
        self._check = InputCheck(name, entry.inputs)
        self._plan = Plan(entry.backend, name, files, device, entry.files[0].sha256)
        self._context = self._plan.context()
        self._buffers = {tensor: Buffer(device) for tensor in (*self._plan.inputs, *self._plan.outputs)}
        self._held: dict[str, tuple[Buffer, Shape]] = {}

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run once; every declared input is given or held. Raises UsageError before anything runs."""
        self._check.complete((*inputs, *self._held))
        sizes: dict[str, int] = {}
        used = {name: self._held[name] for name in self._held if name not in inputs}
        for name, (_, shape) in used.items():
            self._check.shape(name, shape, sizes)
        arrays = {name: self._check.array(name, array, sizes) for name, array in inputs.items()}
        shapes = {name: shape for name, (_, shape) in used.items()} | {name: a.shape for name, a in arrays.items()}
        produced = self._context.set_shapes({name: shapes[name] for name in self._plan.inputs})
        addresses = {name: buffer.address for name, (buffer, _) in used.items()}
        for name, array in arrays.items():
            addresses[name] = self._buffers[name].at_least(array.nbytes)
            self._device.upload(addresses[name], array)
        results = {name: np.empty(shape, self._plan.dtype(name)) for name, shape in produced.items()}
        for name, result in results.items():
            addresses[name] = self._buffers[name].at_least(result.nbytes)
        self._context.run(addresses)
        for name, result in results.items():
            self._device.download(result, addresses[name])
        self._device.synchronize()
        return results

    def hold(self, **inputs: np.ndarray) -> None:
        """Copy inputs to the device for the following calls. Raises UsageError."""
        arrays = {name: self._check.array(name, array, {}) for name, array in inputs.items()}
        for name, array in arrays.items():
            buffer = self._held[name][0] if name in self._held else Buffer(self._device)
            self._device.upload(buffer.at_least(array.nbytes), array)
            self._held[name] = (buffer, array.shape)
        self._device.synchronize()

    def close(self) -> None:
        self._plan.close()
        for buffer in (*self._buffers.values(), *(buffer for buffer, _ in self._held.values())):
            buffer.free()
        self._held.clear()


class TensorRTLanguageModel:
    """The language model as a LanguageModelEngine.

    Of a cache that is not updated in place there are two, read and written in turns. Each turn has a context of its
    own, so that single positions can be recorded in both.
    """

    def __init__(self, files: Sequence[Path], entry: EngineEntry, device: cuda.Device, max_positions: int) -> None:
        self._backend, self._name, self._device = entry.backend, name_of(entry), device
        self._plans = [path for path in files if path.name.endswith(PLAN)]
        self._digests = [file.sha256 for file in entry.files if file.path.endswith(PLAN)]
        self._weights = [path for path in files if path not in self._plans][:1]
        lengths = [_LENGTH.search(path.name) for path in self._plans]
        self._lengths = [int(match.group(1)) if match else max_positions for match in lengths]
        self._limit = min(max_positions, max(self._lengths))
        self._buffers: dict[str, Buffer] = {}
        self._caches: dict[str, Shape] = {}  # inputs of the cache
        self._turns: list[tuple[Context, dict[str, int]]] = []  # with addresses of the cache; the first is next
        self._capacity = 0
        self.lengths = np.zeros(0, np.int32)
        self._open(0)

    def start(self, rows: int, capacity: int) -> None:
        """An empty cache of `rows` x at least `capacity` positions; the previous one is freed. Raises UsageError."""
        check_start(rows, capacity, self._limit)
        self._free()
        index = next(i for i, length in enumerate(self._lengths) if length >= capacity)
        if index != self._opened:
            self._plan.close()
            self._open(index)
        self._capacity = capacity
        there: dict[str, int] = {}  # addresses of one turn and of the other
        back: dict[str, int] = {}
        for past in self._plan.inputs:
            declared = self._plan.declared(past)
            if len(declared) != 4:
                continue
            _, heads, length, head = declared
            self._caches[past] = (rows, heads, capacity if length < 0 else length, head)
            present = past.replace("past_", "present_", 1)
            first = second = self._cleared(past)
            if not self._plan.aliased(present):
                second = self._cleared(past, present)
            there |= {past: first, present: second}
            back |= {past: second, present: first}
        sides = [there] if there == back else [there, back]
        while len(self._contexts) < len(sides):
            self._contexts.append(self._plan.context())
        self._turns = list(zip(self._contexts, sides, strict=True))
        self.lengths = np.zeros(rows, np.int32)

    def forward(self, embeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """See LanguageModelEngine.forward."""
        counts = np.asarray(counts)
        width = self._plan.declared("inputs_embeds")[2]
        check_forward(embeds, counts, self.lengths, width, self._capacity)
        counts = counts.astype(np.int32)
        arrays = {
            "inputs_embeds": np.ascontiguousarray(embeds),
            "past_lengths": np.ascontiguousarray(self.lengths),
            "new_lengths": counts,
        }
        context, cache = self._turns[0]
        produced = context.set_shapes({name: array.shape for name, array in arrays.items()} | self._caches)
        addresses = dict(cache)
        for name, array in arrays.items():
            addresses[name] = self._buffer(name).at_least(array.nbytes)
            self._device.upload(addresses[name], array)
        logits = np.empty(produced["logits"], np.float32)
        addresses["logits"] = self._buffer("logits").at_least(logits.nbytes)
        context.run(addresses)
        self._device.download(logits, addresses["logits"])
        self._device.synchronize()
        self._turns.append(self._turns.pop(0))  # what was written is read next
        self.lengths = self.lengths + counts
        return logits

    def rewind(self, lengths: np.ndarray) -> None:
        """See LanguageModelEngine.rewind."""
        self.lengths = check_rewind(lengths, self.lengths)

    def close(self) -> None:
        self._free()
        self._plan.close()

    def _buffer(self, name: str) -> Buffer:
        return self._buffers.setdefault(name, Buffer(self._device))

    def _cleared(self, past: str, name: str | None = None) -> int:
        """Address of a buffer for cache `past`, kept as `name`."""
        size = int(np.prod(self._caches[past])) * self._plan.item_bytes(past)
        address = self._buffer(name or past).at_least(size)
        # Unwritten positions have no weight in attention, but not a number times none is not a number.
        self._device.clear(address, size)
        return address

    def _open(self, index: int) -> None:
        self._opened = -1
        self._contexts: list[Context] = []
        files = [self._plans[index], *self._weights]
        self._plan = Plan(self._backend, self._name, files, self._device, self._digests[index])
        self._opened = index
        self.most_rows: int | None = self._plan.most("inputs_embeds", 0)

    def _free(self) -> None:
        for buffer in self._buffers.values():
            buffer.free()
        self._buffers.clear()
        self._caches.clear()
        self._turns = []
        self.lengths = np.zeros(0, np.int32)
