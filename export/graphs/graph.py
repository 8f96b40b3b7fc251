"""What an engine is made from: a torch module with named inputs and outputs and a table of their shapes.

Contract: a `Graph` says which components it needs, how to build its module from them, and the symbolic shape of
every input and output. Example inputs, dynamic axes and the manifest's shapes all derive from that one table. A
dimension is a number, or a name when it is free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from videolavit.config import ModelConfig

Shape = tuple[int | str, ...]
Sizes = dict[str, int]  # value of every free dimension
Draw = Callable[[np.random.Generator, tuple[int, ...], Sizes], np.ndarray]


def normal(generator: np.random.Generator, shape: tuple[int, ...], sizes: Sizes) -> np.ndarray:
    """Standard normal, float32."""
    return generator.standard_normal(shape, dtype=np.float32)


def uniform(low: float, high: float) -> Draw:
    """Uniform in [low, high), float32."""
    return lambda generator, shape, sizes: generator.uniform(low, high, shape).astype(np.float32)


def integers(high: int) -> Draw:
    """Uniform in 0..high-1, int64."""
    return lambda generator, shape, sizes: generator.integers(0, high, shape)


@dataclass(frozen=True)
class Input:
    """Shape of an input and how to draw an example of it."""

    shape: Shape
    draw: Draw = normal


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of an engine; names are the engine's, order is the module's."""

    inputs: dict[str, Input]
    outputs: dict[str, Shape]

    def example(self, sizes: Sizes, seed: int) -> dict[str, np.ndarray]:
        """Seeded inputs with the free dimensions set to `sizes`."""
        generator = np.random.default_rng(seed)
        arrays = {}
        for name, entry in self.inputs.items():
            shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in entry.shape)
            arrays[name] = entry.draw(generator, shape, sizes)
        return arrays

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Free dimensions of every input and output: name -> {axis: dimension}."""
        shapes = {name: entry.shape for name, entry in self.inputs.items()} | self.outputs
        return {
            name: {axis: dim for axis, dim in enumerate(shape) if isinstance(dim, str)}
            for name, shape in shapes.items()
        }


@dataclass(frozen=True)
class Graph:
    """One engine.

    Attributes:
        components: names of the model components it is made from.
        build: (config, *components) -> module taking the signature's inputs by position, giving its outputs.
        signature: config -> Signature.
        example: sizes the graph is traced at.
        others: further sizes at which it must agree with torch.
    """

    components: tuple[str, ...]
    build: Callable[..., nn.Module]
    signature: Callable[[ModelConfig], Signature]
    example: Sizes
    others: tuple[Sizes, ...]


def run(module: nn.Module, inputs: dict[str, np.ndarray], signature: Signature) -> dict[str, np.ndarray]:
    """Outputs of the torch module by name."""
    with torch.inference_mode():
        result = module(*(torch.from_numpy(inputs[name]) for name in signature.inputs))
    values = result if isinstance(result, tuple) else (result,)
    return {name: value.numpy() for name, value in zip(signature.outputs, values, strict=True)}
