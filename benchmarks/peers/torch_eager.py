"""Torch, eagerly: transformers' Llama, called once a token, with the cache that grows."""

from __future__ import annotations

from typing import Any

from peers.protocol import Setting, Stepwise

LIBRARY = "transformers"
PRECISIONS = ("fp32",)


class Peer(Stepwise):
    """No loop but ours, no guidance, no sampling: the fastest that torch is without a compiler."""

    def prepare(self, setting: Setting) -> None:
        import torch

        self.torch = torch
        self.model = load(setting)
        self._cache: Any = None

    def prefill(self, ids: list[int]) -> int:
        from transformers import DynamicCache

        self._cache = DynamicCache()
        return self._next(ids)

    def decode_step(self, token: int) -> int:
        return self._next([token])

    def rewind(self, length: int) -> None:
        crop(self._cache, length)

    def _next(self, ids: list[int]) -> int:
        torch = self.torch
        with torch.inference_mode():
            output = self.model(
                input_ids=torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
            return int(output.logits[0, -1].argmax())


def load(setting: Setting) -> Any:
    """The model in float32."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(setting.threads)
    return LlamaForCausalLM.from_pretrained(setting.folder, dtype=torch.float32, local_files_only=True).eval()


def crop(cache: Any, length: int) -> None:
    """Keep the first `length` positions of a cache that grows."""
    surplus = cache.get_seq_length() - length
    if surplus > 0:
        cache.crop(-surplus)
