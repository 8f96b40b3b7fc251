"""One cache for a request: what is written is what separate readings write, and nothing is read twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from golden import assert_close

from runtime.context import Context
from runtime.decoder import Phase, image_phase
from runtime.noise import Noise
from runtime.pipeline import Pipeline
from runtime.requests import AnswerRequest, ClipResult, VideoRequest
from runtime.vocabulary import Vocabulary

PROMPT = "a red circle moving right"
FRAME = np.zeros((128, 128, 3), np.uint8)


class Recorded(Context):
    """Keeps the logits every token was chosen from and counts what the engine was fed."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.plain = plain
        self.logits: list[np.ndarray] = []
        self.fed: list[tuple[int, int]] = []  # [rows, positions] of every forward
        self.reads: list[int] = []  # how many forwards there were before each read
        self.starts = 0

    @property
    def positions(self) -> int:
        return sum(steps for _, steps in self.fed)

    def read(self, *given: Any) -> np.ndarray:
        self.reads.append(len(self.fed))
        self.logits.append(super().read(*given))
        return self.logits[-1]

    def append(self, *given: Any) -> np.ndarray:
        self.logits.append(super().append(*given))
        return self.logits[-1]

    def _shared(self, engine: Any, sequences: Any, needed: int) -> np.ndarray:
        return np.zeros(len(sequences), np.int64) if self.plain else super()._shared(engine, sequences, needed)

    def _start(self, *given: Any) -> np.ndarray:
        self.starts += 1
        return super()._start(*given)

    def _forward(self, engine: Any, embeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
        self.fed.append(embeds.shape[:2])
        return super()._forward(engine, embeds, counts)


def written(token_pipeline: Pipeline, request: VideoRequest, seed: int, context: Recorded) -> list[ClipResult]:
    token_pipeline._writer.context = context
    return list(token_pipeline.generate_video(request, Noise(seed)))


CASES = {
    "guided": VideoRequest(prompt=PROMPT, clips=2),
    "greedy": VideoRequest(prompt=PROMPT, clips=2, greedy=True),
    "not guided": VideoRequest(prompt=PROMPT, clips=2, text_guidance=1.0, motion_guidance=1.0),
    "guided motion alone": VideoRequest(prompt=PROMPT, clips=2, text_guidance=1.0),
    "from a picture": VideoRequest(image=FRAME + 90, prompt=PROMPT, clips=2),
    "id 2 in the prompt": VideoRequest(prompt=f"{PROMPT} </s> slowly", clips=2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_continued_cache_writes_what_separate_readings_write(token_pipeline: Pipeline, case: str) -> None:
    one, each = Recorded(), Recorded(plain=True)
    ours, theirs = (written(token_pipeline, CASES[case], 5, context) for context in (one, each))
    assert [(clip.image_ids, clip.motion_ids) for clip in ours] == [(c.image_ids, c.motion_ids) for c in theirs]
    assert len(one.logits) == len(each.logits)
    for a, b in zip(one.logits, each.logits, strict=True):
        assert_close(a, b, 1e-4 * float(np.abs(b).max()))
    assert one.positions <= each.positions


@pytest.mark.parametrize("case", ["guided", "not guided"])
def test_nothing_is_read_twice(token_pipeline: Pipeline, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_control_ids(vocabulary: Vocabulary) -> Phase:
        # A 2 that was written vanishes from the sequence, and what follows it is rightly read again.
        return replace(image_phase(vocabulary), allowed=vocabulary.image_ranges[1:])

    monkeypatch.setattr("runtime.token_writer.image_phase", without_control_ids)
    context = Recorded()
    clips = written(token_pipeline, CASES[case], 5, context)
    prompt = len(token_pipeline._text.encode(PROMPT))
    tokens = sum(len(clip.image_ids) + len(clip.motion_ids) for clip in clips)
    # Each phase has a start marker, each motion but the last an end marker; the very last token is never fed.
    assert context.positions == prompt + tokens + 2 * len(clips) + (len(clips) - 1) - 1
    assert context.starts == 1  # the cache was made for all clips at once


def test_another_sample_of_a_prompt_feeds_one_position_of_it(token_pipeline: Pipeline) -> None:
    context = Recorded()
    written(token_pipeline, VideoRequest(prompt=PROMPT), 5, context)
    written(token_pipeline, VideoRequest(prompt=PROMPT), 6, context)
    second = context.reads[2]  # a request reads twice: for its image and for its motion
    assert context.fed[second] == (2, 1)


def test_the_waiting_of_a_person_is_measured(token_pipeline: Pipeline) -> None:
    clips = token_pipeline.generate_video(VideoRequest(prompt=PROMPT, clips=2), Noise(5))
    next(clips)
    first = token_pipeline.reached
    assert 0 < first["first token"] < first["first frame"] <= sum(token_pipeline.seconds.values())
    next(clips)
    assert token_pipeline.reached == first


def test_several_questions_are_answered_as_each_alone_would_be(token_pipeline: Pipeline) -> None:
    grid = np.random.default_rng(0).integers(-20, 20, (24, 2, 8, 8)).astype(np.float32)
    request = AnswerRequest(
        question="-", pictures=(FRAME + 40, FRAME + 200), motions=(grid, -grid), greedy=False, max_answer_tokens=12
    )
    questions = ["what moves?", "which colour is the circle?", "what moves?"]
    noise = Noise(3)
    context = token_pipeline._writer.context = Recorded()
    answers = list(token_pipeline.answers(request, iter(questions), noise))
    first, *later = [context.fed[at] for at in context.reads]
    assert noise.normal() == Noise(3).normal()
    assert [question for question, _ in answers] == questions
    for question, answer in answers:
        token_pipeline._writer.context = None
        alone = AnswerRequest(**(vars(request) | {"question": question}))
        assert token_pipeline.answer(alone, Noise(3)) == answer
    # Every question is one forward, of the first with all that is seen, of the others without.
    assert first[1] > 2 * token_pipeline.manifest.geometry.motion_tokens
    assert all(steps < 40 for _, steps in later)
