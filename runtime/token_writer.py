"""Pictures, clips and answers as tokens of the language model.

Contract: what is written is written after ids, or after embeddings where pictures stand among them as features. The
language model goes on from what it read last (`runtime.context`). Where a request has several candidates they are
written in one batch, each with noise of its own, and the one is kept that the prompt is likeliest to be said of. Of
clips the pictures may be chosen first, so that motion is written after the likeliest alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from runtime.bundle import Manifest
from runtime.candidates import batched, prompt_likelihoods
from runtime.context import Context
from runtime.decoder import (
    DecodingOptions,
    Phase,
    Step,
    collect,
    generate,
    image_phase,
    motion_phase,
    strip_pad,
)
from runtime.engines import EngineSet
from runtime.noise import Noise, Streams
from runtime.progress import Observer, Progress, Stopwatch
from runtime.requests import Resolved

GENERATE = "generate"
Written = tuple[list[int], Any]  # image ids up to image_end, and motion codes [K] or None


class TokenWriter:
    """Writes with the language model of an engine set.

    Attributes:
        context: what the language model has read; None reads every sequence from its beginning.
    """

    def __init__(self, engines: EngineSet, manifest: Manifest, observer: Observer, watch: Stopwatch) -> None:
        self._engines, self._manifest, self._observer, self._watch = engines, manifest, observer, watch
        self._vocabulary, self._geometry = manifest.vocabulary, manifest.geometry
        self.context: Context | None = Context()

    def embed(self, ids: Sequence[Sequence[int]] | np.ndarray, task: str = GENERATE) -> np.ndarray:
        """Ids [B, S] -> embeddings [B, S, D]."""
        return self._engines.get("token_embedding", task)(ids=np.asarray(ids, dtype=np.int64))["embeds"]

    def images(self, sequence: list[int], settings: Resolved, noise: Noise, reserve: int = 0) -> list[list[int]]:
        """Image ids that follow `sequence`, up to and including image_end; every id 2 removed (quirk 10).

        As many times as there are candidates.
        """
        most = settings.max_image_tokens
        options = DecodingOptions(
            max_new=most,
            min_new=min(settings.min_image_tokens, most),
            guidance=settings.text_guidance,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            greedy=settings.greedy,
        )
        sequences = [sequence] * settings.candidates
        phase = image_phase(self._vocabulary)
        return [strip_pad(ids) for ids in self._write(sequences, phase, options, noise, "image tokens", reserve)]

    def motions(
        self, sequences: Sequence[list[int]], settings: Resolved, noise: Noise, reserve: int
    ) -> list[np.ndarray]:
        """Motion codes [K] that follow each of `sequences`: exactly as many as the geometry asks for."""
        count = self._geometry.motion_tokens
        options = DecodingOptions(
            max_new=count,
            min_new=0,
            guidance=settings.motion_guidance,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            greedy=settings.greedy or not settings.sampled_motion,
            exact=count,
        )
        written = self._write(sequences, motion_phase(self._vocabulary), options, noise, "motion tokens", reserve)
        return [self._vocabulary.motion_codes_of(ids, count) for ids in written]

    def clips(
        self,
        prompt: Sequence[int],
        sequence: list[int],
        image_ids: list[int] | None,
        settings: Resolved,
        noise: Noise,
        reserve: int,
    ) -> list[Written]:
        """The candidates for a clip after `sequence`; their image ids are written unless they are given.

        Of written pictures those are kept that `prompt` is likeliest to be said of, and given motion in turn.
        """
        if image_ids is not None:
            images = [image_ids] * settings.candidates
        else:
            images = self.images(sequence, settings, noise, reserve)
            if settings.kept_pictures:
                kept = self.likeliest(prompt, [(ids, None) for ids in images], settings.kept_pictures)
                images = [kept[index % len(kept)][0] for index in range(settings.candidates)]
        sequences = [self.with_image(sequence, ids) for ids in images]
        return list(zip(images, self.motions(sequences, settings, noise, reserve), strict=True))

    def with_image(self, sequence: list[int], image_ids: list[int]) -> list[int]:
        """Ids of a picture after `sequence`, its start marker in between."""
        # A control id in the user's own words is lost here too, as in the reference (quirk 10).
        return strip_pad([*sequence, self._vocabulary.image_start, *image_ids])

    def likeliest(self, prompt: Sequence[int], candidates: Sequence[Written], count: int) -> list[Written]:
        """The `count` candidates that the prompt is likeliest to be said of, the likeliest first; or fewer.

        One of each picture, and none without a visual token beside others.
        """
        if len(candidates) == 1:
            return list(candidates)
        found = self.likelihoods(prompt, candidates)
        kept: dict[tuple[int, ...], Written] = {}
        for index in np.argsort(-found, kind="stable"):
            if len(kept) == count or (kept and np.isneginf(found[index])):
                break
            kept.setdefault(tuple(candidates[index][0]), candidates[index])
        return list(kept.values())

    def likelihoods(self, prompt: Sequence[int], candidates: Sequence[Written]) -> np.ndarray:
        """How likely the prompt is after each candidate, [N]; minus infinity without a visual token."""
        seen = [
            [*self.with_image([], ids), *([] if codes is None else self._vocabulary.motion_span(codes))]
            for ids, codes in candidates
        ]
        context = Context() if self.context is None else self.context
        with self._watch.stage("choosing"):
            engine = self._engines.language_model(GENERATE)
            parts = batched(seen, engine.most_rows)
            found = [prompt_likelihoods(engine, self.embed, context, part, prompt) for part in parts]
        shown = [len(self._vocabulary.visual_codes_of(ids)) > 0 for ids, _ in candidates]
        return np.where(shown, np.concatenate(found), -np.inf)

    def _write(
        self,
        sequences: Sequence[list[int]],
        phase: Phase,
        options: DecodingOptions,
        noise: Noise,
        stage: str,
        reserve: int,
    ) -> list[list[int]]:
        """What follows each of `sequences`, with pads after its end; several have noise of their own each."""
        sources = [noise] if len(sequences) == 1 else noise.spawn(len(sequences))
        rows: list[list[int]] = []
        with self._watch.stage(stage):
            most = self._engines.language_model(GENERATE).most_rows
            if most is not None and options.guidance != 1:
                most //= 2  # each has an unconditional row beside it
            for part in batched(list(zip(sequences, sources, strict=True)), most):
                contexts = [self.embed([sequence])[0] for sequence, _ in part]
                streams = Streams([source for _, source in part])
                rows += collect(self.steps(contexts, phase, options, streams, stage, reserve=reserve)).tolist()
        return rows

    def steps(
        self,
        contexts: Sequence[np.ndarray],
        phase: Phase,
        options: DecodingOptions,
        noise: Noise | Streams,
        stage: str,
        task: str = GENERATE,
        stop: Callable[[np.ndarray], bool] | None = None,
        reserve: int = 0,
    ) -> Iterator[Step]:
        """Tokens that follow the embeddings `contexts`, [L, D] each, one a row at a time.

        `stop` is told all ids of a row so far; `reserve` is how many positions the request may come to.
        """
        steps = generate(
            self._engines.language_model(task),
            lambda ids: self.embed(ids, task),
            contexts,
            phase,
            options,
            max_positions=self._manifest.language_model.max_positions,
            noise=noise,
            stop=stop,
            context=self.context,
            reserve=reserve,
        )
        for count, step in enumerate(steps, 1):
            self._watch.reach("first token")
            self._observer(Progress(stage, count, options.exact))
            yield step
