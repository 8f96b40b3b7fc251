"""Several tries of which one is kept: which one, and that the runtime judges them as torch does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.candidates import batched
from runtime.errors import UsageError
from runtime.media_tokens import PictureTokens, VisualTokenizer
from runtime.noise import Noise, Streams
from runtime.pipeline import Pipeline
from runtime.recipe import command_line, make_recipe
from runtime.requests import ImageRequest, VideoRequest, resolve
from runtime.settings import TaskDefaults
from runtime.tokenizers import TextTokenizer
from videolavit.checkpoints import load
from videolavit.reference.pipeline import Reference

PROMPT = "a red circle moving right"
FRAME = np.zeros((128, 128, 3), np.uint8)
VIDEO = VideoRequest(prompt=PROMPT, candidates=4, sampled_motion=True)
IMAGE = ImageRequest(prompt=PROMPT, candidates=4)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path, token_pipeline: Pipeline) -> Reference:
    checkpoint = load(tiny_checkpoint)
    tokenizer = TextTokenizer(token_pipeline.bundle.file(token_pipeline.manifest.tokenizer))
    made: Any = Reference(checkpoint, checkpoint.config, tokenizer)
    made.decode_keyframe = lambda *given: (None, FRAME)
    made.decode_clip = lambda *given: (None, FRAME[None])
    return made


@pytest.fixture(scope="module")
def drawing(tiny_bundle: Path, tiny_checkpoint: Path) -> Iterator[tuple[Pipeline, Reference]]:
    """Runtime and torch that draw key frames; their clips have one frame, always the same."""
    checkpoint = load(tiny_checkpoint)
    frame = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    with Pipeline(tiny_bundle, threads=1) as opened:
        whole: Any = opened
        made: Any = Reference(checkpoint, checkpoint.config, TextTokenizer(whole.bundle.file(whole.manifest.tokenizer)))
        whole._videos = SimpleNamespace(decode=lambda *given: (None, frame[None]))
        made.decode_clip = lambda *given: (None, frame[None])
        yield opened, made


@given(st.lists(st.integers()), st.none() | st.integers(-2, 9))
def test_batches_hold_everything_in_order(items: list[int], most: int | None) -> None:
    parts = list(batched(items, most)) if items else []
    assert [item for part in parts for item in part] == items
    assert all(0 < len(part) <= max(1, most or len(items)) for part in parts)


def test_a_source_draws_the_same_whatever_stands_beside_it() -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(9), size=(50, 3))  # [draws, rows, N]
    together = Streams(Noise(1).spawn(3))
    drawn = np.stack([together.choice(rows) for rows in probabilities])  # [draws, rows]
    alone = Noise(1).spawn(3)[1]
    assert drawn[:, 1].tolist() == [int(alone.choice(rows[1:2])[0]) for rows in probabilities]
    assert len({tuple(column) for column in drawn.T}) == 3
    untouched, spawned = Noise(2), Noise(2)
    spawned.spawn(4)
    assert np.array_equal(untouched.normal(5), spawned.normal(5))


@pytest.mark.parametrize("seed", range(3))
def test_the_runtime_finds_a_clip_as_likely_as_torch_does(
    token_pipeline: Pipeline, reference: Reference, seed: int
) -> None:
    vocabulary, rng = token_pipeline.manifest.vocabulary, np.random.default_rng(seed)
    image = [*rng.integers(vocabulary.first_visual, vocabulary.motion_start, 5).tolist(), vocabulary.image_end]
    codes = rng.integers(0, vocabulary.motion_codes, token_pipeline.manifest.geometry.motion_tokens)
    settings = resolve(VIDEO, token_pipeline.manifest.geometry, token_pipeline.manifest.defaults)
    for given_codes, ids in ((None, None), (codes, (codes + vocabulary.first_motion).tolist())):
        (ours,) = token_pipeline._writer.likelihoods(token_pipeline._prompt_ids(PROMPT), [(image, given_codes)])
        assert ours == pytest.approx(reference.likelihood(settings, image, ids), abs=1e-3)
        assert ours < 0


def test_a_try_without_a_picture_is_never_preferred(token_pipeline: Pipeline) -> None:
    vocabulary, prompt = token_pipeline.manifest.vocabulary, token_pipeline._prompt_ids(PROMPT)
    empty, shown = [vocabulary.image_end], [vocabulary.first_visual, vocabulary.image_end]
    assert np.isneginf(token_pipeline._writer.likelihoods(prompt, [(empty, None), (shown, None)])).tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize("most_rows", [None, 2, 1])
def test_the_clip_that_is_kept_is_the_likeliest_of_those_written(
    token_pipeline: Pipeline, most_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = resolve(VIDEO, token_pipeline.manifest.geometry, token_pipeline.manifest.defaults)
    prompt = token_pipeline._prompt_ids(PROMPT)
    tries = token_pipeline._writer.clips(prompt, prompt, None, settings, Noise(5), 0)
    likelihoods = token_pipeline._writer.likelihoods(prompt, tries)
    assert len(tries) == 4 and len(set(likelihoods.tolist())) > 1  # they differ, or the choice would mean nothing
    image_ids, codes = tries[int(np.argmax(likelihoods))]
    # An engine that takes fewer rows at once writes the same.
    monkeypatch.setattr(token_pipeline._engines.language_model("generate"), "most_rows", most_rows)
    (kept,) = token_pipeline.generate_video(VIDEO, Noise(5))
    assert kept.image_ids == tuple(image_ids)
    assert token_pipeline.manifest.vocabulary.motion_codes_of(kept.motion_ids, len(codes)).tolist() == codes.tolist()


def test_motion_is_written_after_the_likeliest_pictures_in_turn(token_pipeline: Pipeline) -> None:
    writer, prompt = token_pipeline._writer, token_pipeline._prompt_ids(PROMPT)
    settings = resolve(
        replace(VIDEO, candidates=7, kept_pictures=3),
        token_pipeline.manifest.geometry,
        token_pipeline.manifest.defaults,
    )
    written = [(ids, None) for ids in writer.images(prompt, settings, Noise(5))]
    order = np.argsort(-writer.likelihoods(prompt, written))
    best = [written[index][0] for index in order[:3]]
    clips = writer.clips(prompt, prompt, None, settings, Noise(5), 0)
    assert [ids for ids, _ in clips] == [best[index % 3] for index in range(7)]
    motions = {tuple(ids): {tuple(codes) for other, codes in clips if other == ids} for ids in best}
    assert [len(codes) for codes in motions.values()] == [3, 2, 2]  # each with noise of its own


def test_equal_pictures_are_kept_once(token_pipeline: Pipeline) -> None:
    writer, prompt = token_pipeline._writer, token_pipeline._prompt_ids(PROMPT)
    alike = replace(VIDEO, kept_pictures=4, top_k=1)
    settings = resolve(alike, token_pipeline.manifest.geometry, token_pipeline.manifest.defaults)
    clips = writer.clips(prompt, prompt, None, settings, Noise(5), 0)
    assert len(clips) == 4 and len({tuple(ids) for ids, _ in clips}) == 1


@pytest.mark.parametrize("given", [{"image": FRAME + 90}, {"candidates": 1}, {"clips": 2}, {"candidates": 5}])
def test_torch_keeps_the_same_pictures(token_pipeline: Pipeline, reference: Reference, given: dict[str, Any]) -> None:
    request = VideoRequest(**{"prompt": PROMPT, "candidates": 3, "max_image_tokens": 24, **given})
    request = replace(request, kept_pictures=min(2, request.candidates or 1))
    ours, theirs = (list(made.generate_video(request, Noise(6))) for made in (token_pipeline, reference))
    assert [(clip.image_ids, clip.motion_ids) for clip in ours] == [
        (clip.image_ids, clip.motion_ids) for clip in theirs
    ]


def test_kept_pictures_are_of_the_candidates(token_pipeline: Pipeline) -> None:
    geometry, defaults = token_pipeline.manifest.geometry, TaskDefaults(candidates=8, kept_pictures=5)

    def resolved(**given: Any) -> tuple[int, int]:
        settings = resolve(VideoRequest(**given), geometry, defaults)
        return settings.candidates, settings.kept_pictures

    assert resolved(prompt=PROMPT) == (8, 5)
    assert resolved(prompt=PROMPT, candidates=3) == (3, 3)
    assert resolved(prompt=PROMPT, kept_pictures=0) == (8, 0)
    assert resolved(prompt=PROMPT, greedy=True) == resolved(image=FRAME) == (1, 1)
    with pytest.raises(UsageError, match=r"--kept-pictures 9: more than there are candidates \(8\)"):
        resolved(prompt=PROMPT, kept_pictures=9)
    with pytest.raises(UsageError, match="--kept-pictures -1: must be from 0"):
        resolved(prompt=PROMPT, kept_pictures=-1)


def test_torch_keeps_the_same(token_pipeline: Pipeline, reference: Reference) -> None:
    (ours,), (theirs,) = (made.generate_video(VIDEO, Noise(6)) for made in (token_pipeline, reference))
    assert (ours.image_ids, ours.motion_ids) == (theirs.image_ids, theirs.motion_ids)
    pictures = [made.generate_image(IMAGE, Noise(7)).ids for made in (token_pipeline, reference)]
    assert pictures[0] == pictures[1]


def test_candidates_of_a_picture_that_was_given_differ_in_motion_alone(token_pipeline: Pipeline) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    made = [
        next(
            iter(token_pipeline.generate_video(VideoRequest(prompt=PROMPT, image=picture, candidates=count), Noise(8)))
        )
        for count in (1, 6)
    ]
    assert made[0].image_ids == made[1].image_ids
    assert made[0].motion_ids != made[1].motion_ids


@pytest.mark.parametrize("request_", [VideoRequest, ImageRequest])
def test_one_try_where_more_would_be_for_nothing(token_pipeline: Pipeline, request_: Any) -> None:
    geometry, defaults = token_pipeline.manifest.geometry, TaskDefaults(candidates=8)

    def candidates(**given: Any) -> int:
        return resolve(request_(**given), geometry, defaults).candidates

    assert candidates(prompt=PROMPT) == 8
    assert candidates(prompt=PROMPT, greedy=True) == candidates(image=FRAME) == 1
    with pytest.raises(UsageError, match="--candidates 3: the prompt tells which is best"):
        candidates(image=FRAME, candidates=3)
    with pytest.raises(UsageError, match="--candidates 3: with --greedy all are the same"):
        candidates(prompt=PROMPT, greedy=True, candidates=3)
    with pytest.raises(UsageError, match="--candidates 0: must be from 1"):
        candidates(prompt=PROMPT, candidates=0)


@pytest.mark.parametrize("request_", [VideoRequest, ImageRequest])
def test_no_more_finalists_than_candidates(token_pipeline: Pipeline, request_: Any) -> None:
    geometry, defaults = token_pipeline.manifest.geometry, TaskDefaults(candidates=8, finalists=3)

    def finalists(**given: Any) -> int:
        return resolve(request_(prompt=PROMPT, **given), geometry, defaults).finalists

    assert (finalists(), finalists(candidates=2), finalists(greedy=True), finalists(finalists=8)) == (3, 2, 1, 8)
    with pytest.raises(UsageError, match=r"--finalists 9: more than there are candidates \(8\)"):
        finalists(finalists=9)
    with pytest.raises(UsageError, match=r"--finalists 2: more than there are candidates \(1\)"):
        finalists(greedy=True, finalists=2)
    with pytest.raises(UsageError, match="--finalists 0: must be from 1"):
        finalists(finalists=0)


@pytest.mark.parametrize(("read", "kept"), [([-3.0, -1.0, -2.0], 1), ([-1.0, -1.0, -2.0], 0)])
def test_the_drawn_pictures_decide_among_the_finalists(
    token_pipeline: Pipeline, read: list[float], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = resolve(VIDEO, token_pipeline.manifest.geometry, token_pipeline.manifest.defaults)
    prompt = token_pipeline._prompt_ids(PROMPT)
    tries = token_pipeline._writer.clips(prompt, prompt, None, settings, Noise(5), 0)
    assert len({tuple(ids) for ids, _ in tries}) == 4
    given = iter([np.array([-1.0, -4.0, -2.0, -3.0]), np.array(read)])
    monkeypatch.setattr(token_pipeline._writer, "likelihoods", lambda prompt, candidates: next(given))
    (made,) = token_pipeline.generate_video(replace(VIDEO, finalists=3), Noise(5))
    assert made.image_ids == tuple(tries[[0, 2, 3][kept]][0])


def test_a_finalist_that_shows_nothing_is_not_kept(token_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, kept = token_pipeline._prompt_ids(PROMPT), VisualTokenizer.kept

    def first_empty(self: VisualTokenizer, pictures: Any, noise: Noise) -> list[PictureTokens]:
        first, *rest = kept(self, pictures, noise)
        return [PictureTokens(first.codes[:0], first.embeds[:0]), *rest]

    settings = resolve(VIDEO, token_pipeline.manifest.geometry, token_pipeline.manifest.defaults)
    tries = token_pipeline._writer.clips(prompt, prompt, None, settings, Noise(5), 0)
    _, second = token_pipeline._writer.likeliest(prompt, tries, 2)
    monkeypatch.setattr(VisualTokenizer, "kept", first_empty)
    (made,) = token_pipeline.generate_video(replace(VIDEO, finalists=2), Noise(5))
    assert made.image_ids == tuple(second[0])


def test_finalists_have_different_pictures(token_pipeline: Pipeline) -> None:
    prompt, vocabulary = token_pipeline._prompt_ids(PROMPT), token_pipeline.manifest.vocabulary
    one, other = ([vocabulary.first_visual + code, vocabulary.image_end] for code in (0, 1))
    motions = [np.full(token_pipeline.manifest.geometry.motion_tokens, code) for code in range(3)]
    tries = [(one, motions[0]), (other, motions[1]), (one, motions[2]), ([vocabulary.image_end], motions[0])]
    found = token_pipeline._writer.likelihoods(prompt, tries)
    ranked = token_pipeline._writer.likeliest(prompt, tries, 4)
    assert len(ranked) == 2 and {tuple(ids) for ids, _ in ranked} == {tuple(one), tuple(other)}
    assert ranked[0] is tries[int(np.argmax(found))]


def test_torch_keeps_the_same_of_several_drawn_pictures(drawing: tuple[Pipeline, Reference]) -> None:
    request = replace(IMAGE, finalists=3, keyframe_steps=2)
    runtime = drawing[0]
    mattered = []
    for seed in range(3):
        ours, theirs = (made.generate_image(request, Noise(seed)) for made in drawing)
        assert ours.ids == theirs.ids
        np.testing.assert_allclose(ours.latents, theirs.latents, atol=1e-3)
        mattered.append(ours.ids != runtime.generate_image(replace(request, finalists=1), Noise(seed)).ids)
    assert any(mattered)


def test_torch_keeps_the_same_where_a_clip_goes_on(drawing: tuple[Pipeline, Reference]) -> None:
    request = replace(VIDEO, clips=2, finalists=2, keyframe_steps=4, inverse_rate=0.5)
    for ours, theirs in zip(*(made.generate_video(request, Noise(4)) for made in drawing), strict=True):
        assert (ours.image_ids, ours.motion_ids) == (theirs.image_ids, theirs.motion_ids)
        np.testing.assert_allclose(ours.keyframe.astype(int), theirs.keyframe.astype(int), atol=1)


def test_a_recipe_tells_how_many_there_were(token_pipeline: Pipeline) -> None:
    asked = replace(VIDEO, kept_pictures=2)
    settings = resolve(asked, token_pipeline.manifest.geometry, token_pipeline.manifest.defaults)
    recipe = make_recipe("generate", token_pipeline.bundle, settings, 3, {})
    assert "--candidates 4 --kept-pictures 2 --finalists 1" in command_line(recipe, Path("out.mp4"))
