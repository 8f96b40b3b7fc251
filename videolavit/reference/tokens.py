"""Writing of token ids with transformers' `generate` (reference semantics §10.4, §13.3).

Contract: one row at a time. The order is guidance, shortest length, suppression, then for sampled tokens temperature,
top-k, top-p and the draw; a setting without effect adds no step. The draw comes from the caller's noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.noise import Noise
from runtime.vocabulary import EOS


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What may be written.

    Attributes:
        allowed: ids that can be chosen.
        end: id after which writing stops; it is part of what was written.
        least, most: bounds on the number of ids; `end` is impossible before `least`.
        guidance: scale of classifier-free guidance; 1 is none.
        sampling: (temperature, top-k, top-p), or None for the arg-max. Top-k 0 keeps every id.
    """

    allowed: Sequence[range]
    end: int
    least: int
    most: int
    guidance: float = 1.0
    sampling: tuple[float, int, float] | None = None


@torch.inference_mode()
def write(
    model: Any,
    prompt: Tensor,
    rules: Rules,
    noise: Noise,
    *,
    stop: Callable[[list[int]], bool] | None = None,
) -> list[int]:
    """New ids after `prompt`, `end` included.

    Args:
        model: a causal language model of transformers.
        prompt: ids [1, L] int64, or embeddings [1, L, D], which exclude guidance.
        stop: says after each id whether the new ids so far are enough.
    """
    allowed = torch.tensor(sorted(chain(*rules.allowed)), device=prompt.device)
    size = model.config.vocab_size
    suppressed = torch.ones(size, dtype=torch.bool, device=prompt.device).index_fill(0, allowed, False)
    config = GenerationConfig(
        do_sample=False,  # the draw is a processor of its own
        use_cache=True,
        eos_token_id=rules.end,
        pad_token_id=EOS,
        min_new_tokens=min(rules.least, rules.most),
        max_new_tokens=rules.most,
        guidance_scale=rules.guidance,
        suppress_tokens=suppressed.nonzero()[:, 0].tolist(),
    )
    embedded = prompt.ndim == 3
    given = {"inputs_embeds": prompt} if embedded else {"inputs": prompt}
    before = 0 if embedded else prompt.shape[1]  # generate gives back the ids it was given, not the embeddings
    ids = model.generate(
        **given,
        attention_mask=torch.ones(prompt.shape[:2], dtype=torch.int64, device=prompt.device),
        generation_config=config,
        logits_processor=_samplers(rules.sampling, allowed, noise),
        stopping_criteria=StoppingCriteriaList([] if stop is None else [_Stop(stop, before)]),
    )
    return ids[0, before:].tolist()


def _samplers(sampling: tuple[float, int, float] | None, allowed: Tensor, noise: Noise) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if sampling is None:
        return processors
    temperature, top_k, top_p = sampling
    if temperature != 1.0:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k > 0:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    processors.append(_Draw(allowed, noise))
    return processors


class _Draw(LogitsProcessor):
    """Draws an id and leaves it as the only possible one."""

    def __init__(self, allowed: Tensor, noise: Noise) -> None:
        self._allowed = allowed
        self._noise = noise

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [1, V] -> [1, V], 0 at the drawn id and minus infinity elsewhere."""
        probabilities = scores.softmax(dim=-1)[:, self._allowed]  # [1, n]
        drawn = self._noise.choice(probabilities.cpu().numpy())
        return torch.full_like(scores, -torch.inf).index_fill(1, self._allowed[drawn], 0.0)


class _Stop(StoppingCriteria):
    def __init__(self, enough: Callable[[list[int]], bool], before: int) -> None:
        self._enough = enough
        self._before = before

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.tensor([self._enough(input_ids[0, self._before :].tolist())], device=input_ids.device)
