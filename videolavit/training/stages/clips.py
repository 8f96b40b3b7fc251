"""Clips of a tokenised folder as training items, one clip an item.

Contract: item i is a pure function of (folder, seed, i). Of an item with several clips, seed and number choose one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from runtime.errors import UsageError
from runtime.motion.grid import model_motion
from videolavit.training.data import Source
from videolavit.training.data.tokenized import TokenizedDataset
from videolavit.training.settings import DataSettings, Share


class More(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A second tokenised folder, for example of pictures or of long videos, and its share of the items or rows."""

    path: str
    share: Share


def check_shares(more: Sequence[More]) -> None:
    """Raises UsageError when the shares of `options.more` leave less than nothing to the first folder."""
    if sum(other.share for other in more) > 1:
        raise UsageError("options.more: the shares are more than 1 in all")


class TokenizedClips(Dataset[dict[str, Tensor]]):
    """The wanted `fields` of one clip per item, without their leading axis.

    Args:
        instead: by name of a further field, the one of `fields` whose values stand for it.
    """

    def __init__(
        self, items: TokenizedDataset, fields: tuple[str, ...], seed: int, instead: Mapping[str, str] | None = None
    ) -> None:
        self.items, self.fields, self.seed, self.instead = items, fields, seed, instead or {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.items[index]
        clips = len(item[self.fields[0]])
        if not clips:
            raise UsageError(f"{self.items.folder}: item {index} is a picture; this stage takes folders of videos only")
        chosen = int(np.random.default_rng([self.seed, index]).integers(clips))
        values = {name: item[name][chosen] for name in self.fields}
        return values | {name: values[other] for name, other in self.instead.items()}


def give_way(items: Any, more: Sequence[tuple[Any, float]], drawn: float) -> Any:
    """`items`, or those of `more` in whose share of [0, 1) the number `drawn` lies."""
    for others, share in more:
        if 0 <= drawn < share:
            return others
        drawn -= share
    return items


class Mixed(Dataset[dict[str, Tensor]]):
    """The items of `first`, a share of which give way to items of others, by lot but always the same."""

    def __init__(self, first: Dataset[Any], more: Sequence[tuple[Dataset[Any], float]], seed: int) -> None:
        self.first, self.more, self.seed = first, tuple(more), seed

    def __len__(self) -> int:
        return len(self.first)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        drawn, other = np.random.default_rng([self.seed, index]).random(2)
        items = give_way(self.first, self.more, drawn)
        return items[index if items is self.first else int(other * len(items))]


class MotionFields(Dataset[dict[str, Tensor]]):
    """The motion of a raw source's clips on the tokenizer's grid: "motion" [2, T, rows, columns]."""

    def __init__(self, source: Source, grid: tuple[int, int], seed: int) -> None:
        self.source, self.grid, self.seed = source, grid, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        _, grids = self.source.clip(index).per_clip()
        chosen = int(np.random.default_rng([self.seed, index]).integers(len(grids)))
        return {"motion": torch.from_numpy(model_motion(grids[chosen], self.grid))}


def tokenized_folder(data: DataSettings, fields: tuple[str, ...], stage: str) -> Path:
    """The tokenised folder that `data` names for `stage`, which reads `fields`.

    Raises UsageError when `data` names another kind of source or no path.
    """
    if data.source != "tokenized" or data.path is None:
        raise UsageError(
            f'data.source {data.source}: {stage} trains on a tokenised folder (source = "tokenized" and its path); '
            f"make one with `videolavit tokenize SOURCE -o FOLDER --checkpoint DIR --fields {','.join(fields)}`"
        )
    return Path(data.path)


def open_tokenized(data: DataSettings, fields: tuple[str, ...], stage: str) -> TokenizedDataset:
    """`fields` of that folder; also raises DataError when it lacks one."""
    return TokenizedDataset(tokenized_folder(data, fields, stage), fields)


def stacked(dataset: Any, count: int) -> dict[str, Tensor]:
    """The first `count` items of `dataset`, stacked: fields [N, ...]."""
    items = [dataset[index] for index in range(min(count, len(dataset)))]
    return torch.utils.data.default_collate(items)
