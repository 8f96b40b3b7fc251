"""Rows of ids for the language model, laid out as the runtime's contexts are.

Contract: what a row looks like is decided here and nowhere else. A generation row is text without `<s>` and then, for
every picture or clip, image_start, visual ids, image_end and, for a clip, motion_start, motion ids, motion_end
(reference semantics §12); the other order ends with the text and `</s>`. Without its text it is what a picture alone
gives, and its beginning, like that of motion alone, is the unconditional context of guidance (§10.4). A conversation
row is the prompt of `runtime.prompts`, the picture's place filled with slots for continuous features (§13.2), and the
answer with its separator. A telling row is a generation row of either order with another row beside it that has a wrong
text, and a reading row asks about a caption where nothing is seen. Numbers are drawn from the generator that is passed
in.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from runtime.errors import UsageError
from runtime.prompts import STOP, question_ids
from runtime.tokenizers import TextTokenizer
from runtime.vocabulary import EOS, UNK, Vocabulary
from videolavit.training.data.encoding import keep_draw
from videolavit.training.data.examples import Negative
from videolavit.training.settings import Share
from videolavit.training.stages.clips import give_way

# Kinds of positions: context is not learnt, and with a wrong text nothing but that it makes a row less likely.
CONTEXT, GENERATED, ANSWER, WRONG = 0, 1, 2, 3
NO_LABEL = -100
TRIES = 1000  # items that may have no row to give, one after the other
SLOT = UNK  # stands where a feature is put; never looked up

Item = dict[str, Any]  # of `TokenizedDataset`
Compared = Literal["text", "visual", "pictures", "motion"]  # whose likelihoods set a caption and a wrong one apart


class Mix(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often generation rows take which form.

    Attributes:
        condition_dropout: chance that the text is left out.
        motion_alone: chance that a clip's motion stands alone, from position 0.
        visual_first: chance of the order [visual, text] where the text is not left out.
        learn_prompts: whether the text of [text, visual] is learnt too.
    """

    condition_dropout: Share = 0.1
    motion_alone: Share = 0.05
    visual_first: Share = 0.15
    learn_prompts: bool = True


@dataclass
class Row:
    """Ids, the kind of each, the positions of feature slots, and the features [n, N, W] and keep draws [n, N].

    `wrong` is a row of the same picture or clip with a wrong text.
    """

    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    features: Tensor | None = None
    keep: Tensor | None = None
    wrong: Row | None = None

    def add(self, ids: Sequence[int], kind: int) -> None:
        self.ids += ids
        self.kinds += [kind] * len(ids)

    def add_slots(self, count: int) -> None:
        self.slots += range(len(self.ids), len(self.ids) + count)
        self.add([SLOT] * count, CONTEXT)


class Layout:
    """Makes rows of the items of a `TokenizedDataset`.

    Args:
        tokenizer: bytes of the checkpoint's SentencePiece model.
        longest: most positions of a generation row; what comes later is cut.
    """

    def __init__(self, tokenizer: bytes, vocabulary: Vocabulary, longest: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.model"
            path.write_bytes(tokenizer)
            self.text = TextTokenizer(path)
        self.vocabulary, self.longest = vocabulary, longest

    def generation(self, item: Item, mix: Mix, rng: np.random.Generator) -> Row:
        """A row in which all ids are learnt, the prompt's perhaps not."""
        row = Row()
        spans = self.spans(item)
        drop, alone, first, pick, clip = rng.random(5)
        motions = item.get("motion_ids", ())
        captions = item["captions"]
        if len(motions) and alone < mix.motion_alone:
            row.add(self._motion_span(motions[int(clip * len(motions))]), GENERATED)
            return row
        if not captions or drop < mix.condition_dropout:
            row.add(spans, GENERATED)
            return self._cut(row)
        words = self.text.encode(captions[int(pick * len(captions))])
        if first < mix.visual_first:
            row.add(spans, GENERATED)
            row.add([*words, EOS], GENERATED)
        else:
            row.add(words, GENERATED if mix.learn_prompts else CONTEXT)
            row.add(spans, GENERATED)
        return self._cut(row)

    def telling(self, item: Item, negative: Negative, compared: Compared) -> Row:
        """The row of the caption, and as its `wrong` that of the wrong one.

        Summed likelihoods of the two tell p(text | visual) apart where `compared` is the text: then all ids of
        [visual, text] have one, of which the visual ids' are the same in both. Otherwise they tell p(visual | text),
        p(pictures | text, motion before them) or p(motion | text, pictures).
        """
        right, wrong, spans = Row(), Row(), self.spans(item)
        for row, text, kind in ((right, negative.caption, GENERATED), (wrong, negative.wrong, WRONG)):
            words = self.text.encode(text)
            if compared == "text":
                row.add([*spans, *words, EOS], kind)
            else:
                row.add(words, CONTEXT)
                for id_ in spans:
                    part = "motion" if id_ >= self.vocabulary.first_motion else "pictures"
                    row.add([id_], kind if compared in ("visual", part) else CONTEXT)
            self._cut(row)
        right.wrong = wrong
        return right

    def reading(self, caption: str, question: str, answer: str) -> Row:
        """A caption, a question about it and the answer, which is learnt."""
        row = Row()
        row.add(self.text.encode(f"{caption} {question}"), CONTEXT)
        row.add(self.answer_ids(answer), ANSWER)
        return row

    def conversation(
        self, item: Item, question: str, answer: str, key: tuple[int, int], *, learn_motion: bool = False
    ) -> Row:
        """A row in which the answer is learnt, and the motion ids with it if `learn_motion`.

        `key` = (seed, index) decides which patches are kept.
        """
        row, vocabulary = Row(), self.vocabulary
        motions = item.get("motion_ids", ())
        before, after = question_ids(self.text, question, "video" if len(motions) else "image")
        row.add(before, CONTEXT)
        row.features = item["features"]
        row.keep = torch.from_numpy(
            np.stack([keep_draw(logits.numpy(), *key, k) for k, logits in enumerate(item["keep_logits"])])
        )  # [n, N]
        for index, keep in enumerate(row.keep):
            row.add([vocabulary.image_start], CONTEXT)
            row.add_slots(int(keep.sum()))
            row.add([vocabulary.image_end], CONTEXT)
            if len(motions):
                row.add(self._motion_span(motions[index]), GENERATED if learn_motion else CONTEXT)
        row.add(after, CONTEXT)
        row.add(self.answer_ids(answer), ANSWER)
        return row

    def answer_ids(self, answer: str) -> list[int]:
        """What is written after the prompt's last colon: answer, separator, end (§13.1)."""
        return self.text.encode(f"{answer} {STOP} </s>")

    def spans(self, item: Item) -> list[int]:
        """Pictures and motion of an item: image, or image, motion, image, motion ..."""
        vocabulary, ids = self.vocabulary, list[int]()
        motions = item.get("motion_ids", ())
        for index, visual in enumerate(item["visual_ids"]):
            ids += [vocabulary.image_start, *visual.tolist(), vocabulary.image_end]
            if len(motions):
                ids += self._motion_span(motions[index])
        return ids

    def _motion_span(self, motion: Tensor) -> list[int]:
        return [self.vocabulary.motion_start, *motion.tolist(), self.vocabulary.motion_end]

    def _cut(self, row: Row) -> Row:
        del row.ids[self.longest :], row.kinds[self.longest :]
        return row


class Rows(Dataset[Row]):
    """Rows of tokenised items; every item comes `repeats` times in an epoch, each time with its own draws.

    Args:
        make: (item, index, generator) -> row, or None for an item that has none to give: then the next one is asked.
        more: other items and the share of the rows that they take the place of.
    """

    def __init__(
        self,
        items: Any,
        seed: int,
        repeats: int,
        make: Callable[[Item, int, np.random.Generator], Row | None],
        more: Sequence[tuple[Any, float]] = (),
    ) -> None:
        self.items, self.seed, self.repeats, self.make, self.more = items, seed, repeats, make, tuple(more)

    @property
    def folders(self) -> list[Any]:
        """All that rows are made of: `items`, and the others."""
        return [self.items, *(items for items, _ in self.more)]

    def __len__(self) -> int:
        return len(self.items) * self.repeats

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index])
        items = give_way(self.items, self.more, rng.random())
        for place in range(index, index + TRIES):
            row = self.make(items[place % len(items)], index, rng)
            if row is not None:
                return row
        raise UsageError(
            f"{TRIES} items have no row of the kind that is asked for, from item {index % len(items)} on; ask for less "
            "(options of the stage that choose items, like contrasts), or tokenise other data"
        )


def collate(rows: Sequence[Row], groups: int) -> dict[str, Any]:
    """Rows as one batch, shortest first.

    Returns:
        ids [B, S] with UNK as padding; labels [B, S]: the id to be written after each position or NO_LABEL; kinds
        [B, S] of the labels; groups: (first row, end, positions) of runs of rows with little padding; with features:
        features [P, N, W], keep [P, N], places [M, 2]: row and position of every kept patch in their order; and with
        wrong texts: pairs [K, 2], the rows of the right and of the wrong text.
    """
    told = [(row, row.wrong) for row in rows if row.wrong is not None]
    rows = sorted([*rows, *(wrong for _, wrong in told)], key=lambda row: len(row.ids))
    longest = len(rows[-1].ids)
    ids = torch.full((len(rows), longest), UNK)
    labels, kinds = torch.full_like(ids, NO_LABEL), torch.full_like(ids, CONTEXT)
    for index, row in enumerate(rows):
        count = len(row.ids)
        ids[index, :count] = torch.tensor(row.ids)
        kinds[index, : count - 1] = torch.tensor(row.kinds[1:], dtype=torch.long)
        learnt = kinds[index] != CONTEXT
        labels[index, learnt] = torch.roll(ids[index], -1)[learnt]
    edges = np.linspace(0, len(rows), min(groups, len(rows)) + 1).astype(int).tolist()
    spans = [[a, b, len(rows[b - 1].ids)] for a, b in pairwise(edges)]
    batch: dict[str, Any] = {"ids": ids, "labels": labels, "kinds": kinds, "groups": spans}
    seen = [(index, row) for index, row in enumerate(rows) if row.features is not None]
    if seen:
        batch["features"] = torch.cat([row.features for _, row in seen if row.features is not None])
        batch["keep"] = torch.cat([row.keep for _, row in seen if row.keep is not None])
        batch["places"] = torch.tensor([(index, slot) for index, row in seen for slot in row.slots])
    if told:
        at = {id(row): index for index, row in enumerate(rows)}
        batch["pairs"] = torch.tensor([(at[id(right)], at[id(wrong)]) for right, wrong in told])
    return batch
