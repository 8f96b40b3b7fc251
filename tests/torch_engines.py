"""Torch modules behind the runtime's engine contract, for tests.

Contract: slow and plain on purpose. `TorchLanguageModel` keeps no KV cache: it recomputes every row from its
first position at each step, so it judges engines that do keep one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from golden import Golden

from export.fidelity.backends import TorchLanguageModel as CachelessLanguageModel


class TorchEngine:
    """`fn` (keyword tensors -> dict of tensors) as an engine; inputs arrive with the dtype they were given in."""

    def __init__(self, fn: Callable[..., dict[str, torch.Tensor]]) -> None:
        self.fn = fn
        self.held: dict[str, np.ndarray] = {}

    def hold(self, **inputs: np.ndarray) -> None:
        self.held.update(inputs)

    @torch.inference_mode()
    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        tensors = {name: torch.tensor(value) for name, value in (self.held | inputs).items()}
        return {name: value.numpy() for name, value in self.fn(**tensors).items()}

    def close(self) -> None:
        self.held = {}


class TorchLanguageModel(CachelessLanguageModel):
    """One that embeds ids too and keeps to the capacity it was started with."""

    def __init__(self, llama: Any) -> None:
        super().__init__(llama)
        self.llama = llama
        self.capacity = 0

    def start(self, rows: int, capacity: int) -> None:
        super().start(rows, capacity)
        self.capacity = capacity

    def forward(self, embeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
        logits = super().forward(embeds, counts)
        if self.lengths.max() > self.capacity:
            raise RuntimeError(f"{self.lengths.max()} positions, but the cache was started for {self.capacity}")
        return logits

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Token embeddings: ids [B, S] -> [B, S, D]."""
        return self.llama.model.embed_tokens.weight.detach().numpy()[ids]


def golden_llama(golden: Golden) -> Any:
    """The small Llama of a golden case. Its two big tables are stored as sums of short ones (`crt` in the metadata)."""
    config = golden.meta["config"].get("llama", golden.meta["config"])
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, tie_word_embeddings=False))
    ids = np.arange(config["vocab_size"])

    def table(name: str, *periods: int) -> torch.Tensor:
        return torch.from_numpy(sum(golden.weights[f"{name}/mod{period}"][ids % period] for period in periods))

    head = table("lm_head.weight", 251, 269)
    if "lm_head.override_ids" in golden.weights:
        head[golden.weights["lm_head.override_ids"]] = torch.from_numpy(golden.weights["lm_head.override_rows"])
    else:
        head[640:32000] = 0
    state = {"lm_head.weight": head, "model.embed_tokens.weight": table("model.embed_tokens.weight", 257, 263)}
    for name, value in golden.weights.items():
        if name.startswith(("model.layers.", "model.norm.")):
            state[name] = torch.from_numpy(value)
    llama.load_state_dict(state, strict=True)
    return llama.eval()
