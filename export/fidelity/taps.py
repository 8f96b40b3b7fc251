"""Looking into a run: recorded inputs and outputs, and stored draws in place of random ones."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from runtime.engines import Engine, LanguageModelEngine
from runtime.errors import UsageError
from runtime.schedulers import Schedule


class Replay:
    """Stands in for runtime.noise.Noise: hands out stored normal draws in their order."""

    def __init__(self, draws: list[np.ndarray]) -> None:
        self._draws = list(draws)

    def normal(self, *shape: int) -> np.ndarray:
        """The next draw. Raises UsageError when there is none, or it has another shape."""
        if not self._draws or self._draws[0].shape != shape:
            held = f"one of {self._draws[0].shape}" if self._draws else "none"
            raise UsageError(f"noise of {shape} is drawn where the reference has {held}")
        return self._draws.pop(0)


class RecordedModule:
    """Keeps what a torch module is given and gives while the block runs."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.inputs: list[tuple[torch.Tensor, ...]] = []
        self.outputs: list[Any] = []

    def __enter__(self) -> RecordedModule:
        self._hook = self._module.register_forward_hook(self._record)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hook.remove()

    def _record(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.inputs.append(inputs)
        self.outputs.append(output)


class RecordedEngine:
    """An engine that keeps the inputs of its first call, held ones included."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._held: dict[str, np.ndarray] = {}
        self.first: dict[str, np.ndarray] = {}

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        if not self.first:
            self.first = {name: np.array(array) for name, array in (self._held | inputs).items()}
        return self._engine(**inputs)

    def hold(self, **inputs: np.ndarray) -> None:
        self._held.update(inputs)
        self._engine.hold(**inputs)

    def close(self) -> None:
        self._engine.close()


class RecordedLanguageModel:
    """A language model that keeps the logits of every forward."""

    def __init__(self, engine: LanguageModelEngine) -> None:
        self._engine = engine
        self.logits: list[np.ndarray] = []

    @property
    def lengths(self) -> np.ndarray:
        return self._engine.lengths

    def start(self, rows: int, capacity: int) -> None:
        self.logits = []
        self._engine.start(rows, capacity)

    def forward(self, embeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
        self.logits.append(self._engine.forward(embeds, counts))
        return self.logits[-1]

    def rewind(self, lengths: np.ndarray) -> None:
        self._engine.rewind(lengths)

    def close(self) -> None:
        self._engine.close()


class RecordingSchedule:
    """A schedule that keeps the predictions it is given and the latents it gives."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self.predictions: list[np.ndarray] = []
        self.latents: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._schedule, name)

    def step(self, model_output: np.ndarray, i: int, x: np.ndarray, *rest: Any, **named: Any) -> np.ndarray:
        self.predictions.append(model_output)
        self.latents.append(self._schedule.step(model_output, i, x, *rest, **named))
        return self.latents[-1]
