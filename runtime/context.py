"""What the language model has in its cache, so that nothing is read twice.

Contract: `Context.read` is told whole sequences and feeds only what differs from the cache: the longest prefix a row
shares with it is kept, the rest of the row is forgotten. A phase that continues what an earlier one wrote, another
question about the same video and another sample of the same prompt therefore cost a few positions. Sequences are
compared as embeddings, so pictures and text are alike, and a row that changed in its middle is noticed.

Only one context may read with an engine at a time. It does not keep the engine in memory: one that was released and
loaded again is prefilled anew, and so is any engine that it did not read with last.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from runtime.engines import LanguageModelEngine

# Several rows with a past take one position at a time. Beyond this many a prefill of everything is the cheaper way.
STEPWISE = 8


class Context:
    """The cache of one engine at a time, R rows of up to C positions of width D."""

    def __init__(self) -> None:
        self._engine: weakref.ref[LanguageModelEngine] | None = None
        self._held = np.zeros((0, 0, 0), np.float32)  # [R, C, D] embeddings of the positions in the cache
        self._lengths = np.zeros(0, np.int64)  # [R] of which these many count

    def read(
        self, engine: LanguageModelEngine, sequences: Sequence[np.ndarray], needed: int, capacity: int
    ) -> np.ndarray:
        """Make the cache hold exactly `sequences` and return the logits [R, V] at the last position of each.

        Args:
            sequences: [L_i, D] float32 per row, at least one position each.
            needed: positions there must be room for.
            capacity: positions that a new cache is made for, where one is made; not less than `needed`.
        """
        kept = self._shared(engine, sequences, needed)
        new = np.array([len(sequence) for sequence in sequences]) - kept
        if not kept.any() or (len(sequences) > 1 and new.max() > STEPWISE):
            return self._start(engine, sequences, capacity)
        self._rewind(engine, kept)
        if len(sequences) == 1:
            return self._forward(engine, sequences[0][None, kept[0] :], new)
        return self._step_by_step(engine, sequences, kept)

    def append(self, engine: LanguageModelEngine, embeds: np.ndarray) -> np.ndarray:
        """One more position in every row, embeds [R, 1, D] float32, of what was read last; the logits [R, V]."""
        return self._forward(engine, embeds, np.ones(len(embeds), np.int64))

    def _shared(self, engine: LanguageModelEngine, sequences: Sequence[np.ndarray], needed: int) -> np.ndarray:
        """Positions of every row that stay, [R]; a row's last one is read again, for its logits."""
        kept = np.zeros(len(sequences), np.int64)
        rows, held, _ = self._held.shape
        if self._engine is None or self._engine() is not engine or rows != len(sequences) or held < needed:
            return kept
        for row, sequence in enumerate(sequences):
            most = min(self._lengths[row], len(sequence) - 1)
            same = (self._held[row, :most] == sequence[:most]).all(axis=-1)
            kept[row] = most if same.all() else same.argmin()
        return kept

    def _start(self, engine: LanguageModelEngine, sequences: Sequence[np.ndarray], capacity: int) -> np.ndarray:
        self._engine = None
        engine.start(len(sequences), capacity)
        self._engine = weakref.ref(engine)
        self._held = np.empty((len(sequences), capacity, sequences[0].shape[-1]), np.float32)
        self._lengths = np.zeros(len(sequences), np.int64)
        counts = np.array([len(sequence) for sequence in sequences], np.int64)
        batch = np.zeros((len(sequences), counts.max(), sequences[0].shape[-1]), np.float32)  # [R, L, D]
        for padded, sequence in zip(batch, sequences, strict=True):
            padded[: len(sequence)] = sequence
        return self._forward(engine, batch, counts)

    def _step_by_step(
        self, engine: LanguageModelEngine, sequences: Sequence[np.ndarray], kept: np.ndarray
    ) -> np.ndarray:
        """Feed what follows the `kept` positions, all rows ending in the last forward.

        A row whose turn has not come is fed its next position all the same, which is then taken back.
        """
        lengths = np.array([len(sequence) for sequence in sequences])
        for left in range(int((lengths - kept).max()) - 1, -1, -1):
            places = np.maximum(lengths - 1 - left, kept)
            embeds = np.stack([sequence[place] for sequence, place in zip(sequences, places, strict=True)])
            logits = self._forward(engine, embeds[:, None], np.ones(len(sequences), np.int64))
            self._rewind(engine, np.maximum(lengths - left, kept))
        return logits

    def _forward(self, engine: LanguageModelEngine, embeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
        logits = engine.forward(embeds, counts)
        for row, (length, count) in enumerate(zip(self._lengths, counts, strict=True)):
            self._held[row, length : length + count] = embeds[row, :count]
        self._lengths = self._lengths + counts
        return logits

    def _rewind(self, engine: LanguageModelEngine, lengths: np.ndarray) -> None:
        self._lengths = lengths
        engine.rewind(lengths)
