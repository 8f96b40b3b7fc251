"""The mean of checkpoints that were trained apart from the same one (model soups, arXiv 2203.05482).

Contract: `averaged(checkpoints)` has, for every tensor, the mean of theirs, computed in float32 and kept in the type in
which the first one stores it. A tensor that is the same in all is kept as it is. What each learnt by heart differs
between them and becomes less, what all learnt stays. That holds for runs that began with the same weights only. Nothing
is computed before the weights are read, one tensor of each at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor

from runtime.errors import CheckpointError, UsageError
from videolavit.checkpoints import Checkpoint, Weights, stored_tensors


def averaged(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """The mean of `checkpoints`, with the defaults of the first. Untrained is what is untrained in any of them.

    Raises UsageError for fewer than two, or when sizes, tokenizer or components are not the same; and, when the weights
    are read, for integers that differ, which have no mean. CheckpointError for a tensor that is not in all of them.
    """
    if len(checkpoints) < 2:
        raise UsageError(f"CHECKPOINT: {len(checkpoints)} given; a mean needs two or more")
    first = checkpoints[0]
    for place, other in enumerate(checkpoints[1:], 2):
        for what, here, there in (
            ("sizes", first.config, replace(other.config, defaults=first.config.defaults)),
            ("tokenizer", first.tokenizer, other.tokenizer),
            ("components", first.components, other.components),
        ):
            if here != there:
                raise UsageError(
                    f"CHECKPOINT: the {what} of number {place} are not those of the first; "
                    "give checkpoints that were trained from the same one"
                )
    return Checkpoint(
        first.config,
        tokenizer=first.tokenizer,
        weights=_MeanWeights([each.weights for each in checkpoints]),
        components=first.components,
        untrained={name for each in checkpoints for name in each.untrained},
    )


class _MeanWeights:
    """Means of weights, in the types in which the first of them stores them."""

    def __init__(self, weights: Sequence[Weights]) -> None:
        self._weights = weights

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.float()) for name, tensor in self.stored(component))

    def stored(self, component: str) -> Iterator[tuple[str, Tensor]]:
        every = [stored_tensors(weights, component) for weights in self._weights]
        for same_place in zip_longest(*every, fillvalue=("", torch.empty(0))):
            names, tensors = zip(*same_place, strict=True)
            if len(set(names)) > 1 or len({tensor.shape for tensor in tensors}) > 1:
                name = min(filter(None, names))  # in the order of names, what the others are past
                raise CheckpointError(f"{component}: {name} is not the same tensor in all checkpoints; copy them again")
            yield names[0], _mean(f"{component}/{names[0]}", tensors)


def _mean(name: str, tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    if all(torch.equal(first, other) for other in tensors[1:]):
        return first
    if not first.is_floating_point():
        raise UsageError(f"CHECKPOINT: {name}: integers that differ have no mean; average other checkpoints")
    return torch.stack([tensor.float() for tensor in tensors]).mean(0).to(first.dtype)
