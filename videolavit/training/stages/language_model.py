"""Stage `language-model`: one Llama writes text, pictures and motion.

Objective (training notes of the specification): next-token cross-entropy over mixed rows in both orders, [text, visual]
and [visual, text], pictures and videos; the text is dropped at random, so that guidance has an unconditional branch.
Captions can be told from wrong ones besides (`negatives`). Which of two things does what hardly counts among all ids of
a clip, and may never be learnt from them; where only that sets two captions apart, it is all that counts (hard
negatives, as for CLIP in arXiv 2210.01936, here with the likelihoods of the one model).
Rows are those of `videolavit.training.stages.sequences`. Padding stands on the right, where the causal mask alone keeps
it from every real position, and the vocabulary's scores are computed at learnt positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from torch import Tensor, nn

from runtime.errors import UsageError
from runtime.vocabulary import Vocabulary
from videolavit.training.data.examples import Negative, Question
from videolavit.training.data.shards import Text
from videolavit.training.data.tokenized import TokenizedDataset
from videolavit.training.settings import Count, CountOrNone, NotNegative, Share
from videolavit.training.stage import Stage, StageContext
from videolavit.training.stages import sequences
from videolavit.training.stages.clips import More, check_shares, tokenized_folder
from videolavit.training.stages.sequences import ANSWER, CONTEXT, GENERATED, Compared, Item, Layout, Mix, Row
from videolavit.training.stages.starting import trainable
from videolavit.training.stages.writing import HeldOut


class PartWeights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a token of each part counts in the loss of generation rows."""

    text: NotNegative = 1.0
    image: NotNegative = 1.0
    motion: NotNegative = 1.0


class Validation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Figures on held-out scenes of the world of shapes.

    Attributes:
        scenes: their number; 0: no validation.
        greedy_image: take the likeliest image ids instead of sampling them.
        text_guidance, motion_guidance, top_k, temperature: as in the runtime; None is the model's own default.
    """

    scenes: CountOrNone = 0
    greedy_image: bool = False
    text_guidance: float | None = None
    motion_guidance: float | None = None
    top_k: int | None = None
    temperature: float | None = None


class Negatives(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Captions told from wrong ones.

    Attributes:
        share: of the generation rows of items that have negatives.
        visual_first: share of these in the order [visual, text], in which the texts' likelihoods are compared; in the
            other it is what is seen that has to be likelier after the right text.
        topics: what is wrong in the captions of that other order; empty: anything. An item that has none of them gives
            a generation row.
        motion: share of that other order, of clips, in which the motion alone has to be likelier, after text and
            picture. It needs `topics`: after a text that is wrong about the picture, motion can be made unlikely
            without knowing what moves which way.
        weight: of the loss, softplus(log p(wrong row) - log p(right row)), beside the others.
    """

    share: Share = 0.0
    visual_first: Share = 0.5
    topics: list[str] = msgspec.field(default_factory=list)
    motion: Share = 0.0
    weight: NotNegative = 1.0

    @property
    def counts(self) -> float:
        """What their loss counts beside the others: `weight`, or 0 when none are asked for."""
        return float(self.weight) if self.share else 0.0


class LanguageModelOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the stage `language-model`.

    Attributes:
        mix: forms of rows.
        weights: of the parts of the vocabulary.
        negatives: captions told from wrong ones.
        repeats: how often an item comes in an epoch, each time with other words and another form.
        more: other tokenised folders and their shares; the rest of the rows are of `data.path`.
        groups: runs of rows of like length that a batch is computed in; more save padding, fewer are larger.
        longest: most positions of a generation row; None: the model's.
        validation: figures on held-out scenes.
    """

    mix: Mix = Mix()
    weights: PartWeights = PartWeights()
    negatives: Negatives = Negatives()
    repeats: Count = 1
    more: list[More] = msgspec.field(default_factory=list)
    groups: Count = 4
    longest: Annotated[int, msgspec.Meta(ge=8)] | None = None
    validation: Validation = Validation()


class SequenceModel(nn.Module):
    """The language model and, for pictures as features, their projection.

    Args:
        answers: what the mean loss of answers counts beside that of generation rows.
        negatives: what the mean loss of telling captions from wrong ones counts.
    """

    def __init__(
        self,
        language_model: Any,
        vocabulary: Vocabulary,
        weights: PartWeights,
        *,
        projector: nn.Module | None = None,
        answers: float = 1.0,
        negatives: float = 0.0,
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.projector = projector
        self.vocabulary, self.weights, self.answers, self.negatives = vocabulary, weights, answers, negatives

    def forward(self, batch: dict[str, Any], generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """batch of `sequences.collate`, with `merged` [M, W] where it has places -> losses in nats per token."""
        _, losses, labels, kinds, rows = self.predict(batch)
        text, image = labels < self.vocabulary.text_size, labels < self.vocabulary.motion_start
        weights = self.weights
        worth = torch.where(text, weights.text, torch.where(image, weights.image, weights.motion))
        generated, answered = kinds == GENERATED, kinds == ANSWER
        parts = {"text": generated & text, "image": generated & image & ~text, "motion": generated & ~image}
        if self.projector is not None:
            parts["answer"] = answered
        loss = _mean(losses, generated * worth) + self.answers * _mean(losses, answered)
        means = {name: _mean(losses.detach(), mask) for name, mask in parts.items()}
        if self.negatives:
            apart = nats_apart(batch, losses, rows)
            told = F.softplus(-apart).sum() / max(1, len(apart))
            loss = loss + self.negatives * told
            means["negatives"] = told.detach()
        # All parts, always, because processes average what they log by name; 0 for one that is not in the batch.
        return {"loss": loss, **means}

    def predict(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """At all n learnt positions of a batch, by rows: likeliest id, loss, label, kind and row, [n] each."""
        model = self.language_model
        embeds = model.get_input_embeddings()(batch["ids"])  # [B, S, D]
        if self.projector is not None and "merged" in batch:
            features = self.projector(batch["merged"])  # [M, D]
            embeds = embeds.index_put(tuple(batch["places"].unbind(1)), features.to(embeds.dtype))
        found: list[tuple[Tensor, ...]] = []
        for start, stop, longest in batch["groups"]:
            labels, kinds = batch["labels"][start:stop, :longest], batch["kinds"][start:stop, :longest]
            learnt = kinds != CONTEXT
            hidden = model.model(inputs_embeds=embeds[start:stop, :longest], use_cache=False).last_hidden_state
            scores = model.lm_head(hidden[learnt]).float()  # [n, V]
            losses = F.cross_entropy(scores, labels[learnt], reduction="none")
            rows = start + learnt.nonzero()[:, 0]
            found.append((scores.detach().argmax(-1), losses, labels[learnt], kinds[learnt], rows))
        best, losses, labels, kinds, rows = (torch.cat(part) for part in zip(*found, strict=True))
        return best, losses, labels, kinds, rows


def nats_apart(batch: dict[str, Any], losses: Tensor, rows: Tensor) -> Tensor:
    """By how many nats the row of the right text is likelier than that of the wrong one, [K] for the batch's pairs.

    `losses` and `rows` [n] as `SequenceModel.predict` gives them.
    """
    nats = torch.zeros(len(batch["ids"]), device=losses.device).index_add(0, rows, losses)  # [B]
    right, wrong = batch.get("pairs", rows.new_zeros(0, 2)).unbind(1)  # [K] each
    return nats[wrong] - nats[right]


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp_min(1e-6)


class LanguageModelStage(Stage):
    """Trains the language model on tokenised pictures and videos."""

    name: ClassVar[str] = "language-model"
    trains: ClassVar[tuple[str, ...]] = ("language_model",)
    Options: ClassVar[type[msgspec.Struct]] = LanguageModelOptions
    module: SequenceModel
    fields: ClassVar[tuple[str, ...]] = ("visual_ids", "motion_ids")

    def __init__(self, context: StageContext, options: Any) -> None:
        super().__init__(context, options)
        config = context.checkpoint.config
        longest = options.longest or config.language_model.max_positions
        self.layout = Layout(context.checkpoint.tokenizer, config.vocabulary, longest)
        self.module = self.build_module()
        self._held_out: HeldOut | None = None

    def build_module(self) -> SequenceModel:
        language_model = trainable(self.context, "language_model")
        return SequenceModel(
            language_model,
            self.context.checkpoint.config.vocabulary,
            self.options.weights,
            negatives=self.options.negatives.counts,
        )

    def dataset(self) -> sequences.Rows:  # type: ignore[override]
        folder = tokenized_folder(self.context.data, self.fields, self.name)
        check_shares(self.options.more)
        more = [(self._items(other.path), other.share) for other in self.options.more]
        rows = sequences.Rows(self._items(folder), self.context.seed, self.options.repeats, self.row, more)
        _check_negatives(self.options.negatives, rows.folders)
        return rows

    def _items(self, folder: Path | str) -> TokenizedDataset:
        """The tokenised folder `folder`; one of pictures alone has no motion."""
        stored = TokenizedDataset(folder).fields
        items = TokenizedDataset(folder, [name for name in self.fields if name != "motion_ids" or name in stored])
        items.require(self.context.checkpoint)
        return items

    def row(self, item: Item, index: int, rng: np.random.Generator) -> Row | None:
        """The row that draw `index` makes of `item`."""
        negatives, options = item.get("negatives", ()), self.options.negatives
        if options.share and negatives and rng.random() < options.share:
            negative: Negative | None = negatives[int(rng.integers(len(negatives)))]
            compared: Compared = "text"
            if rng.random() >= options.visual_first:
                alone = len(item.get("motion_ids", ())) > 0 and rng.random() < options.motion
                compared = "motion" if alone else "visual"
                if options.topics:
                    about = [each for each in negatives if each.topic in options.topics]
                    negative = about[int(rng.integers(len(about)))] if about else None
            if negative is not None:
                return self.layout.telling(item, negative, compared)
        return self.layout.generation(item, self.options.mix, rng)

    def collate(self, items: list[Any]) -> dict[str, Any]:
        return sequences.collate(items, self.options.groups)

    @torch.no_grad()
    def validate(self, generator: torch.Generator) -> dict[str, float]:
        held_out = self.held_out()
        if held_out is None:
            return {}
        mix = Mix(condition_dropout=0, motion_alone=0, visual_first=0, learn_prompts=False)
        rng = np.random.default_rng(0)
        rows = [self.layout.generation(item, mix, rng) for item in held_out.items]
        batch = self.prepare(send_to_device(self.collate(rows), self.context.device), generator)
        # 0 is what a part has that no row has.
        losses = {f"held-out {name}": float(loss) for name, loss in self.module(batch, generator, 0).items() if loss}
        return losses | held_out.generation(self.module.language_model, self.layout, self.options.validation)

    def held_out(self) -> HeldOut | None:
        """Held-out scenes, made when they are first asked for."""
        if self._held_out is None and self.options.validation.scenes:
            self._held_out = HeldOut(self.context.checkpoint, self.options.validation.scenes)
        return self._held_out

    def components(self) -> dict[str, dict[str, Tensor]]:
        return {"language_model": dict(self.module.language_model.state_dict())}


def missing_topics(
    named: Iterable[str], folders: Iterable[TokenizedDataset], of: Callable[[Text], Iterable[Question | Negative]]
) -> tuple[set[str], set[str]]:
    """Those of the topics `named` that nothing is about, and all that were met until reading stopped.

    `of` picks the questions or the negatives of what is said about an item.
    """
    missing, met = set(named), set[str]()
    for said in _sayings(folders):
        topics = {each.topic for each in of(said)}
        met |= topics
        missing -= topics
        if not missing:
            break
    return missing, met


def _check_negatives(options: Negatives, folders: Sequence[TokenizedDataset]) -> None:
    """Raise UsageError when what is asked for is nowhere in `folders`."""
    if not options.share:
        return
    if not any(said.negatives for said in _sayings(folders)):
        raise UsageError(
            f"options.negatives.share {options.share}: no item of the data has negatives; give some beside its "
            "captions, or tokenise the world of shapes again"
        )
    if options.motion and not options.topics:
        raise UsageError(
            f"options.negatives.motion {options.motion}: options.negatives.topics is empty; name what is wrong in the "
            "captions that motion shall be told from, for example motion"
        )
    missing, _ = missing_topics(options.topics, folders, lambda said: said.negatives)
    if missing:
        raise UsageError(
            f"options.negatives.topics {', '.join(sorted(missing))}: no caption of the data is wrong about it; name "
            "others, or give some beside its captions"
        )


def _sayings(folders: Iterable[TokenizedDataset]) -> Iterator[Text]:
    """What is said about every item, read when it is asked for."""
    return (folder.said(index) for folder in folders for index in range(len(folder)))
