"""The best of several tries, chosen by the language model that wrote them.

Contract: what is written from a prompt is judged by how likely the model would write the prompt after it. A model that
was trained in both orders, text before pictures and after them (training notes of the specification), can do both, and
the second is the easier: which of two shapes goes which way is sooner read than drawn. Weights of the tries' own
likelihood are not added. A try without a single visual token is never preferred to one that has some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from runtime.context import Context
from runtime.sampling import log_softmax
from runtime.vocabulary import EOS

if TYPE_CHECKING:
    from runtime.decoder import Embed
    from runtime.engines import LanguageModelEngine

T = TypeVar("T")


def best(tries: Iterable[T], likelihood: Callable[[T], float]) -> T:
    """The likeliest of `tries`, the first among equals; at least one is needed. A single one is not judged."""
    first, *others = tries
    if not others:
        return first
    return max([first, *others], key=likelihood)


def prompt_likelihood(
    engine: LanguageModelEngine, embed: Embed, context: Context, seen: Sequence[int], prompt: Sequence[int]
) -> float:
    """Log-probability, in nats, of the text `prompt` and its end after `seen`, which stands at position 0.

    Args:
        embed: ids [B, S] int64 -> embeddings [B, S, D].
        context: of the engine; holds the row that was judged afterwards.
        seen: ids of a picture or a clip with their markers.
        prompt: text ids without begin or end.
    """
    total = 0.0
    logits = context.read(engine, [embed(np.array([seen]))[0]], len(seen) + len(prompt), len(seen) + len(prompt))
    for count, word in enumerate([*prompt, EOS], 1):
        total += float(log_softmax(logits[0].astype(np.float64))[word])
        if count <= len(prompt):
            logits = context.append(engine, embed(np.array([[word]])))
    return total
