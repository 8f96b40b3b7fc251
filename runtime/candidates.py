"""How likely the language model is to say a prompt of what it has written: the best of several tries is chosen by it.

Contract: text, the same for all rows, is read after pictures or clips, which stand at position 0. It takes a model that
was trained in both orders, text before what is seen and after it (training notes of the specification).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from runtime.context import Context
from runtime.sampling import log_softmax
from runtime.vocabulary import EOS

if TYPE_CHECKING:
    from runtime.decoder import Embed
    from runtime.engines import LanguageModelEngine

T = TypeVar("T")


def batched(items: Sequence[T], most: int | None) -> Iterator[Sequence[T]]:
    """`items` in runs of at most `most`, but of one at least; None: all at once."""
    size = len(items) if most is None else max(1, most)
    return (items[start : start + size] for start in range(0, len(items), size))


def prompt_likelihoods(
    engine: LanguageModelEngine, embed: Embed, context: Context, seen: Sequence[Sequence[int]], prompt: Sequence[int]
) -> np.ndarray:
    """Log-probability, in nats, of the text `prompt` and its end after each of `seen`: [B] float64.

    Args:
        embed: ids [B, S] int64 -> embeddings [B, S, D].
        context: of the engine; holds the rows that were judged afterwards.
        seen: ids of a picture or a clip with their markers, B of them.
        prompt: text ids without begin or end.
    """
    capacity = max(map(len, seen)) + len(prompt)
    logits = context.read(engine, [embed(np.array([ids]))[0] for ids in seen], capacity, capacity)  # [B, V]
    total = np.zeros(len(seen))
    for count, word in enumerate([*prompt, EOS], 1):
        total += log_softmax(logits.astype(np.float64))[:, word]
        if count <= len(prompt):
            logits = context.append(engine, embed(np.full((len(seen), 1), word)))
    return total
