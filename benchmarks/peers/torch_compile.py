"""Torch, compiled: transformers' Llama with a cache of fixed length, compiled for the length of one token.

The prompt is read by the model as it is; its length would be compiled anew each time.
"""

from __future__ import annotations

from typing import Any

from peers import torch_eager
from peers.protocol import Setting, Stepwise

LIBRARY = "transformers"
PRECISIONS = ("fp32",)


class Peer(Stepwise):
    """A fixed cache is read whole for every token: it is as long as the longest sequence."""

    def prepare(self, setting: Setting) -> None:
        import torch
        from transformers import StaticCache

        self._torch = torch
        self._model = torch_eager.load(setting)
        self._cache: Any = StaticCache(config=self._model.config, max_cache_len=setting.capacity)
        self._compiled = torch.compile(self._model.forward, dynamic=False)
        self._length = 0

    def prefill(self, ids: list[int]) -> int:
        with self._torch.inference_mode():  # in which the cache was made
            self._cache.reset()
        self._length = 0
        return self._next(self._model.forward, ids)

    def decode_step(self, token: int) -> int:
        return self._next(self._compiled, [token])

    def rewind(self, length: int) -> None:
        self._length = length
        # What lies behind is overwritten before it is looked at; the cache counts for itself where it writes.
        with self._torch.inference_mode():
            for layer in self._cache.layers:
                layer.cumulative_length.fill_(length)

    def _next(self, forward: Any, ids: list[int]) -> int:
        torch = self._torch
        places = torch.arange(self._length, self._length + len(ids))
        with torch.inference_mode():
            output = forward(
                input_ids=torch.tensor([ids]),
                position_ids=places[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._length += len(ids)
        return int(output.logits[0, -1].argmax())
