"""Golden cases of token generation (j): guidance, order of processors, suppression, padding, unconditional context.

The reference pads on the left; ours are given the same prompts without padding and must write the same ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.fidelity import configs
from export.fidelity.backends import Engines
from export.fidelity.golden import Golden
from export.fidelity.measure import Measurement, close, equal
from export.fidelity.taps import RecordedLanguageModel
from runtime import sampling
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
from runtime.tokenizers import TextTokenizer
from runtime.vocabulary import Vocabulary
from videolavit.checkpoints import Checkpoint
from videolavit.config import ModelConfig

SCORES, PROBABILITIES = 5e-4, 1e-5
VOCABULARY = Vocabulary()  # generation cases have the official id layout
TOKENIZER = "tiny_sp.model"


@dataclass(frozen=True)
class _Case:
    """One generation of a file."""

    golden: Golden
    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = self.golden.meta["calls"][self.name]["generate_kwargs"]
        return arguments

    @property
    def phase(self) -> Phase:
        start = self.arguments["bos_token_id"]
        return image_phase(VOCABULARY) if start == VOCABULARY.image_start else motion_phase(VOCABULARY)

    @property
    def prompts(self) -> list[np.ndarray]:
        """Ids of every row, without padding and without the start marker."""
        rows = zip(self.input("input_ids"), self.input("attention_mask"), strict=True)
        ids = [row[mask > 0] for row, mask in rows]
        return [row[:-1] if row[-1] == self.phase.start else row for row in ids]

    @property
    def unconditional(self) -> list[np.ndarray] | None:
        explicit = "explicit uncond_input_ids" in self.golden.meta["calls"][self.name]["kind"]
        return list(self.golden.inputs["uncond_input_ids"]) if explicit else None

    @property
    def shown_ids(self) -> np.ndarray:
        """Ids of the slice whose scores are stored."""
        kind = "image" if self.phase.start == VOCABULARY.image_start else "motion"
        return self.golden.inputs[f"score_slice_ids_{kind}"]

    @property
    def options(self) -> DecodingOptions:
        arguments = self.arguments
        return DecodingOptions(
            max_new=arguments["max_new_tokens"],
            min_new=arguments["min_new_tokens"],
            guidance=arguments["guidance_scale"],
            greedy=True,
        )

    def input(self, name: str) -> np.ndarray:
        return self.golden.inputs[f"{self.name}/{name}"]

    def output(self, name: str) -> np.ndarray:
        return self.golden.outputs[f"{self.name}/{name}"]


def generation(golden: Golden, engines: Engines) -> Iterator[Measurement]:
    """Every generation of the file, greedy, through engines; and the candidates of the sampled one."""
    checkpoint = _checkpoint(golden)
    engine: Any = RecordedLanguageModel(engines.language_model(checkpoint))
    embedding = engines.engine(checkpoint, "token_embedding")

    def embed(ids: np.ndarray) -> np.ndarray:
        return embedding(ids=np.asarray(ids, np.int64))["embeds"]

    for case in _cases(golden):
        steps = list(
            generate(
                engine,
                embed,
                [embed(ids[None])[0] for ids in case.prompts],
                case.phase,
                case.options,
                max_positions=checkpoint.config.language_model.max_positions,
                unconditional=case.unconditional,
            )
        )
        yield from _ids(case, collect(steps))
        yield from _scores(case, steps, engine.logits)
        if "sample" in golden.meta["calls"] and _is_sampled(case):
            yield from _candidates(case, engine.logits[0])


def generation_host(golden: Golden) -> Iterator[Measurement]:
    """Prompts from texts, ids without padding, and the processors on stored logits where there is no guidance."""
    tokenizer = TextTokenizer(golden.path.with_name(TOKENIZER))
    for case in _cases(golden):
        if "text prompts" in golden.meta["calls"][case.name]["kind"]:
            for text, ids in zip(golden.meta["texts"], case.prompts, strict=True):
                yield equal("prompt ids", tokenizer.encode(text), ids)
        for row, sequence in enumerate(case.output("sequences")):
            yield equal("ids without padding", strip_pad(sequence), case.output(f"output_list_{row}"))
        if case.options.guidance != 1:
            continue
        logits = np.full((len(case.prompts), VOCABULARY.size), -np.inf, np.float32)
        logits[:, case.shown_ids] = case.output("raw_cond_logits_step0")
        allowed = sampling.AllowedTokens(case.phase.allowed)
        steps = sampling.processors(allowed, eos=case.phase.eos, min_new=case.options.min_new)
        scores = sampling.apply(steps, allowed.take(logits), np.zeros((len(logits), 0), np.int64))
        found = _whole(allowed, scores)[:, case.shown_ids]
        yield close("scores of the first tokens", found, case.output("processed_scores_step0"), SCORES)


def _ids(case: _Case, tokens: np.ndarray) -> Iterator[Measurement]:
    prompt = case.input("input_ids")
    yield equal("generated ids", tokens, case.output("sequences")[:, prompt.shape[1] :])
    for row, ids in enumerate(tokens):
        yield equal("generated ids", strip_pad(ids), case.output(f"pure_list_{row}"))
        yield equal("generated ids", strip_pad([*prompt[row], *ids]), case.output(f"output_list_{row}"))


def _scores(case: _Case, steps: list[Step], logits: list[np.ndarray]) -> Iterator[Measurement]:
    """Raw logits of the first token, processed scores of the first two, the best eight of all; unfinished rows only."""
    rows, guidance = len(case.prompts), case.options.guidance
    allowed = sampling.AllowedTokens(case.phase.allowed)
    first = logits[0][:rows, case.shown_ids]
    yield close("logits of the first token", first, case.output("raw_cond_logits_step0"), SCORES)
    best_ids, best = case.output("top8_ids"), case.output("top8_scores")  # [B, t, 8]
    alive = np.ones(rows, bool)
    for index, step in enumerate(steps):
        scores = _whole(allowed, step.scores)
        if guidance != 1:  # the reference guides normalised log-probabilities: the same up to a constant per row
            scores -= _guided_normaliser(logits[index], guidance)
        if index < 2:
            expected = case.output(f"processed_scores_step{index}")
            found = scores[:, case.shown_ids]
            yield close("scores of the first tokens", found[alive], expected[alive], SCORES)
        found = np.take_along_axis(scores, best_ids[:, index], axis=-1)
        yield close("best scores of every token", found[alive], best[:, index][alive], SCORES)
        alive = ~step.finished


def _candidates(case: _Case, logits: np.ndarray) -> Iterator[Measurement]:
    """What temperature, top-k and top-p leave of the first token, with probabilities."""
    call, outputs = case.golden.meta["calls"]["sample"], case.golden.outputs
    allowed = sampling.AllowedTokens(case.phase.allowed)
    steps = sampling.processors(
        allowed,
        eos=case.phase.eos,
        guidance=case.options.guidance,
        min_new=case.options.min_new,
        temperature=call["temperature"],
        top_k=call["top_k"],
        top_p=call["top_p"],
    )
    rows = len(case.prompts)
    probabilities = sampling.softmax(sampling.apply(steps, allowed.take(logits), np.zeros((rows, 0), np.int64)))
    kept = probabilities > 0  # [B, n]
    yield equal("sampling candidates", kept.sum(axis=1), outputs["sample/kept_counts"])
    yield equal("sampling candidates", allowed.ids[np.nonzero(kept)[1]], outputs["sample/kept_ids_concat"])
    yield close("sampling probabilities", probabilities[kept], outputs["sample/kept_probs_concat"], PROBABILITIES)


def _is_sampled(case: _Case) -> bool:
    """Whether the sampled generation continues this case's prompts: guided image ids after texts."""
    calls = case.golden.meta["calls"]
    same_order = calls[case.name]["processor_order"] == calls["sample"]["processor_order"]
    return same_order and "image_tokenids, text prompts" in calls[case.name]["kind"]


def _cases(golden: Golden) -> Iterator[_Case]:
    for name, call in golden.meta["calls"].items():
        if "generate_kwargs" in call:
            yield _Case(golden, name)


def _whole(allowed: sampling.AllowedTokens, scores: np.ndarray) -> np.ndarray:
    """Scores [B, n] of the allowed ids -> scores [B, V] of all, minus infinity elsewhere."""
    whole = np.full((len(scores), VOCABULARY.size), -np.inf)
    whole[:, allowed.ids] = scores
    return whole


def _guided_normaliser(logits: np.ndarray, guidance: float) -> np.ndarray:
    """What guided logits have more than guided log-probabilities: [B, 1] from logits [2B, V]."""
    whole = logits.astype(np.float64)
    conditional, unconditional = np.split((whole.max(-1) - sampling.log_softmax(whole).max(-1)), 2)
    return (guidance * conditional - (guidance - 1) * unconditional)[:, None]


def _checkpoint(golden: Golden) -> Checkpoint:
    model = ModelConfig(name="golden", vocabulary=VOCABULARY, language_model=configs.language_model(golden.config))
    return configs.checkpoint(golden, model, {"language_model": ""}, weights=configs.llama_weights(golden))
