"""A language model with more layers that still writes the same: how a trained model is made larger.

Contract: `deepened(checkpoint, layers)` is the same model with copies of layers put in, each right after the layer it
copies and spread evenly over the depth. The two matrices by which a copy adds to the residual stream are zero, so that
it adds nothing until it is trained; all else of it has the trained values to start from. Nothing is computed before the
weights are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from runtime.errors import UsageError
from videolavit.checkpoints import Checkpoint, Weights, stored_tensors
from videolavit.inventory import module_of

LANGUAGE_MODEL = "language_model"
OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")  # of a layer, into the residual stream
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def deepened(checkpoint: Checkpoint, layers: int) -> Checkpoint:
    """`checkpoint` with a language model of `layers` layers that computes the same scores.

    Raises UsageError unless `layers` is more than the model has and at most twice as many.
    """
    config = checkpoint.config
    there = config.language_model.layers
    if not there < layers <= 2 * there:
        raise UsageError(f"--layers {layers}: the language model has {there}; choose {there + 1} to {2 * there}")
    return Checkpoint(
        replace(config, language_model=replace(config.language_model, layers=layers)),
        tokenizer=checkpoint.tokenizer,
        weights=_DeepenedWeights(checkpoint.weights, layer_sources(there, layers)),
        components=checkpoint.components,
        untrained=checkpoint.untrained,
    )


def layer_sources(there: int, layers: int) -> list[tuple[int, bool]]:
    """For each of `layers` layers: which of the `there` old ones it comes from, and whether it is a silent copy."""
    added = layers - there
    copied = {(index + 1) * there // added - 1 for index in range(added)}
    return [(old, silent) for old in range(there) for silent in ([False, True] if old in copied else [False])]


class _DeepenedWeights:
    """The weights of a checkpoint, in the types in which they are stored, with silent copies of layers."""

    def __init__(self, weights: Weights, sources: list[tuple[int, bool]]) -> None:
        self._weights = weights
        self._sources = sources

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.float()) for name, tensor in self.stored(component))

    def stored(self, component: str) -> Iterator[tuple[str, Tensor]]:
        stored = stored_tensors(self._weights, component)
        if module_of(component) != LANGUAGE_MODEL:
            return stored
        # All at once, for the order of names; those of a folder are mapped from its files, not in memory.
        return iter(sorted(self._copied(stored), key=lambda item: item[0]))

    def _copied(self, stored: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stored:
            match = _LAYER.fullmatch(name)
            if match is None:
                yield name, tensor
                continue
            for new, (old, silent) in enumerate(self._sources):
                if old == int(match[1]):
                    quiet = silent and match[2] in OUTPUTS
                    yield f"model.layers.{new}.{match[2]}", torch.zeros_like(tensor) if quiet else tensor
