"""Engine against torch: the same seeded inputs, at the traced sizes and at others.

Contract: a float output differs from torch in float32 by at most `RELATIVE_TOLERANCE` of that output's largest
magnitude; of an integer output at most `CODE_TOLERANCE` of the values differ. Both depend on the engine's precision.
Anything else, a value that is not finite included, is a ParityError that names engine, output and sizes. The result is
the comparison that came nearest to its bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from export.graphs.graph import run
from export.graphs.registry import GRAPHS
from export.onnx import torch_module
from runtime.bundle import Parity
from runtime.engines import Engine, LanguageModelEngine
from runtime.errors import ParityError
from videolavit.checkpoints import Checkpoint

RELATIVE_TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.1, "int4": 0.5}
CODE_TOLERANCE = {"fp32": 0.0, "fp16": 0.02, "bf16": 0.1}  # share of codes
SEED = 1
PROMPTS = ((7, 3, 9), (4,))  # rows of a prefill: real positions of each
DECODE_STEPS = 4


@dataclass(frozen=True)
class Case:
    """Inputs of one comparison, what torch makes of them, and the sizes as text."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    where: str


def expected_outputs(name: str, checkpoint: Checkpoint) -> list[Case]:
    """What an engine of `GRAPHS` has to give."""
    graph = GRAPHS[name]
    module = torch_module(checkpoint, graph)
    signature = graph.signature(checkpoint.config)
    cases = []
    for sizes in (graph.example, *graph.others):
        inputs = signature.example(sizes, SEED)
        where = ", ".join(f"{dim} {size}" for dim, size in sizes.items())
        cases.append(Case(inputs, run(module, inputs, signature), where))
    return cases


def compare(name: str, engine: Engine, expected: list[Case], precision: str = "fp32") -> Parity:
    """Run an engine on the cases. Raises ParityError."""
    results = []
    for case in expected:
        actual = engine(**case.inputs)
        results += [
            _compare(name, actual[output], value, f"{output} at {case.where}", precision)
            for output, value in case.outputs.items()
        ]
    return _worst(results)


def check_engine(name: str, engine: Engine, checkpoint: Checkpoint, precision: str = "fp32") -> Parity:
    """Compare an engine of `GRAPHS` with its torch module. Raises ParityError."""
    return compare(name, engine, expected_outputs(name, checkpoint), precision)


def check_language_model(engine: LanguageModelEngine, checkpoint: Checkpoint, precision: str = "fp32") -> Parity:
    """Compare ragged prefills and decode steps with the torch model, which keeps no cache. Raises ParityError."""
    model = checkpoint.component("language_model")
    width = checkpoint.config.language_model.hidden_size
    generator = np.random.default_rng(SEED)
    results = []
    for counts in PROMPTS:
        engine.start(len(counts), max(counts) + DECODE_STEPS)
        histories = [np.zeros((0, width), np.float32) for _ in counts]
        for step in range(1 + DECODE_STEPS):
            new = counts if step == 0 else (1,) * len(counts)
            embeds = np.zeros((len(new), max(new), width), np.float32)
            for row, count in enumerate(new):
                embeds[row, :count] = generator.standard_normal((count, width), dtype=np.float32)
                histories[row] = np.concatenate([histories[row], embeds[row, :count]])
            actual = engine.forward(embeds, np.array(new))
            expected = np.stack([_last_logits(model, history) for history in histories])
            where = f"logits, step {step} of rows {counts}"
            results.append(_compare("language_model", actual, expected, where, precision))
    return _worst(results)


def _last_logits(model: torch.nn.Module, embeds: np.ndarray) -> np.ndarray:
    """Logits [V] after the sequence embeds [L, D]."""
    with torch.inference_mode():
        output = model(inputs_embeds=torch.from_numpy(embeds)[None], use_cache=False, logits_to_keep=1)
    return output.logits[0, -1].numpy()


def _compare(name: str, actual: np.ndarray, expected: np.ndarray, what: str, precision: str) -> Parity:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        detail = f"{what}: {actual.dtype} {actual.shape} instead of {expected.dtype} {expected.shape}"
        raise ParityError(name, float("inf"), 0, detail)
    if actual.dtype.kind in "iu":
        wrong = int((actual != expected).sum())
        allowed = int(CODE_TOLERANCE[precision] * actual.size)
        if wrong > allowed:
            raise ParityError(name, wrong, allowed, f"{what}: {wrong} of {actual.size} integers differ")
        return Parity(max_abs_error=wrong, tolerance=allowed, scale=float(np.abs(expected).max()))
    scale = float(np.abs(expected).max())
    error = float(np.abs(actual.astype(np.float64) - expected).max())
    tolerance = RELATIVE_TOLERANCE[precision] * scale
    if not error <= tolerance:  # also catches NaN
        raise ParityError(name, error, tolerance, what)
    return Parity(max_abs_error=error, tolerance=tolerance, scale=scale)


def _worst(results: list[Parity]) -> Parity:
    return max(results, key=lambda parity: parity.max_abs_error / parity.tolerance if parity.tolerance else 0)
