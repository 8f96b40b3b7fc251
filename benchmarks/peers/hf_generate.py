"""transformers' own `generate`, the loop most people use."""

from __future__ import annotations

from typing import Any

from peers import torch_eager
from peers.protocol import Setting

LIBRARY = "transformers"
PRECISIONS = ("fp32",)


class Peer:
    """Every call goes on from the cache that the prompt was read into."""

    def convert(self, setting: Setting) -> None:
        """Nothing to write."""

    def prepare(self, setting: Setting) -> None:
        import torch

        self._torch = torch
        self._model = torch_eager.load(setting)
        self._cache: Any = None
        self._ids: list[int] = []

    def prefill(self, ids: list[int]) -> int:
        from transformers import DynamicCache

        self._cache = DynamicCache()
        return self._generate(ids, 1)[0]

    def decode(self, token: int, count: int) -> list[int]:
        return self._generate([*self._ids, token], count)

    def rewind(self, length: int) -> None:
        torch_eager.crop(self._cache, length)
        self._ids = self._ids[:length]

    def _generate(self, ids: list[int], count: int) -> list[int]:
        """`ids` are all of the sequence, of which the cache holds the beginning."""
        written = self._model.generate(
            input_ids=self._torch.tensor([ids]),
            attention_mask=self._torch.ones((1, len(ids)), dtype=self._torch.int64),
            past_key_values=self._cache,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )[0].tolist()
        self._ids = written[:-1]  # the last one was not fed back
        return written[len(ids) :]
