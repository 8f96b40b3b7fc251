"""How a token is chosen: allowed ids, score processors and samplers.

Contract: `AllowedTokens.take` cuts the scores of the ids that may be generated out of the logits, and everything
after it works on that slice [B, n]; suppressing the other ids needs no further step. A processor is called with
(scores, generated ids [B, t]) and returns new scores [B, n]; nothing is changed in place. `processors` lists them
in the reference's order (reference semantics §10.4): guidance, repetition penalty, minimum length, temperature,
top-k, top-p. A sampler turns scores into one position of the slice per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from runtime.errors import UsageError
from runtime.noise import Noise, Streams

Processor = Callable[[np.ndarray, np.ndarray], np.ndarray]
Sampler = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class AllowedTokens:
    """Ids that may be generated, as ascending ranges without overlap."""

    ranges: tuple[range, ...]

    @cached_property
    def ids(self) -> np.ndarray:
        """Token id at each position of the slice: [n] int64."""
        return np.concatenate([np.arange(r.start, r.stop, dtype=np.int64) for r in self.ranges])

    def take(self, logits: np.ndarray) -> np.ndarray:
        """Scores of the allowed ids: logits [B, V] -> [B, n]."""
        return np.concatenate([logits[:, r.start : r.stop] for r in self.ranges], axis=-1)

    def position(self, token: int) -> int:
        """Position of `token` in the slice. Raises UsageError when it is not allowed."""
        before = 0
        for r in self.ranges:
            if token in r:
                return before + token - r.start
            before += len(r)
        raise UsageError(f"token id {token} is not among the ids that may be generated")


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """Rows [conditional..., unconditional...] [2B, n] -> guided scores [B, n].

    The reference guides log-probabilities over the whole vocabulary. Their normalisers add one constant per row,
    which no later processor or sampler can see, so the slice is enough.
    """

    scale: float

    def __call__(self, scores: np.ndarray, generated: np.ndarray) -> np.ndarray:
        conditional, unconditional = np.split(scores, 2)  # [B, n] each
        return unconditional + self.scale * (conditional - unconditional)


@dataclass(frozen=True)
class RepetitionPenalty:
    """Makes ids that were generated before less likely: positive scores are divided, negative ones multiplied.

    Only generated ids count (quirk 17, fixed: the reference also indexes with the placeholders of pictures). The
    sign matters, so scores must be raw logits, not guided ones.
    """

    penalty: float
    allowed: AllowedTokens

    def __call__(self, scores: np.ndarray, generated: np.ndarray) -> np.ndarray:
        positions = np.searchsorted(self.allowed.ids, generated).clip(max=scores.shape[-1] - 1)  # [B, t]
        rows, columns = np.nonzero(self.allowed.ids[positions] == generated)
        seen = np.zeros(scores.shape, dtype=bool)
        seen[rows, positions[rows, columns]] = True
        punished = np.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return np.where(seen, punished, scores)


@dataclass(frozen=True)
class MinNewTokens:
    """Forbids the slice position `eos` while fewer than `count` tokens were generated."""

    eos: int
    count: int

    def __call__(self, scores: np.ndarray, generated: np.ndarray) -> np.ndarray:
        if generated.shape[1] >= self.count:
            return scores
        scores = scores.copy()
        scores[:, self.eos] = -np.inf
        return scores


@dataclass(frozen=True)
class Temperature:
    """Divides the scores by `value` > 0."""

    value: float

    def __call__(self, scores: np.ndarray, generated: np.ndarray) -> np.ndarray:
        return scores / self.value


@dataclass(frozen=True)
class TopK:
    """Keeps the scores that are at least the `k`-th highest of their row; ties with it stay."""

    k: int

    def __call__(self, scores: np.ndarray, generated: np.ndarray) -> np.ndarray:
        if self.k >= scores.shape[-1]:
            return scores
        lowest = np.partition(scores, -self.k, axis=-1)[:, -self.k, None]  # [B, 1]
        return np.where(scores < lowest, -np.inf, scores)


@dataclass(frozen=True)
class TopP:
    """Keeps the smallest set of most likely positions whose probability reaches `p`, at least one."""

    p: float

    def __call__(self, scores: np.ndarray, generated: np.ndarray) -> np.ndarray:
        order = np.argsort(scores, axis=-1, kind="stable")  # rising
        rising = np.take_along_axis(softmax(scores), order, axis=-1)
        dropped = np.cumsum(rising, axis=-1, dtype=np.float64) <= 1 - self.p
        dropped[:, -1] = False
        scores = scores.copy()
        np.put_along_axis(scores, order, np.where(dropped, -np.inf, np.take_along_axis(scores, order, -1)), axis=-1)
        return scores


@dataclass(frozen=True)
class Greedy:
    """The highest score; the lowest id among equals."""

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        return scores.argmax(axis=-1)


@dataclass(frozen=True)
class Multinomial:
    """A draw from the softmax of the scores."""

    noise: Noise | Streams

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        return self.noise.choice(softmax(scores))


def processors(
    allowed: AllowedTokens,
    *,
    eos: int | None,
    guidance: float = 1.0,
    repetition_penalty: float = 1.0,
    min_new: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Processor, ...]:
    """The processors these settings ask for, in order. Neutral values (the defaults) add no step.

    Raises UsageError for values that have no meaning: `eos` not allowed, temperature or penalty not above 0, a
    repetition penalty together with guidance.
    """
    for name, value in (("temperature", temperature), ("repetition penalty", repetition_penalty), ("top-p", top_p)):
        if value <= 0:
            raise UsageError(f"{name} {value}: must be above 0")
    if guidance != 1 and repetition_penalty != 1:
        raise UsageError(f"repetition penalty {repetition_penalty}: not defined for guided scores; use guidance 1")
    steps: list[Processor] = []
    if guidance != 1:
        steps.append(ClassifierFreeGuidance(guidance))
    if repetition_penalty != 1:
        steps.append(RepetitionPenalty(repetition_penalty, allowed))
    if eos is not None and min_new > 0:
        steps.append(MinNewTokens(allowed.position(eos), min_new))
    if temperature != 1:
        steps.append(Temperature(temperature))
    if top_k > 0:
        steps.append(TopK(top_k))
    if top_p < 1:
        steps.append(TopP(top_p))
    return tuple(steps)


def apply(steps: Iterable[Processor], scores: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """`scores` [B or 2B, n] through all processors: [B, n]. `generated` [B, t] int64."""
    for process in steps:
        scores = process(scores, generated)
    return scores


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis; -inf becomes 0."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities along the last axis; -inf stays."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
