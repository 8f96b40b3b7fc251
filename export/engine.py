"""One engine: written, loaded again, compared with torch.

Contract: `build_engine` fills a folder with the files of one engine and returns its manifest entry. What it needs of
the model is its own components; `build_apart` does the same in a process of its own, so that the memory of a large
component is given back, and raises what was raised there. A plan that this machine cannot run has the parity of the
ONNX model it was made from, or none where ONNX Runtime cannot run that.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx
from onnx import TensorProto

from export import onnx as files
from export import parity
from export.calibration import calibrate
from export.fused_attention import fuse_attention
from export.gates import split_gates
from export.graphs.registry import GRAPHS, LANGUAGE_MODEL
from export.hollow import trace_hollow
from export.language_model.source import arrays
from export.language_model.writing import write_language_model
from export.narrow import narrow
from export.quantised_unet import FP8, ONNX_RUNTIME_INT8, TENSORRT_INT8, quantise_unet
from export.settings import EIGHT_BITS, EngineSettings
from export.stream import write_streamed
from runtime.apart import apart
from runtime.backends.onnxruntime import OnnxRuntimeEngine, OnnxRuntimeLanguageModel
from runtime.bundle import EngineEntry, Parity, describe_file
from runtime.engines import EngineOptions
from runtime.files import writing
from videolavit.checkpoints import Checkpoint, StoredWeights

_MORE_MEMORY = "free some (`--plan` says how much is needed) and run the export again, it goes on where it stopped"
_HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """One exported engine: its entry and the seconds it took to write (plan included), load and compare."""

    name: str
    entry: EngineEntry
    export_seconds: float
    load_seconds: float = 0.0
    parity_seconds: float = 0.0
    reused: bool = False

    @property
    def bytes(self) -> int:
        """Size of the engine's files."""
        return sum(file.bytes for file in self.entry.files)

    @property
    def parity(self) -> Parity | None:
        return self.entry.parity


def write_engine(checkpoint: Checkpoint, name: str, path: Path, settings: EngineSettings) -> list[Path]:
    """Write the ONNX model of engine `name`, without a task, as `settings` say.

    Returns: its files, the model's own first. Raises CheckpointError, or UsageError when a file cannot be written.
    """
    config = checkpoint.config
    if name == LANGUAGE_MODEL:
        weights = checkpoint.weights
        stored = weights.stored(name) if isinstance(weights, StoredWeights) else weights.tensors(name)
        with writing(path):
            return write_language_model(config.language_model, config.vocabulary.size, arrays(stored), path, settings)
    traced = split_gates(trace_hollow(config, GRAPHS[name]))
    onnx_runtime = settings.backend == "onnx"
    if settings.precision in EIGHT_BITS:
        form = FP8 if settings.precision == "fp8" else ONNX_RUNTIME_INT8 if onnx_runtime else TENSORRT_INT8
        rest = traced if form == ONNX_RUNTIME_INT8 else narrow(traced, TensorProto.FLOAT16)
        quantised = quantise_unet(rest, calibrate(checkpoint, name, settings), form)
        return write_streamed(fuse_attention(quantised) if onnx_runtime else quantised, checkpoint.weights, path)
    half = _HALF.get(settings.precision)
    # ONNX Runtime has hardly an operator in bfloat16 on the CPU: it stores the weights and computes in float32.
    storage = half if half == TensorProto.BFLOAT16 and onnx_runtime else None
    if half is not None and storage is None:
        traced = narrow(traced, half)
    return write_streamed(fuse_attention(traced) if onnx_runtime else traced, checkpoint.weights, path, storage)


def build_engine(checkpoint: Checkpoint, name: str, folder: Path, settings: EngineSettings, compare: bool) -> Built:
    """Build engine `name` (NAME or TASK/NAME) in `folder`. Raises ParityError and what `write_engine` raises."""
    started = time.perf_counter()
    task, _, plain = name.rpartition("/")
    checkpoint = checkpoint.for_task(task)
    path = folder / f"{name}.onnx"
    path.parent.mkdir(exist_ok=True, parents=True)
    written = write_engine(checkpoint, plain, path, settings)
    model = onnx.load(path, load_external_data=False)
    inputs, outputs = (files.tensor_entries(values) for values in (model.graph.input, model.graph.output))
    built_for = None
    exported = time.perf_counter()
    measured = _Measured()
    if compare and _runs_here(settings):
        measured = _measure(checkpoint, plain, path, settings)
    planned = 0.0
    if settings.backend != "onnx":
        from export.tensorrt import build_plans

        plans = build_plans(name, path, folder, checkpoint.config, settings)
        planned = sum(plan.seconds for plan in plans)
        if not settings.refittable:  # else the plans take their weights from the model when they are loaded
            for file in written:
                file.unlink()
            written = []
        written, built_for = [*(plan.path for plan in plans), *written], plans[0].built_for
    entry = EngineEntry(
        files=tuple(describe_file(folder, file) for file in written),
        inputs=inputs,
        outputs=outputs,
        backend=settings.backend,
        precision=settings.precision,
        built_for=built_for,
        parity=measured.parity,
    )
    return Built(
        name=name,
        entry=entry,
        export_seconds=exported - started + planned,
        load_seconds=measured.load_seconds,
        parity_seconds=measured.parity_seconds,
    )


def build_apart(checkpoint: Checkpoint, name: str, folder: Path, settings: EngineSettings, compare: bool) -> Built:
    """`build_engine` in a process of its own. Raises what it raises, and EnvironmentProblem when the process dies."""
    checkpoint.release()
    return apart(f"engine {name}", build_engine, checkpoint, name, folder, settings, compare, fix=_MORE_MEMORY)


@dataclass(frozen=True)
class _Measured:
    parity: Parity | None = None
    load_seconds: float = 0.0
    parity_seconds: float = 0.0


def _runs_here(settings: EngineSettings) -> bool:
    """Whether ONNX Runtime runs the model on the CPU: not bfloat16 that is meant for TensorRT."""
    return settings.backend == "onnx" or settings.precision != "bf16"


def _measure(checkpoint: Checkpoint, name: str, path: Path, settings: EngineSettings) -> _Measured:
    """Compare with torch, one after the other: both in memory at once would be twice the component."""
    started = time.perf_counter()
    options = EngineOptions()
    if name == LANGUAGE_MODEL:
        model = OnnxRuntimeLanguageModel(path, options, checkpoint.config.language_model.max_positions)
        loaded = time.perf_counter()
        found = parity.check_language_model(model, checkpoint, settings.precision)
        model.close()
        return _Measured(found, loaded - started, time.perf_counter() - loaded)
    expected = parity.expected_outputs(name, checkpoint, settings.precision)
    checkpoint.release()
    compared = time.perf_counter()
    engine = OnnxRuntimeEngine(path, options)
    loaded = time.perf_counter()
    found = parity.compare(name, engine, expected, settings.precision)
    engine.close()
    return _Measured(found, loaded - compared, time.perf_counter() - loaded + compared - started)
