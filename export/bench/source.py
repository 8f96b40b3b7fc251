"""Weights for a benchmark: a checkpoint's, or random ones at the sizes of a preset.

Contract: a `Source` is picklable and gives the same `Checkpoint` in every process, so that the engines and torch have
the same weights. Random ones are stretches of one pool of numbers: they take no time to draw and no memory to keep, and
every value is representable in float16, so nothing is stored wider than the official weights would be.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from runtime.errors import UsageError
from videolavit.checkpoints import TOKENIZERS, Checkpoint, load
from videolavit.config import PRESETS, ModelConfig
from videolavit.inventory import inventory
from videolavit.models.components import COMPONENTS

POOL = 10_000_019  # numbers; a prime, so that no two rows of a matrix are equal


@dataclass(frozen=True)
class Source:
    """Where weights come from: `folder`, or else random ones for `preset` with `layers` of its language model."""

    folder: Path | None = None
    preset: str = ""
    layers: int | None = None

    def checkpoint(self) -> Checkpoint:
        """Raises CheckpointError for a folder that is none, UsageError for an unknown preset or count of layers."""
        if self.folder is not None:
            return load(self.folder)
        config = self.config()
        # Text is not what is measured: any tokenizer whose ids are below the preset's will do.
        tokenizer = TOKENIZERS["shapes"].read_bytes()
        return Checkpoint(config, tokenizer=tokenizer, weights=PooledWeights(config), untrained=tuple(COMPONENTS))

    def config(self) -> ModelConfig:
        """The configuration of random weights. Raises UsageError."""
        if self.preset not in PRESETS:
            raise UsageError(f"--preset {self.preset}: there is no such preset; choose one of {', '.join(PRESETS)}")
        config = PRESETS[self.preset]
        if self.layers is None:
            return config
        most = config.language_model.layers
        if not 1 <= self.layers <= most:
            raise UsageError(f"--layers {self.layers}: {self.preset} has 1 to {most}")
        return replace(config, language_model=replace(config.language_model, layers=self.layers))


class PooledWeights:
    """Random weights that keep activations finite; as stored, in float16."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._pool: Tensor | None = None

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.float()) for name, tensor in self.stored(component))

    def stored(self, component: str) -> Iterator[tuple[str, Tensor]]:
        for name, shape in sorted(inventory(self._config, component).items()):
            yield name, self._tensor(f"{component}/{name}", shape)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) < 2:  # gains of norms, biases, mix factors
            return torch.full(shape, 1.0 if name.endswith("weight") else 0.01, dtype=torch.float16)
        if self._pool is None:
            generator = torch.Generator().manual_seed(0)
            self._pool = torch.empty(POOL).uniform_(-(3**0.5), 3**0.5, generator=generator).half()
        size = math.prod(shape)
        start = zlib.crc32(name.encode()) % POOL
        numbers = self._pool.roll(-start).repeat(-(-size // POOL))[:size].view(shape)
        return numbers.div_((size // shape[0]) ** 0.5)  # by fan-in
