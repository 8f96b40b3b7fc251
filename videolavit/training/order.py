"""Which items a step sees, and the seeds of what it draws.

Contract: both are pure functions of the seed and of where the run stands, so nothing of them has to be saved. Items
come in one endless sequence: a new permutation of the data in every epoch, cut into batches in turn over the processes.
Two processes with a batch of 4 each see in every step what one process with a batch of 8 sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch


def derived_seed(*parts: object) -> int:
    """A seed of 56 bits that depends on all `parts`."""
    key = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(key[:7], "big")


class Batches:
    """Index lists of one process, to be used as the batch sampler of a DataLoader.

    Args:
        items: size of the data.
        seed: decides the permutations.
        batch_size: items per batch.
        start: items that all processes together have used before.
        count: batches to give.
        process, processes: whose batches these are.
    """

    def __init__(
        self, items: int, *, seed: int, batch_size: int, start: int, count: int, process: int = 0, processes: int = 1
    ) -> None:
        self._items = items
        self._seed = seed
        self._batch_size = batch_size
        self._start = start + process * batch_size
        self._stride = batch_size * processes
        self._count = count
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self._count):
            first = self._start + batch * self._stride
            yield [self._item(position) for position in range(first, first + self._batch_size)]

    def _item(self, position: int) -> int:
        epoch, place = divmod(position, self._items)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derived_seed(self._seed, "epoch", epoch))
            self._epoch, self._permutation = epoch, torch.randperm(self._items, generator=generator)
        return int(self._permutation[place])
