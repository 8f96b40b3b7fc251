"""Stage `instruct`: questions about pictures and videos, and their answers.

Objective: cross-entropy on answers alone, after the conversation of `runtime.prompts` (reference semantics §13) with
pictures as the merger's continuous features through `vit_proj` and motion as ids. Vision transformer, token predictor
and merger stay frozen; which patches are kept is drawn anew each time. The small model has one language model for
writing and for answering, so a share of the rows are generation rows of the stage before: nothing is forgotten.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import msgspec
import numpy as np
import torch
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from torch import Tensor

from runtime.errors import UsageError
from videolavit.training.data.examples import Question
from videolavit.training.data.tokenized import TokenizedDataset
from videolavit.training.settings import NotNegative, Positive, Share
from videolavit.training.stage import StageContext
from videolavit.training.stages.language_model import (
    LanguageModelOptions,
    LanguageModelStage,
    SequenceModel,
    missing_topics,
)
from videolavit.training.stages.sequences import Item, Row, Rows
from videolavit.training.stages.starting import trainable

CHUNK = 64  # rows of a validation batch


class InstructOptions(LanguageModelOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the stage `instruct`: those of `language-model`, and these.

    Attributes:
        generation: share of the rows that are generation rows.
        answers: what the mean loss of answers counts beside that of generation rows.
        topics: how often a topic is asked about against the others that a picture or clip has questions of; 1 for those
            that are not named.
        contrasts: share of the questions that are only asked if something else in the same picture or clip has another
            answer. Which of two shapes has which colour may stay a guess until hardly anything else is asked.
        pairs: share of the generation rows that are only made of pictures and clips in which one of the named `topics`
            has two answers. What is said of one of two shapes may otherwise be drawn as the other.
        motion: share of the conversations about clips in which the motion's ids are learnt too, like those of
            generation rows. Which of two shapes moves which way is told by where the motion is, and to foresee it the
            model has to look at what stands there.
        reading: share of the questions of the named `topics` that are asked about a caption, with nothing to be seen:
            every caption has to answer them. To write a clip, what is said of which of two shapes has to be known.
    """

    generation: Share = 0.3
    answers: NotNegative = 1.0
    topics: Mapping[str, Positive] = msgspec.field(default_factory=dict)
    contrasts: Share = 0.0
    pairs: Share = 0.0
    motion: Share = 0.0
    reading: Share = 0.0


class InstructStage(LanguageModelStage):
    """Trains the language model and `vit_proj` of the visual tokenizer on questions.

    Raises UsageError when `pairs` are asked for and no topic is named that tells two shapes apart, and when a named
    topic is nowhere in the data.
    """

    name: ClassVar[str] = "instruct"
    trains: ClassVar[tuple[str, ...]] = ("language_model", "visual_tokenizer")
    Options: ClassVar[type[msgspec.Struct]] = InstructOptions
    fields: ClassVar[tuple[str, ...]] = ("visual_ids", "motion_ids", "features", "keep_logits")

    def __init__(self, context: StageContext, options: InstructOptions) -> None:
        if options.pairs and not options.topics:
            raise UsageError(
                f"options.pairs {options.pairs}: options.topics is empty; name the topics that must have two answers"
            )
        super().__init__(context, options)

    def build_module(self) -> SequenceModel:
        frozen = cast(Any, self.context.checkpoint.component("visual_tokenizer"))
        self.tokenizer = copy.deepcopy(frozen).to(self.context.device)
        return SequenceModel(
            trainable(self.context, "language_model"),
            self.context.checkpoint.config.vocabulary,
            self.options.weights,
            projector=copy.deepcopy(frozen.vit_proj).requires_grad_(True).train(),
            answers=self.options.answers,
            negatives=self.options.negatives.counts,
        )

    def dataset(self) -> Rows:  # type: ignore[override]
        rows = super().dataset()
        _check_topics(self.options.topics, rows.folders)
        return rows

    def row(self, item: Item, index: int, rng: np.random.Generator) -> Row | None:
        questions: Sequence[Question] = item["questions"]
        topics: dict[str, list[Question]] = defaultdict(list)
        for question in questions:
            topics[question.topic].append(question)
        if not questions or rng.random() < self.options.generation:
            wanted = self.options.pairs and rng.random() < self.options.pairs  # switched off it draws no number
            if wanted and not any(_contrast(topics.get(name, ())) for name in self.options.topics):
                return None
            return super().row(item, index, rng)
        weights = np.array([self.options.topics.get(topic, 1.0) for topic in topics])
        asked = topics[list(topics)[int(rng.choice(len(topics), p=weights / weights.sum()))]]
        if rng.random() < self.options.contrasts and not _contrast(asked):
            return None
        question = asked[int(rng.integers(len(asked)))]
        captions, reading = item["captions"], self.options.reading
        if reading and question.topic in self.options.topics and captions and rng.random() < reading:
            caption = captions[int(rng.integers(len(captions)))]
            return self.layout.reading(caption, question.question, question.answer)
        learn_motion = rng.random() < self.options.motion
        key = (self.context.seed, index)
        return self.layout.conversation(item, question.question, question.answer, key, learn_motion=learn_motion)

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        width = self.context.checkpoint.config.visual_tokenizer.eva.width
        if "features" not in batch:
            # The projection runs on nothing: where it did not run, its gradient would be missing, not zero.
            device = batch["ids"].device
            empty = torch.zeros(0, 2, dtype=torch.long, device=device)
            return {**batch, "merged": torch.zeros(0, width, device=device), "places": empty}
        merged = self.tokenizer.merge(batch["features"], batch["keep"])  # [P, N, W]
        return {**batch, "merged": merged[batch["keep"] > 0.5]}

    @torch.no_grad()
    def validate(self, generator: torch.Generator) -> dict[str, float]:
        held_out = self.held_out()
        if held_out is None:
            return {}
        asked = [(item, question) for item in held_out.items for question in item["questions"]]
        right: dict[str, list[bool]] = defaultdict(list)
        for start in range(0, len(asked), CHUNK):
            part = asked[start : start + CHUNK]
            rows = [
                self.layout.conversation(item, question.question, question.answer, (0, start + offset))
                for offset, (item, question) in enumerate(part)
            ]
            order = sorted(range(len(rows)), key=lambda at: len(rows[at].ids))
            batch = send_to_device(self.collate([rows[at] for at in order]), self.context.device)
            batch = self.prepare(batch, generator)
            best, _, labels, _, _ = self.module.predict(batch)
            # A greedy answer is exact if, and only if, every id of it is the likeliest after those before.
            counts = [sum(kind > 0 for kind in rows[at].kinds) for at in order]
            for at, matches in zip(order, (best == labels).split(counts), strict=True):
                right[part[at][1].topic].append(bool(matches.all()))
        answers = {f"answers {topic}": float(np.mean(hits)) for topic, hits in sorted(right.items())}
        total = float(np.mean([hit for hits in right.values() for hit in hits]))
        return {"answers": total, **answers, **super().validate(generator)}

    def components(self) -> dict[str, dict[str, Tensor]]:
        state = dict(self.context.checkpoint.component("visual_tokenizer").state_dict())
        projector = cast(Any, self.module.projector)
        projected = {f"vit_proj.{name}": value for name, value in projector.state_dict().items()}
        return {**super().components(), "visual_tokenizer": state | projected}


def _check_topics(named: Iterable[str], folders: Sequence[TokenizedDataset]) -> None:
    """Raise UsageError for a topic that no question of `folders` has."""
    missing, met = missing_topics(named, folders, lambda said: said.questions)
    if missing:
        there = ", ".join(sorted(met)) or "no questions at all"
        wanted = ", ".join(sorted(missing))
        raise UsageError(f"options.topics {wanted}: no question of the data is about it; there are: {there}")


def _contrast(asked: Sequence[Question]) -> bool:
    """Whether questions of one topic have different answers."""
    return len({question.answer for question in asked}) > 1
