"""Engine against torch: the same seeded inputs, at the traced sizes and at others.

Contract: a float output differs from torch in float32 by at most `RELATIVE_TOLERANCE` of that output's largest
magnitude; of an integer output at most `CODE_TOLERANCE` of the values differ. Both depend on the engine's precision.
A UNet in int8 or fp8 is compared where it denoises, because inputs of another spread than it was calibrated for say
nothing of it, and held to `UNET_TOLERANCE`: its activations are rounded too. In int8 that was measured to cost 0.04 of
the scale on a UNet after a little training and up to 0.21 on random weights, whose features grow from step to step;
fp8, with three bits behind its point, had twice that at the least noise, 0.5 on the shapes model, and less where there
is more. These bounds find an engine that is wrong; what rounding does to pictures is for `export.end_to_end` to show.
Anything else, a value that is not finite included, is a ParityError that names engine, output and sizes. The result is
the comparison that came nearest to its bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from export.calibration import denoised
from export.graphs.graph import run
from export.graphs.registry import GRAPHS, LANGUAGE_MODEL
from export.language_model.formats import format_of
from export.onnx import torch_module
from export.quantisation import block_for, quantise
from export.settings import EIGHT_BITS, UNETS, EngineSettings, Precision
from runtime.bundle import Parity
from runtime.engines import Engine, LanguageModelEngine
from runtime.errors import ParityError
from videolavit.checkpoints import Checkpoint, Weights

RELATIVE_TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.1, "int4": 0.1}
UNET_TOLERANCE = {"fp8": 0.6, "int8": 0.3}
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


def expected_outputs(name: str, checkpoint: Checkpoint, precision: str = "fp32") -> list[Case]:
    """What an engine of `GRAPHS` has to give; a quantised UNet, where it denoises."""
    if precision in EIGHT_BITS:
        calls = enumerate(denoised(checkpoint, name), 1)
        return [Case(inputs, outputs, f"denoising step {step}") for step, (inputs, outputs) in calls]
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
    return compare(name, engine, expected_outputs(name, checkpoint, precision), precision)


def check_language_model(engine: LanguageModelEngine, checkpoint: Checkpoint, precision: str = "fp32") -> Parity:
    """Compare ragged prefills and decode steps with the torch model, which keeps no cache. Raises ParityError.

    An engine with integer weights is compared with torch computing with the same rounded weights. What rounding does
    to the scores grows with the layers (in int4 20 % of their scale after 3, half of it after 32, weights random), so
    no bound on it would tell a wrong engine; what it does to a task is for `export.end_to_end` to show.
    """
    model = _language_model(checkpoint, precision)
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


def _language_model(checkpoint: Checkpoint, precision: str) -> torch.nn.Module:
    """The torch model, with its matrices rounded as an engine of `precision` holds them."""
    model, head = format_of(EngineSettings(precision=cast(Precision, precision)))
    if not model.bits:
        return checkpoint.component(LANGUAGE_MODEL)
    weights = _RoundedWeights(checkpoint.weights, model.bits, head.bits)
    return Checkpoint(checkpoint.config, tokenizer=b"", weights=weights).component(LANGUAGE_MODEL)


class _RoundedWeights:
    """Weights of a language model, its matrices in `bits`, that of the vocabulary in `head_bits`."""

    def __init__(self, weights: Weights, bits: int, head_bits: int) -> None:
        self._weights, self._bits, self._head_bits = weights, bits, head_bits

    def tensors(self, component: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._weights.tensors(component):
            if tensor.ndim == 2 and name != "model.embed_tokens.weight":
                matrix = tensor.numpy()  # [out, in]
                bits = self._head_bits if name == "lm_head.weight" else self._bits
                rounded = quantise(matrix, bits, block_for(matrix.shape[1], name)).dequantised()  # [in, out]
                tensor = torch.from_numpy(rounded.T.copy())
            yield name, tensor


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
    quantised = precision in EIGHT_BITS and name in UNETS
    relative = (UNET_TOLERANCE if quantised else RELATIVE_TOLERANCE)[precision]
    tolerance = relative * scale
    if not error <= tolerance:  # also catches NaN
        raise ParityError(name, error, tolerance, what)
    return Parity(max_abs_error=error, tolerance=tolerance, scale=scale)


def _worst(results: list[Parity]) -> Parity:
    return max(results, key=lambda parity: parity.max_abs_error / parity.tolerance if parity.tolerance else 0)
