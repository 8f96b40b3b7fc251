"""The generation loop against the reference's runs, and its own rules."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from golden import Golden, assert_close, load
from torch_engines import TorchLanguageModel, golden_llama

from runtime.context import Context
from runtime.decoder import (
    DecodingOptions,
    Step,
    collect,
    generate,
    image_phase,
    motion_phase,
    strip_pad,
    text_phase,
)
from runtime.errors import UsageError
from runtime.noise import Noise
from runtime.sampling import AllowedTokens, log_softmax
from runtime.vocabulary import Vocabulary

OFFICIAL = Vocabulary()
CASES = ("img_text", "img_text_noguid", "img_tok_uncond", "mot_chain", "mot_noguid", "mot_uncond")


class RecordingModel(TorchLanguageModel):
    """Remembers every forward's logits and how many positions it was fed."""

    def __init__(self, llama: object) -> None:
        super().__init__(llama)
        self.logits: list[np.ndarray] = []
        self.fed: list[tuple[int, ...]] = []

    def forward(self, embeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
        self.fed.append(embeds.shape[:2])
        self.logits.append(super().forward(embeds, counts))
        return self.logits[-1]


@cache
def golden_case(name: str) -> Golden:
    return load(name)


@pytest.fixture
def model() -> RecordingModel:
    return RecordingModel(_llama("j_llm_generation"))


@cache
def _llama(name: str) -> object:
    return golden_llama(golden_case(name))


def prompts_of(case: str) -> list[np.ndarray]:
    """The case's prompts as ids, without padding and without the start marker that `generate` appends."""
    inputs = golden_case("j_llm_generation").inputs
    ids, mask = inputs[f"{case}/input_ids"], inputs[f"{case}/attention_mask"]
    return [row[keep == 1][:-1] for row, keep in zip(ids, mask, strict=True)]


def run(model: RecordingModel, case: str, context: Context | None = None, **changes: object) -> list[Step]:
    golden = golden_case("j_llm_generation")
    call = golden.meta["calls"][case]["generate_kwargs"]
    settings: dict[str, object] = {
        "max_new": call["max_new_tokens"],
        "min_new": call["min_new_tokens"],
        "guidance": call["guidance_scale"],
        "greedy": True,
    }
    phase = image_phase(OFFICIAL) if case.startswith("img") else motion_phase(OFFICIAL)
    return list(
        generate(
            model,
            model.embed,
            [model.embed(ids) for ids in prompts_of(case)],
            phase,
            DecodingOptions(**(settings | changes)),  # type: ignore[arg-type]
            max_positions=golden.meta["config"]["max_position_embeddings"],
            unconditional=list(golden.inputs["uncond_input_ids"]) if case.endswith("uncond") else None,
            context=context,
        )
    )


def finite(scores: np.ndarray) -> np.ndarray:
    """Scores with minus infinity (-1e30 in golden files) as one comparable number."""
    return np.where(scores < -1e29, -1e6, scores)


@pytest.mark.parametrize("case", CASES)
def test_ids_equal_the_reference(model: RecordingModel, case: str) -> None:
    golden = golden_case("j_llm_generation")
    tokens = collect(run(model, case))
    prompt = golden.inputs[f"{case}/input_ids"]
    np.testing.assert_array_equal(tokens, golden.outputs[f"{case}/sequences"][:, prompt.shape[1] :])
    for row, ids in enumerate(tokens):
        assert strip_pad(ids) == golden.outputs[f"{case}/pure_list_{row}"].tolist()
        assert strip_pad([*prompt[row], *ids]) == golden.outputs[f"{case}/output_list_{row}"].tolist()


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_the_reference(model: RecordingModel, case: str) -> None:
    golden = golden_case("j_llm_generation")
    steps = run(model, case)
    kind = "motion" if case.startswith("mot") else "image"
    guidance = golden.meta["calls"][case]["generate_kwargs"]["guidance_scale"]
    slice_ids = golden.inputs[f"score_slice_ids_{kind}"]
    allowed = AllowedTokens(OFFICIAL.image_ranges if kind == "image" else OFFICIAL.motion_ranges)
    assert_close(model.logits[0][:2, slice_ids], golden.outputs[f"{case}/raw_cond_logits_step0"], 5e-4)
    alive = np.ones(2, dtype=bool)
    for index, step in enumerate(steps):
        scores = np.full((2, OFFICIAL.size), -np.inf)
        scores[:, allowed.ids] = step.scores
        if guidance != 1:  # the reference guides normalised log-probabilities: the same up to a constant per row
            normalisers = model.logits[index].max(-1) - log_softmax(model.logits[index]).max(-1)  # [4]
            scores -= (guidance * normalisers[:2] - (guidance - 1) * normalisers[2:])[:, None]
        if index < 2:
            expected = golden.outputs[f"{case}/processed_scores_step{index}"]
            assert_close(finite(scores[:, slice_ids])[alive], finite(expected)[alive], 5e-4)
        top = np.take_along_axis(scores, golden.outputs[f"{case}/top8_ids"][:, index], axis=-1)
        assert_close(top[alive], golden.outputs[f"{case}/top8_scores"][:, index][alive], 5e-4)
        chosen = np.take_along_axis(log_softmax(scores), step.tokens[:, None], axis=-1)[:, 0]
        assert_close(step.logprobs[alive], chosen[alive], 1e-5)
        alive = ~step.finished


def test_one_forward_a_token_with_both_branches(model: RecordingModel) -> None:
    steps = run(model, "img_text")
    assert model.fed == [(4, 8)] + [(4, 1)] * (len(steps) - 1)
    assert all(step.elapsed > 0 for step in steps)


def test_phases_that_share_a_cache_equal_the_reference(model: RecordingModel) -> None:
    outputs, context = golden_case("j_llm_generation").outputs, Context()
    first = []  # what the first forward of every phase was fed
    for case in ("img_text", "img_text", "mot_chain", "img_tok_uncond", "mot_chain", "mot_noguid"):
        first.append(len(model.fed))
        tokens = collect(run(model, case, context))
        np.testing.assert_array_equal(tokens, outputs[f"{case}/sequences"][:, -tokens.shape[1] :])
    assert [model.fed[at] for at in first[:2]] == [(4, 8), (4, 1)]  # the same again: one position, for its logits


def test_finished_rows_read_pad(model: RecordingModel) -> None:
    steps = run(model, "img_tok_uncond")
    tokens = collect(steps)
    end = tokens[1].tolist().index(OFFICIAL.image_end)
    assert end == 5 and (tokens[1, end + 1 :] == 2).all() and tokens.shape[1] > end + 1
    assert [bool(step.finished[1]) for step in steps] == [i >= end for i in range(len(steps))]


@pytest.mark.parametrize("count", [1, 9, 40])
def test_exact_number_of_motion_codes(model: RecordingModel, count: int) -> None:
    steps = run(model, "mot_chain", exact=count)
    tokens = collect(steps)
    assert tokens.shape == (2, count)
    assert ((tokens >= OFFICIAL.first_motion) & (tokens < OFFICIAL.size)).all()
    assert [step.finished.any() for step in steps] == [False] * (count - 1) + [True]


def test_sampling_is_seeded_and_stays_in_range(model: RecordingModel) -> None:
    prompts = [model.embed(ids) for ids in prompts_of("mot_noguid")]
    options = DecodingOptions(max_new=10, top_k=50, top_p=0.9, temperature=1.3, guidance=3.0)

    def draw(seed: int) -> list[list[int]]:
        steps = generate(
            model, model.embed, prompts, motion_phase(OFFICIAL), options, max_positions=512, noise=Noise(seed)
        )
        return collect(steps).tolist()

    first = draw(1)
    assert first == draw(1) != draw(2)
    assert {i for row in first for i in row} <= {i for r in OFFICIAL.motion_ranges for i in r}


def test_a_stop_rule_ends_its_row(model: RecordingModel) -> None:
    prompts = [model.embed(ids) for ids in prompts_of("img_text")]
    full = run(model, "img_text")
    third = int(collect(full)[0, 2])
    steps = list(
        generate(
            model,
            model.embed,
            prompts,
            image_phase(OFFICIAL),
            DecodingOptions(max_new=14, min_new=5, guidance=3.0, greedy=True),
            max_positions=512,
            stop=lambda ids: third in ids,
        )
    )
    tokens = collect(steps)
    assert tokens[0, 2] == third and (tokens[0, 3:] == 2).all()
    np.testing.assert_array_equal(tokens[1], collect(full)[1, : tokens.shape[1]])


def test_prompt_that_does_not_fit_is_refused(model: RecordingModel) -> None:
    prompt = [model.embed(np.arange(3, 13))]
    phase, options = motion_phase(OFFICIAL), DecodingOptions(max_new=30, greedy=True)
    with pytest.raises(UsageError, match=r"prompt of 11 positions leaves room for 0 new tokens.* 10 positions"):
        next(generate(model, model.embed, prompt, phase, options, max_positions=10))
    exact = DecodingOptions(max_new=30, exact=30, greedy=True)
    with pytest.raises(UsageError, match="room for 29 new tokens of the 30"):
        next(generate(model, model.embed, prompt, phase, exact, max_positions=39))
    assert collect(generate(model, model.embed, prompt, phase, exact, max_positions=40)).shape == (1, 30)


def test_cache_is_sized_from_the_request(model: RecordingModel) -> None:
    prompt = [model.embed(np.arange(3, 13))]
    for limit, capacity in ((512, 11 + 5), (13, 13)):
        options = DecodingOptions(max_new=5, min_new=5, greedy=True)
        tokens = collect(generate(model, model.embed, prompt, motion_phase(OFFICIAL), options, max_positions=limit))
        assert model.capacity == capacity
        assert tokens.shape[1] == min(5, limit - 11 + 1)


def test_missing_pieces_are_refused(model: RecordingModel) -> None:
    prompt = [model.embed(np.arange(3, 13))]
    with pytest.raises(UsageError, match="source of noise"):
        next(generate(model, model.embed, prompt, image_phase(OFFICIAL), DecodingOptions(max_new=2), max_positions=99))
    guided = DecodingOptions(max_new=2, greedy=True, guidance=2)
    with pytest.raises(UsageError, match="start marker"):
        next(generate(model, model.embed, prompt, text_phase(OFFICIAL), guided, max_positions=99))
    with pytest.raises(UsageError, match="2 unconditional contexts for 1 prompts"):
        next(
            generate(
                model,
                model.embed,
                prompt,
                image_phase(OFFICIAL),
                guided,
                max_positions=99,
                unconditional=[np.array([1]), np.array([1])],
            )
        )


@pytest.mark.parametrize("case", ["image_row0", "image_row1", "video", "text"])
def test_answers_from_embeddings_equal_the_reference(case: str) -> None:
    golden = golden_case("j_understanding")
    model = RecordingModel(_llama("j_understanding"))
    if case == "text":
        prompt = model.embed(golden.inputs["text/input_ids"][0])
    else:
        prompt = golden.outputs[f"{case}/inputs_embeds"][0]
    check_answers(model, golden, [prompt], [case])


def test_unequal_rows_together_equal_rows_alone() -> None:
    """The reference's own batch of these two is wrong after the first token (reference semantics §13.4)."""
    golden = golden_case("j_understanding")
    cases = ["image_row0", "image_row1"]
    prompts = [golden.outputs[f"{case}/inputs_embeds"][0] for case in cases]
    assert len(prompts[0]) != len(prompts[1])
    check_answers(RecordingModel(_llama("j_understanding")), golden, prompts, cases)


def check_answers(model: RecordingModel, golden: Golden, prompts: list[np.ndarray], cases: list[str]) -> None:
    kwargs = golden.meta["call_kwargs"]
    options = DecodingOptions(max_new=kwargs["max_length"], min_new=kwargs["min_length"], greedy=True)
    steps = list(
        generate(
            model,
            model.embed,
            prompts,
            text_phase(OFFICIAL),
            options,
            max_positions=golden.meta["config"]["llama"]["max_position_embeddings"],
        )
    )
    ids = golden.inputs["score_slice_ids"]
    for row, name in enumerate(cases):
        np.testing.assert_array_equal(collect(steps)[row], golden.outputs[f"{name}/generated_ids"][0])
        for index in range(2):
            scores = np.full(OFFICIAL.size, -np.inf)
            scores[: OFFICIAL.text_size] = steps[index].scores[row]
            assert_close(finite(scores[ids]), finite(golden.outputs[f"{name}/processed_scores_step{index}"][0]), 5e-4)


def test_strip_pad_removes_every_2() -> None:
    assert strip_pad([2, 5, 2, 32001, 2]) == [5, 32001]
