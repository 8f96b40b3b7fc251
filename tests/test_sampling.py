"""Token choice: the slice against the full vocabulary, the golden sample, each processor's rule."""

from __future__ import annotations

import numpy as np
import pytest
from golden import assert_close, load
from hypothesis import assume, given
from hypothesis import strategies as st
from torch_engines import TorchLanguageModel, golden_llama

from runtime.errors import UsageError
from runtime.noise import Noise
from runtime.sampling import (
    AllowedTokens,
    Greedy,
    MinNewTokens,
    Multinomial,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    apply,
    log_softmax,
    processors,
    softmax,
)
from runtime.vocabulary import Vocabulary

NONE = np.zeros((1, 0), dtype=np.int64)
SMALL = Vocabulary(text_size=40, visual_codes=30, motion_codes=20)
ALLOWED = {"image": AllowedTokens(SMALL.image_ranges), "motion": AllowedTokens(SMALL.motion_ranges)}
ENDS = {"image": SMALL.image_end, "motion": SMALL.motion_end}


def full_vocabulary_scores(
    logits: np.ndarray,
    allowed: AllowedTokens,
    eos: int,
    generated: int,
    *,
    guidance: float,
    min_new: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> np.ndarray:
    """The reference's way, step by step, over every id: guided log-probabilities, then masks. [B, V] float64."""
    conditional, unconditional = np.split(log_softmax(logits.astype(np.float64)), 2)
    scores = guidance * (conditional - unconditional) + unconditional if guidance != 1 else np.split(logits, 2)[0]
    scores = scores.astype(np.float64)
    if generated < min_new:
        scores[:, eos] = -np.inf
    scores[:, np.setdiff1d(np.arange(scores.shape[1]), allowed.ids)] = -np.inf
    scores = scores / temperature
    for row in scores:
        if top_k:
            row[row < np.sort(row)[-top_k]] = -np.inf
        rising = np.argsort(row)
        mass = np.cumsum(softmax(row)[rising])
        assume(np.abs(mass - (1 - top_p)).min() > 1e-5)  # rounding decides there
        cut = mass <= 1 - top_p
        cut[-1] = False
        row[rising[cut]] = -np.inf
    return scores


@given(
    kind=st.sampled_from(["image", "motion"]),
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 3),
    generated=st.integers(0, 6),
    guidance=st.sampled_from([1.0, 3.0, 7.0, 0.5]),
    min_new=st.integers(0, 5),
    temperature=st.sampled_from([1.0, 0.7, 1.6]),
    top_k=st.integers(0, 30),
    top_p=st.floats(0.05, 0.99),
)
def test_slice_equals_full_vocabulary(
    kind: str,
    seed: int,
    rows: int,
    generated: int,
    guidance: float,
    min_new: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    """Guidance on the slice alone, without normaliser, gives the probabilities and choices of the whole vocabulary."""
    allowed, eos = ALLOWED[kind], ENDS[kind]
    logits = np.random.default_rng(seed).normal(0, 3, (2 * rows, SMALL.size)).astype(np.float32)
    settings = {
        "guidance": guidance,
        "min_new": min_new,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    full = full_vocabulary_scores(logits, allowed, eos, generated, **settings)  # type: ignore[arg-type]

    steps = processors(allowed, eos=eos, **settings)  # type: ignore[arg-type]
    used = logits if guidance != 1 else logits[:rows]
    ours = apply(steps, allowed.take(used), np.zeros((rows, generated), np.int64))
    outside = np.setdiff1d(np.arange(SMALL.size), allowed.ids)
    assert not softmax(full)[:, outside].any()
    assert_close(softmax(ours), softmax(full)[:, allowed.ids], 2e-5)
    np.testing.assert_array_equal(allowed.ids[Greedy()(ours)], full.argmax(axis=-1))
    np.testing.assert_array_equal(
        allowed.ids[Multinomial(Noise(seed))(ours)], Noise(seed).choice(softmax(full.astype(np.float32)))
    )


def test_first_sampled_token_matches_golden() -> None:
    golden = load("j_llm_generation")
    call = golden.meta["calls"]["sample"]
    allowed = AllowedTokens(Vocabulary().image_ranges)
    model = TorchLanguageModel(golden_llama(golden))
    ids, mask = golden.inputs["img_text/input_ids"], golden.inputs["img_text/attention_mask"]
    model.start(4, ids.shape[1])
    counts = np.append(mask.sum(axis=1), [1, 1])
    batch = np.zeros((4, ids.shape[1]), np.int64)
    for row, prompt, keep in zip(batch, ids, mask, strict=False):
        row[: keep.sum()] = prompt[keep == 1]
    batch[2:, 0] = Vocabulary().image_start
    logits = model.forward(model.embed(batch), counts)
    steps = processors(
        allowed,
        eos=Vocabulary().image_end,
        guidance=golden.meta["guidance_scale"],
        min_new=5,
        temperature=call["temperature"],
        top_k=call["top_k"],
        top_p=call["top_p"],
    )
    probabilities = softmax(apply(steps, allowed.take(logits), np.zeros((2, 0), np.int64)))
    kept = [allowed.ids[row > 0] for row in probabilities]
    np.testing.assert_array_equal([len(k) for k in kept], golden.outputs["sample/kept_counts"])
    np.testing.assert_array_equal(np.concatenate(kept), golden.outputs["sample/kept_ids_concat"])
    assert_close(probabilities[probabilities > 0], golden.outputs["sample/kept_probs_concat"], 5e-4)


def test_allowed_tokens_maps_positions_to_ids() -> None:
    allowed = ALLOWED["motion"]
    logits = np.arange(SMALL.size, dtype=np.float32)[None]
    np.testing.assert_array_equal(allowed.take(logits)[0], allowed.ids)
    for position, token in enumerate(allowed.ids):
        assert allowed.position(token) == position
    with pytest.raises(UsageError, match="token id 5 "):
        allowed.position(5)


def test_top_k_keeps_ties() -> None:
    kept = TopK(2)(np.array([[1.0, 3.0, 3.0, 3.0, 0.0]]), NONE)
    np.testing.assert_array_equal(np.isfinite(kept), [[False, True, True, True, False]])


def test_top_p_keeps_the_smallest_set_and_at_least_one() -> None:
    scores = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
    for p, kept in ((0.4, 1), (0.6, 2), (0.9, 3), (0.99, 4), (1e-20, 1)):
        assert np.isfinite(TopP(p)(scores, NONE)).sum() == kept


def test_min_new_tokens_forbids_the_end_until_reached() -> None:
    scores, process = np.zeros((1, 3)), MinNewTokens(eos=1, count=2)
    assert process(scores, np.zeros((1, 1), np.int64))[0, 1] == -np.inf
    assert process(scores, np.zeros((1, 2), np.int64))[0, 1] == 0
    assert scores[0, 1] == 0  # the caller's array is untouched


def test_repetition_penalty_acts_on_generated_ids_only() -> None:
    allowed = AllowedTokens((range(0, 3), range(10, 13)))
    scores = np.array([[1.0, -1.0, 2.0, 4.0, -4.0, 6.0]] * 2)
    generated = np.array([[10, 11, 7, 11], [12, 99, 99, 1]])  # 7 and 99 cannot be generated: no effect
    np.testing.assert_array_equal(
        RepetitionPenalty(2.0, allowed)(scores, generated),
        [[1.0, -1.0, 2.0, 2.0, -8.0, 6.0], [1.0, -2.0, 2.0, 4.0, -4.0, 3.0]],
    )


def test_list_is_in_the_references_order_and_neutral_values_add_nothing() -> None:
    allowed = ALLOWED["image"]
    names = [
        type(step).__name__
        for step in processors(allowed, eos=SMALL.image_end, guidance=3, min_new=2, temperature=0.7, top_k=5, top_p=0.9)
    ]
    assert names == ["ClassifierFreeGuidance", "MinNewTokens", "Temperature", "TopK", "TopP"]
    plain = processors(allowed, eos=1, repetition_penalty=1.2, min_new=1, temperature=2.0)
    assert [type(s) for s in plain] == [RepetitionPenalty, MinNewTokens, Temperature]
    assert processors(allowed, eos=None) == ()


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"top_p": 0}, {"repetition_penalty": -1}, {"guidance": 2, "repetition_penalty": 2}]
)
def test_refuses_settings_without_meaning(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        processors(ALLOWED["image"], eos=None, **settings)  # type: ignore[arg-type]


def test_multinomial_follows_the_probabilities() -> None:
    scores = np.log(np.tile(np.array([[0.7, 0.3, 1e-30]], np.float32), (4000, 1)))
    share = np.bincount(Multinomial(Noise(0))(scores), minlength=3) / 4000
    assert_close(share, [0.7, 0.3, 0], 0.03)
