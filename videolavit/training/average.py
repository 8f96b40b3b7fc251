"""The running average of the weights, which is what a run publishes when it keeps one.

Contract: parameters are averaged by diffusers' EMAModel, whose decay rises to the one that is set over the first steps
(at most (1 + n) / (10 + n) after n updates); buffers follow the module as they are, since codebooks are averages
already. All of it is elementwise, so it works on the shards of FSDP as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from torch import Tensor, nn


class Average:
    """Running average of the weights of `module`."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self._module = module
        self._average = EMAModel(self._tensors(), decay=decay)

    def _tensors(self) -> list[Tensor]:
        return list(chain(self._module.parameters(), self._module.buffers()))

    @property
    def updates(self) -> int:
        count: int = self._average.optimization_step
        return count

    def update(self) -> None:
        """Take in the weights after a step."""
        self._average.step(self._tensors())

    def restore(self, updates: int) -> None:
        """Go on from what the module holds now, which is an average of `updates` updates."""
        self._average.shadow_params = [tensor.detach().clone() for tensor in self._tensors()]
        self._average.optimization_step = updates

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the module holds the average."""
        self._average.store(self._tensors())
        self._average.copy_to(self._tensors())
        try:
            yield
        finally:
            self._average.restore(self._tensors())
