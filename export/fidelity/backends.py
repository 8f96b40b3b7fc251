"""Where a golden case is computed: the torch modules, or the exported engines in ONNX Runtime.

Contract: both give engines (runtime.engines) of the same names and inputs, so a case is written once. `engine` and
`language_model` are the engines of a bundle, built the way `videolavit export` builds them; `part` is a piece of a
module that no bundle has as an engine of its own, but whose numbers a golden file holds. Models are written below one
folder, which the caller removes.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from export.engine import write_engine
from export.graphs.graph import Graph, Input, Shape, Signature, Sizes, run
from export.graphs.registry import GRAPHS, LANGUAGE_MODEL
from export.onnx import torch_module, trace
from export.settings import EngineSettings
from runtime.backends.onnxruntime import OnnxRuntimeEngine, OnnxRuntimeLanguageModel
from runtime.engines import Engine, EngineOptions, LanguageModelEngine
from runtime.resize import bicubic
from videolavit.checkpoints import Checkpoint
from videolavit.models.motion_resize import resize_motion

TORCH, ONNX, NUMPY = "torch", "ONNX Runtime", "numpy"
BACKENDS = (TORCH, ONNX, NUMPY)
EXAMPLE = 2  # size of every free dimension while a part is traced; cases have others


class Call(nn.Module):
    """A method of a module as a module."""

    def __init__(self, owner: nn.Module, method: str) -> None:
        super().__init__()
        self.owner = owner
        self.method = method

    def forward(self, *inputs: torch.Tensor) -> Any:
        return getattr(self.owner, self.method)(*inputs)


class Engines(abc.ABC):
    """Engines of one backend."""

    name: str

    @abc.abstractmethod
    def engine(self, checkpoint: Checkpoint, name: str) -> Engine:
        """The engine `name` of a bundle of `checkpoint`."""

    @abc.abstractmethod
    def language_model(self, checkpoint: Checkpoint) -> LanguageModelEngine:
        """The language model of a bundle of `checkpoint`."""

    @abc.abstractmethod
    def part(self, module: nn.Module, inputs: Mapping[str, Shape | Input], outputs: Mapping[str, Shape]) -> Engine:
        """`module` as an engine; free dimensions of the shapes are names."""

    @abc.abstractmethod
    def resize(self, motion: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Motion [B, 2, T, h, w] on another grid, as this side of the project resizes it."""


class TorchEngines(Engines):
    """The modules themselves."""

    name = TORCH

    def engine(self, checkpoint: Checkpoint, name: str) -> Engine:
        graph = GRAPHS[name]
        return TorchEngine(torch_module(checkpoint, graph), graph.signature(checkpoint.config))

    def language_model(self, checkpoint: Checkpoint) -> LanguageModelEngine:
        return TorchLanguageModel(checkpoint.component(LANGUAGE_MODEL))

    def part(self, module: nn.Module, inputs: Mapping[str, Shape | Input], outputs: Mapping[str, Shape]) -> Engine:
        return TorchEngine(module.eval(), _signature(inputs, outputs))

    def resize(self, motion: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return resize_motion(torch.from_numpy(motion), *size).numpy()


class OnnxEngines(Engines):
    """Exported models in ONNX Runtime; `folder` holds them."""

    name = ONNX

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._options = EngineOptions()

    def engine(self, checkpoint: Checkpoint, name: str) -> Engine:
        return OnnxRuntimeEngine(self._written(checkpoint, name), self._options)

    def language_model(self, checkpoint: Checkpoint) -> LanguageModelEngine:
        limit = checkpoint.config.language_model.max_positions
        return OnnxRuntimeLanguageModel(self._written(checkpoint, LANGUAGE_MODEL), self._options, limit)

    def part(self, module: nn.Module, inputs: Mapping[str, Shape | Input], outputs: Mapping[str, Shape]) -> Engine:
        signature = _signature(inputs, outputs)
        graph = Graph((), lambda config: module, lambda config: signature, _example(signature), ())
        path = self._path(type(module).__name__)
        onnx.save(trace(module.eval(), graph, signature), path)
        return OnnxRuntimeEngine(path, self._options)

    def resize(self, motion: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return bicubic(motion, size)

    def _written(self, checkpoint: Checkpoint, name: str) -> Path:
        return write_engine(checkpoint, name, self._path(name), EngineSettings())[0]

    def _path(self, name: str) -> Path:
        return self._folder / f"{next(self._numbers)}-{name}.onnx"


class TorchEngine:
    """A torch module as an Engine."""

    def __init__(self, module: nn.Module, signature: Signature) -> None:
        self._module = module
        self._signature = signature
        self._held: dict[str, np.ndarray] = {}

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        arrays = {name: np.array(array) for name, array in (self._held | inputs).items()}
        return run(self._module, arrays, self._signature)

    def hold(self, **inputs: np.ndarray) -> None:
        self._held.update(inputs)

    def close(self) -> None:
        self._held.clear()


class TorchLanguageModel:
    """A transformers Llama as a LanguageModelEngine without a cache: every row is computed anew at each step."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._rows: list[np.ndarray] = []  # [L_i, D] each
        self.lengths = np.zeros(0, np.int32)
        self.most_rows: int | None = None

    def start(self, rows: int, capacity: int) -> None:
        self._rows = [np.zeros((0, self._model.config.hidden_size), np.float32) for _ in range(rows)]
        self.lengths = np.zeros(rows, np.int32)

    @torch.inference_mode()
    def forward(self, embeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
        self._rows = [
            np.concatenate([row, new[:count]]) for row, new, count in zip(self._rows, embeds, counts, strict=True)
        ]
        self.lengths = np.array([len(row) for row in self._rows], np.int32)
        batch = nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in self._rows], batch_first=True)  # [B, L, D]
        # Padding stands on the right, so the causal mask alone keeps it from every real position.
        hidden = self._model.model(inputs_embeds=batch, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(self._rows)), torch.from_numpy(self.lengths).long() - 1]  # [B, D]
        logits: np.ndarray = self._model.lm_head(last).numpy()
        return logits

    def rewind(self, lengths: np.ndarray) -> None:
        self._rows = [row[:length] for row, length in zip(self._rows, lengths, strict=True)]
        self.lengths = np.array(lengths, np.int32)

    def close(self) -> None:
        self._rows = []


def _signature(inputs: Mapping[str, Shape | Input], outputs: Mapping[str, Shape]) -> Signature:
    return Signature({n: i if isinstance(i, Input) else Input(i) for n, i in inputs.items()}, dict(outputs))


def _example(signature: Signature) -> Sizes:
    return {dim: EXAMPLE for entry in signature.inputs.values() for dim in entry.shape if isinstance(dim, str)}
