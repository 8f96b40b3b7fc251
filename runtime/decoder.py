"""The token generation loop.

Contract: `generate` yields one `Step` per token; the language model reads what its cache does not hold yet and is
then fed one position per step. With guidance, conditional and unconditional rows go through one forward of 2B rows
(reference semantics §10.4). Prompts are embeddings, so pictures and text look the same here; the start marker of a
phase is appended by `generate`. A row that has finished is fed the pad id, as in the reference, and its tokens read
pad.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from runtime import sampling
from runtime.context import Context
from runtime.errors import UsageError
from runtime.noise import Noise, Streams
from runtime.vocabulary import EOS, Vocabulary

if TYPE_CHECKING:
    from runtime.engines import LanguageModelEngine

PAD = EOS  # the generation model pads with the id of `</s>` (§10.1)

Embed = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Phase:
    """What is being written.

    Attributes:
        allowed: ids that may be generated.
        codes: the allowed ids that carry content; an exact number of tokens is drawn from these alone.
        start: id appended to every prompt, or None.
        eos: id that ends a row.
        pad: id fed to rows that have finished.
    """

    allowed: tuple[range, ...]
    codes: tuple[range, ...]
    start: int | None
    eos: int
    pad: int = PAD


def image_phase(vocabulary: Vocabulary) -> Phase:
    """Visual tokens until the end marker (§10.2)."""
    codes = range(vocabulary.first_visual, vocabulary.motion_start)
    return Phase(vocabulary.image_ranges, (codes,), vocabulary.image_start, vocabulary.image_end)


def motion_phase(vocabulary: Vocabulary) -> Phase:
    """Motion tokens until the end marker, or an exact number (§10.3)."""
    codes = range(vocabulary.first_motion, vocabulary.size)
    return Phase(vocabulary.motion_ranges, (codes,), vocabulary.motion_start, vocabulary.motion_end)


def text_phase(vocabulary: Vocabulary) -> Phase:
    """An answer in text until `</s>` (§13.3)."""
    return Phase(vocabulary.text_ranges, vocabulary.text_ranges, None, EOS)


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How tokens are chosen (§10.4).

    Attributes:
        max_new, min_new: bounds on the tokens of a row, end marker included.
        guidance: classifier-free guidance; 1 runs no unconditional rows.
        temperature, top_k, top_p: only for sampling; 1, 0 and 1 switch them off.
        greedy: take the best token instead of sampling.
        repetition_penalty: 1 is off; not together with guidance.
        exact: write exactly this many content tokens and nothing else; `max_new` and `min_new` are then ignored.
    """

    max_new: int
    min_new: int = 0
    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    repetition_penalty: float = 1.0
    exact: int | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """One generated token per row.

    Attributes:
        tokens: [B] int64; pad for rows that had finished before.
        finished: [B] bool, after this token.
        positions: [B] int64, of what was chosen among the allowed ids, also for rows that had finished.
        scores: [B, n] float32, processed scores of the allowed ids.
        elapsed: seconds this token took; the first one's include the prefill.
    """

    tokens: np.ndarray
    finished: np.ndarray
    positions: np.ndarray
    scores: np.ndarray
    elapsed: float

    @cached_property
    def logprobs(self) -> np.ndarray:
        """[B] float32, log-probability of what was chosen under the processed scores."""
        return np.take_along_axis(sampling.log_softmax(self.scores), self.positions[:, None], axis=-1)[:, 0]


def generate(
    engine: LanguageModelEngine,
    embed: Embed,
    prompts: Sequence[np.ndarray],
    phase: Phase,
    options: DecodingOptions,
    *,
    max_positions: int,
    noise: Noise | Streams | None = None,
    unconditional: Sequence[np.ndarray] | None = None,
    stop: Callable[[np.ndarray], bool] | None = None,
    context: Context | None = None,
    reserve: int = 0,
) -> Iterator[Step]:
    """Write tokens after `prompts` until every row has finished or the budget is spent.

    Args:
        embed: ids [B, S] int64 -> embeddings [B, S, D].
        prompts: one [L_i, D] float32 per row, without the phase's start marker.
        max_positions: longest sequence the language model was made for.
        noise: source of the draws; needed unless greedy.
        unconditional: ids [L_i] per row for the unconditional rows, complete with start marker (quirk 11). None
            means the start marker alone. Not read when guidance is 1.
        stop: told a row's generated ids [t]; True ends the row.
        context: what earlier calls left in the engine's cache; None starts with an empty one.
        reserve: positions a new cache is made for, where the prompts and the new tokens need fewer.

    Raises UsageError when a prompt does not fit, or options contradict each other.
    """
    rows = len(prompts)
    budget = options.max_new if options.exact is None else options.exact
    allowed = sampling.AllowedTokens(phase.allowed if options.exact is None else phase.codes)
    process = _processors(allowed, phase, options)
    sample = _sampler(options, noise)

    sequences = _with_start(embed, prompts, phase)
    if options.guidance != 1:
        sequences += _unconditional(embed, rows, phase, unconditional)
    longest = max(len(sequence) for sequence in sequences)
    # The last token is chosen from the position before it and never fed back.
    room = max_positions - longest + 1
    if room < (1 if options.exact is None else budget):
        raise UsageError(
            f"prompt of {longest} positions leaves room for {max(room, 0)} new tokens of the {budget} wanted; "
            f"the language model has {max_positions} positions, so shorten the prompt"
        )
    budget = min(budget, room)

    began = time.perf_counter()
    context = Context() if context is None else context
    needed = min(longest + budget, max_positions)
    capacity = max(needed, min(reserve, max_positions))
    logits = context.read(engine, sequences, needed, capacity)  # [R, V], R = B or 2B
    generated = np.zeros((rows, 0), dtype=np.int64)
    finished = np.zeros(rows, dtype=bool)
    for count in range(1, budget + 1):
        scores = sampling.apply(process, allowed.take(logits), generated)  # [B, n]
        positions = sample(scores)  # [B]
        tokens = np.where(finished, phase.pad, allowed.ids[positions])
        generated = np.concatenate([generated, tokens[:, None]], axis=1)
        if options.exact is None:
            finished = finished | (tokens == phase.eos)
            if stop is not None:
                finished = finished | np.array([stop(row) for row in generated])
        else:
            finished = np.full(rows, count == budget)
        yield Step(tokens, finished, positions, scores, time.perf_counter() - began)
        if finished.all() or count == budget:
            return
        began = time.perf_counter()
        embeds = np.tile(embed(tokens[:, None]), (len(sequences) // rows, 1, 1))  # [R, 1, D]
        logits = context.append(engine, embeds)


def collect(steps: Iterable[Step]) -> np.ndarray:
    """All tokens of a generation: [B, t] int64, pad after a row's end."""
    return np.stack([step.tokens for step in steps], axis=1)


def strip_pad(ids: Iterable[int]) -> list[int]:
    """`ids` without the pad id, wherever it stands (quirk 10, as the reference does)."""
    return [int(token) for token in ids if token != PAD]


def _processors(
    allowed: sampling.AllowedTokens, phase: Phase, options: DecodingOptions
) -> tuple[sampling.Processor, ...]:
    exact, greedy = options.exact is not None, options.greedy
    return sampling.processors(
        allowed,
        eos=None if exact else phase.eos,
        guidance=options.guidance,
        repetition_penalty=options.repetition_penalty,
        min_new=options.min_new,
        temperature=1.0 if greedy else options.temperature,
        top_k=0 if greedy else options.top_k,
        top_p=1.0 if greedy else options.top_p,
    )


def _sampler(options: DecodingOptions, noise: Noise | Streams | None) -> sampling.Sampler:
    if options.greedy:
        return sampling.Greedy()
    if noise is None:
        raise UsageError("sampling needs a source of noise; pass one or choose greedy decoding")
    return sampling.Multinomial(noise)


def _with_start(embed: Embed, prompts: Sequence[np.ndarray], phase: Phase) -> list[np.ndarray]:
    if phase.start is None:
        return list(prompts)
    start = embed(np.array([[phase.start]]))[0]  # [1, D]
    return [np.concatenate([prompt, start]) for prompt in prompts]


def _unconditional(embed: Embed, rows: int, phase: Phase, given: Sequence[np.ndarray] | None) -> list[np.ndarray]:
    """Contexts of the unconditional rows: `rows` arrays [L_i, D]."""
    if given is None:
        if phase.start is None:
            raise UsageError("guidance needs an unconditional context where a phase has no start marker")
        given = [np.array([phase.start])] * rows
    if len(given) != rows:
        raise UsageError(f"{len(given)} unconditional contexts for {rows} prompts; give one for each")
    return [embed(np.asarray(ids, dtype=np.int64)[None])[0] for ids in given]
