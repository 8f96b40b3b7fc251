"""Engines on ONNX Runtime, on the CPU or a CUDA device.

Contract: the library is imported when the first engine is loaded; without it, or when a session would silently run
somewhere else than asked, loading raises EnvironmentProblem; only the provider `auto` may fall back to the CPU. A model
the library cannot read raises BundleError. Inputs are checked against the model before it runs. Weights in external
files are mapped, not copied, by the library. What it makes of a small model on the CPU is kept for the next time
(`graph_cache`).

Matrices in int4 and int8 are multiplied in the library's default way (its `session.qdq_matmulnbits_accuracy_level` is
4), which rounds activations to int8 too. Keeping them in float32 made decoding three to five times slower; scores were
off from float32's by 1.5 % to 1.9 % of their scale instead of 2.7 % in int8, and by the same 20 % to 30 % in int4.

Where both factors are in int8, as in UNets, processors with AVX2 or AVX-512 but without VNNI add pairs of products in
16 bits, which overflow. `session.x64quantprecision` has the library take a slower, exact way there (a UNet's error went
from 0.047 of its scale to 0.011 on AVX2). Language models must not have it: with it the library makes their blocks of
int8 weights into a model that it cannot run.

Threads of a session wait actively for its next call, some 30 ms, and take the processors from the engine that is called
instead: after a look-up of embeddings a prompt of 991 positions took 66 ms, not 35. `session.force_spinning_stop` ends
that with the call. Language models keep it, for they are called again at once.

On the CPU the library does not plan which intermediate results share memory (`enable_mem_reuse`). It compares every one
with many, which took half the time of opening a UNet of 1900 nodes; without it the arena has them share as much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends import graph_cache
from runtime.backends.checks import check_rewind
from runtime.bundle import Bundle, EngineEntry, FileEntry
from runtime.engines import EngineOptions, processors
from runtime.errors import BundleError, EnvironmentProblem, UsageError

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
AUTO = "auto"  # a CUDA device where there is one that works, else the CPU
# Of every session but a language model's; see the module's docstring.
_CONFIGURATION = {"session.x64quantprecision": "1", "session.force_spinning_stop": "1"}
_INSTALL = {"cpu": 'pip install "videolavit[cpu]"', "cuda": 'pip install "videolavit[gpu]"'}
_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(bool)": np.dtype(np.bool_),
}
# The smallest model there is, y [1] = x [1] in float32, to try a provider on.
_IDENTITY = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a"
    "0a08080112040a020801620f0a0179120a0a08080112040a02080142040a001011"
)


def prepare(entry: EngineEntry, options: EngineOptions) -> None:
    """Import what loading an engine needs. Raises EnvironmentProblem."""
    _library(choose_provider(options.provider))


def load_engine(bundle: Bundle, entry: EngineEntry, options: EngineOptions) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(bundle.file(entry.files[0]), options, entry.files)


def load_language_model(bundle: Bundle, entry: EngineEntry, options: EngineOptions) -> OnnxRuntimeLanguageModel:
    limit = bundle.manifest.language_model.max_positions
    return OnnxRuntimeLanguageModel(bundle.file(entry.files[0]), options, limit)


def cuda_problem() -> str | None:
    """Why ONNX Runtime cannot run on a CUDA device here, in one line; None when it can."""
    try:
        open_session(_IDENTITY, EngineOptions(provider="cuda"))
    except (EnvironmentProblem, BundleError) as problem:  # the latter where the provider itself does not start
        return str(problem)
    return None


@cache
def choose_provider(wanted: str) -> str:
    """`cpu` or `cuda` where `auto` is wanted, else what is wanted. Raises UsageError for an unknown one."""
    if wanted == AUTO:
        return "cpu" if cuda_problem() else "cuda"
    if wanted not in _PROVIDERS:
        raise UsageError(f"provider {wanted!r}: not known; choose from {', '.join(_PROVIDERS)}, {AUTO}")
    return wanted


def open_session(
    model: Path | bytes,
    options: EngineOptions,
    files: Sequence[FileEntry] = (),
    entries: Mapping[str, str] | None = None,
) -> Any:
    """An onnxruntime.InferenceSession of a model, a file or its content, with `entries` in its configuration.

    `files` are a model's files as its manifest has them, for one that may be kept as it was optimised.
    Raises UsageError for an unknown provider, EnvironmentProblem, or BundleError when the model cannot be read.
    """
    provider = choose_provider(options.provider)
    ort = _library(provider)
    if _PROVIDERS[provider] not in ort.get_available_providers():
        raise EnvironmentProblem(
            f"provider {provider}: this onnxruntime has only {', '.join(ort.get_available_providers())}; "
            f"run `{_INSTALL[provider]}` in an environment without the other onnxruntime package"
        )
    own = dict(entries or {})
    library = f"{ort.__version__} {ort.get_build_info()} {own}"  # how a kept model was optimised
    key = graph_cache.key_of(files, library) if provider == "cpu" else None
    if key is None:
        return _session(ort, model, options, provider, own)
    kept = graph_cache.find(key)
    if kept is not None:
        try:
            return _session(ort, kept, options, provider, own, optimised=True)
        except BundleError:
            graph_cache.discard(kept)
    staged = graph_cache.staging(key)
    if staged is not None:
        try:
            session = _session(ort, model, options, provider, own, into=staged)
            graph_cache.keep(key, staged)
            return session
        except BundleError:  # the disk may be full
            graph_cache.discard(staged)
    return _session(ort, model, options, provider, own)


def _session(
    ort: Any,
    model: Path | bytes,
    options: EngineOptions,
    provider: str,
    entries: Mapping[str, str],
    optimised: bool = False,
    into: Path | None = None,
) -> Any:
    """Open a model, one that is `optimised` as it is; write what it was optimised to `into` a file."""
    levels = ort.GraphOptimizationLevel
    settings = ort.SessionOptions()
    settings.graph_optimization_level = levels.ORT_DISABLE_ALL if optimised else levels.ORT_ENABLE_ALL
    settings.intra_op_num_threads = options.threads or processors()
    for entry, value in entries.items():
        settings.add_session_config_entry(entry, value)
    settings.enable_mem_reuse = provider != "cpu"
    settings.log_severity_level = 4  # what goes wrong is raised; the library's own log would only repeat it
    if into is not None:
        settings.optimized_model_filepath = str(into)
    wanted = _PROVIDERS[provider]
    try:
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model), settings, providers=[wanted], enable_fallback=0
        )
    except _load_errors() as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = "model" if isinstance(model, bytes) else model
        raise BundleError(
            f"{where}: ONNX Runtime {ort.__version__} cannot load it: {reason}; export it again"
        ) from error
    if session.get_providers()[0] != wanted:
        raise EnvironmentProblem(
            f"provider {provider}: ONNX Runtime {ort.__version__} fell back to {session.get_providers()[0]}; "
            "check the driver, CUDA and cuDNN with `videolavit doctor`"
        )
    return session


def _library(provider: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentProblem(f"onnxruntime cannot be imported ({error}); run `{_INSTALL[provider]}`") from error
    return onnxruntime


def _load_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    return tuple(getattr(state, name) for name in (*names, "NoModel", "RuntimeException", "EPFail"))


class OnnxRuntimeEngine:
    """One model file as an Engine.

    A one-element input may be given as a scalar or as an array of one element, whichever the model declares.
    """

    def __init__(self, path: Path, options: EngineOptions, files: Sequence[FileEntry] = ()) -> None:
        """`files` is as in `open_session`."""
        self._name = path.stem
        self._device = choose_provider(options.provider)
        self._ort = _library(self._device)
        self._session = open_session(path, options, files, _CONFIGURATION)
        self._declared = {value.name: value for value in self._session.get_inputs()}
        strange = [f"{name} is {value.type}" for name, value in self._declared.items() if value.type not in _DTYPES]
        if strange:
            raise BundleError(f"{path}: input {', '.join(strange)}, not one of {', '.join(_DTYPES)}; export it again")
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._held: dict[str, tuple[Any, tuple[int, ...]]] = {}  # name -> (array or OrtValue, shape)

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run once; every declared input is given or held. Raises UsageError before the model runs."""
        missing = [name for name in self._declared if name not in inputs and name not in self._held]
        if missing:
            raise UsageError(f"engine {self._name}: input {', '.join(missing)} is missing")
        sizes: dict[str, int] = {}
        values = {}
        for name, (value, shape) in self._held.items():
            if name not in inputs:
                self._check_shape(name, shape, sizes)
                values[name] = value
        for name, array in inputs.items():
            values[name] = self._checked(name, array, sizes)
        if self._device == "cpu":
            # Values in and out of the library's own type would add some 30 microseconds a call, which is more than
            # looking up an embedding takes, and as much as a small model's forward pass.
            arrays = self._session.run(self._outputs, values)
            return dict(zip(self._outputs, arrays, strict=True))
        for name in inputs:
            values[name] = self._ort.OrtValue.ortvalue_from_numpy(values[name])
        results = self._session.run_with_ort_values(self._outputs, values)
        return {name: result.numpy() for name, result in zip(self._outputs, results, strict=True)}

    def hold(self, **inputs: np.ndarray) -> None:
        """Copy inputs to the device for the following calls. Raises UsageError."""
        for name, array in inputs.items():
            checked = self._checked(name, array, {})
            if self._device == "cpu":
                value: Any = np.array(checked)  # the caller may go on to change its own
            else:
                value = self._ort.OrtValue.ortvalue_from_numpy(checked, self._device)
            self._held[name] = value, checked.shape

    def close(self) -> None:
        self._held.clear()
        self._session = None

    def _checked(self, name: str, array: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """`array`, contiguous and in the declared rank. `sizes` collects what the free dimensions turned out to be."""
        if name not in self._declared:
            raise UsageError(f"engine {self._name}: has no input {name}, only {', '.join(self._declared)}")
        wanted = _DTYPES[self._declared[name].type]
        rank = len(self._declared[name].shape)
        array = np.asarray(array)
        if array.dtype != wanted:
            raise UsageError(f"engine {self._name}: input {name} is {array.dtype}, it must be {wanted}")
        if array.size == 1 and array.ndim + rank == 1:
            array = array.reshape((1,) * rank)
        self._check_shape(name, array.shape, sizes)
        return array if array.flags.c_contiguous else array.copy()

    def _check_shape(self, name: str, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
        declared = self._declared[name].shape  # a free dimension is a name or None
        fits = len(shape) == len(declared)
        for size, dimension in zip(shape, declared, strict=False):
            if isinstance(dimension, str):
                dimension = sizes.setdefault(dimension, size)
            fits = fits and dimension in (None, size)
        if not fits:
            free = {k: v for k, v in sizes.items() if k in declared}
            known = f" where {', '.join(f'{k} is {v}' for k, v in free.items())}" if free else ""
            wanted = ", ".join("?" if d is None else str(d) for d in declared)
            raise UsageError(f"engine {self._name}: input {name} is {list(shape)}, it must be [{wanted}]{known}")


class OnnxRuntimeLanguageModel:
    """The language model as a LanguageModelEngine.

    The cache is allocated by `start` and bound as past and present at once, so the model updates it in place. For one
    new position a row, inputs and logits have fixed buffers too and nothing is bound again between tokens.
    """

    def __init__(self, path: Path, options: EngineOptions, max_positions: int) -> None:
        self._device = choose_provider(options.provider)
        self._ort = _library(self._device)
        self._session = open_session(path, options)
        self._max_positions = max_positions
        declared = {value.name: value for value in self._session.get_inputs()}
        strange = [f"{name} is {value.type}" for name, value in declared.items() if value.type not in _DTYPES]
        if strange:
            raise BundleError(f"{path}: input {strange[0]}, not one of {', '.join(_DTYPES)}; export it again")
        self._width = int(declared["inputs_embeds"].shape[2])
        self._caches: dict[str, tuple[tuple[Any, ...], np.dtype[Any]]] = {
            name: (tuple(value.shape), _DTYPES[value.type])
            for name, value in declared.items()
            if name.startswith("past_") and len(value.shape) == 4
        }
        self._vocabulary = int(next(v.shape[1] for v in self._session.get_outputs() if v.name == "logits"))
        self._cache: dict[str, Any] = {}
        self._step: _Step | None = None
        self._capacity = 0
        self.lengths = np.zeros(0, np.int32)
        self.most_rows: int | None = None

    def start(self, rows: int, capacity: int) -> None:
        """An empty cache of `rows` x `capacity` positions; the previous one is freed. Raises UsageError."""
        if not 1 <= capacity <= self._max_positions:
            raise UsageError(
                f"language model: {capacity} positions are wanted, the model has {self._max_positions}; "
                "shorten the prompt or ask for fewer new tokens"
            )
        if rows < 1:
            raise UsageError(f"language model: rows is {rows}, it must be at least 1")
        self._step = None
        self._cache.clear()
        for name, ((_, heads, _, head), dtype) in self._caches.items():
            self._cache[name] = self._value(np.zeros((rows, heads, capacity, head), dtype))
        self._capacity = capacity
        self.lengths = np.zeros(rows, np.int32)

    def forward(self, embeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """See LanguageModelEngine.forward."""
        counts = np.asarray(counts)
        self._check(embeds, counts)
        steps = embeds.shape[1]
        if steps > 1 or self._step is None:
            step = _Step(self, len(self.lengths), steps)
            self._step = step if steps == 1 else None
        else:
            step = self._step
        logits = step.run(embeds, self.lengths, counts.astype(np.int32))
        self.lengths = self.lengths + counts.astype(np.int32)
        return logits

    def rewind(self, lengths: np.ndarray) -> None:
        """See LanguageModelEngine.rewind."""
        self.lengths = check_rewind(lengths, self.lengths)

    def close(self) -> None:
        self._step = None
        self._cache.clear()
        self._session = None

    def _check(self, embeds: np.ndarray, counts: np.ndarray) -> None:
        rows = len(self.lengths)
        if not rows:
            raise UsageError("language model: start must come before forward")
        if embeds.dtype != np.float32 or embeds.ndim != 3 or (embeds.shape[0], embeds.shape[2]) != (rows, self._width):
            raise UsageError(
                f"language model: embeds is {embeds.dtype} {list(embeds.shape)}, "
                f"it must be float32 [{rows}, S, {self._width}]"
            )
        steps = embeds.shape[1]
        if counts.dtype.kind not in "iu" or counts.shape != (rows,) or counts.min() < 1 or counts.max() > steps:
            raise UsageError(f"language model: counts {counts.tolist()} must be {rows} integers from 1 to {steps}")
        if self.lengths.any() and steps > 1 and (rows > 1 or counts[0] != steps):
            raise UsageError(
                f"language model: {rows} rows with a past take one position each, not {steps}; "
                "only a single row without padding takes more"
            )
        longest = int(self.lengths.max())
        if longest + steps > self._capacity:
            raise UsageError(
                f"language model: {longest} + {steps} positions do not fit the cache of {self._capacity}; "
                "start with a larger capacity"
            )

    def _value(self, array: np.ndarray) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._device)


class _Step:
    """Buffers and bindings of a forward pass of B rows and S new positions.

    On the CPU the library's values are views of the arrays they were made from, so these are written and read directly.
    """

    def __init__(self, model: OnnxRuntimeLanguageModel, rows: int, steps: int) -> None:
        self._session = model._session
        self._arrays = {
            "inputs_embeds": np.zeros((rows, steps, model._width), np.float32),
            "past_lengths": np.zeros(rows, np.int32),
            "new_lengths": np.zeros(rows, np.int32),
        }
        self._scores = np.zeros((rows, model._vocabulary), np.float32)
        self._direct = model._device == "cpu"
        self._inputs = {name: model._value(array) for name, array in self._arrays.items()}
        self._logits = model._value(self._scores)
        self._binding = self._session.io_binding()
        for name, value in (self._inputs | model._cache).items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in model._cache.items():
            self._binding.bind_ortvalue_output(name.replace("past_", "present_", 1), value)
        self._binding.bind_ortvalue_output("logits", self._logits)

    def run(self, embeds: np.ndarray, past: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Logits [B, V], the caller's own."""
        for name, array in (("inputs_embeds", embeds), ("past_lengths", past), ("new_lengths", counts)):
            if self._direct:
                self._arrays[name][:] = array
            else:
                self._inputs[name].update_inplace(array)
        self._session.run_with_iobinding(self._binding)
        return self._scores.copy() if self._direct else self._logits.numpy().copy()
