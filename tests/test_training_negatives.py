"""Captions told from wrong ones: the rows that are compared, their loss, and how often they come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_rows import ITEMS, TEXT_FIRST, V, item, small_checkpoint, stage, tokenized
from PIL import Image

from runtime.errors import UsageError
from runtime.vocabulary import EOS
from videolavit.checkpoints import Checkpoint, load
from videolavit.tokenizer_training import SHAPES_TOKENIZER
from videolavit.training.data.examples import Negative
from videolavit.training.data.tokenizing import Plan, tokenize
from videolavit.training.settings import DataSettings
from videolavit.training.stage import StageContext
from videolavit.training.stages import sequences
from videolavit.training.stages.language_model import LanguageModelOptions, LanguageModelStage, Negatives, PartWeights
from videolavit.training.stages.sequences import CONTEXT, GENERATED, WRONG, Compared, Layout

COMPARED: tuple[Compared, ...] = ("text", "visual", "pictures", "motion")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return small_checkpoint()


@pytest.fixture(scope="module")
def layout() -> Layout:
    return Layout(SHAPES_TOKENIZER.read_bytes(), V, 512)


@pytest.mark.parametrize("compared", COMPARED)
def test_a_caption_and_a_wrong_one_stand_with_the_same_clip(layout: Layout, compared: Compared) -> None:
    negative = Negative("a red circle moving right", "a blue circle moving right")
    row = layout.telling(ITEMS[0], negative, compared)
    assert row.wrong is not None and row.wrong.wrong is None
    spans, motion = layout.spans(ITEMS[0]), ITEMS[0]["motion_ids"][0].tolist()
    for made, text, kind in ((row, negative.caption, GENERATED), (row.wrong, negative.wrong, WRONG)):
        words = layout.text.encode(text)
        assert made.ids == ([*spans, *words, EOS] if compared == "text" else [*words, *spans])
        seen = {"text": made.ids, "visual": spans, "motion": motion, "pictures": [i for i in spans if i not in motion]}
        counted = [i for i, found in zip(made.ids, made.kinds, strict=True) if found != CONTEXT]
        assert counted == seen[compared] and set(made.kinds) <= {CONTEXT, kind}


def test_what_is_seen_is_told_by_topics_and_half_of_it_by_motion_alone(checkpoint: Checkpoint) -> None:
    options = LanguageModelOptions(negatives=Negatives(share=1.0, visual_first=0.25, motion=0.5, topics=["motion"]))
    trained = stage(LanguageModelStage, options, checkpoint)
    wrongs = (Negative("red", "blue", "colour"), Negative("to the right", "to the left", "motion"))
    rich, poor = (ITEMS[0] | {"negatives": wrongs[:count]} for count in (2, 1))
    still = {name: value for name, value in rich.items() if name != "motion_ids"}

    def text_first(item_: dict[str, Any]) -> list[sequences.Row]:
        rows = [trained.row(item_, 0, np.random.default_rng(seed)) for seed in range(400)]
        told = [row for row in rows if row is not None and row.wrong is not None]
        return [row for row in told if row.ids[0] != V.image_start]

    def alone(rows: list[sequences.Row]) -> int:
        return sum((V.motion_start, CONTEXT) in zip(row.ids, row.kinds, strict=True) for row in rows)

    found, pictures, words = text_first(rich), text_first(still), trained.layout.text.encode("to the right")
    assert 0.7 < len(found) / 400 < 0.8 and 0.4 < alone(found) / len(found) < 0.6
    assert 0.7 < len(pictures) / 400 < 0.8 and not alone(pictures)
    assert all(row.ids[: len(words)] == words for row in [*found, *pictures])
    assert not text_first(poor)


@pytest.mark.parametrize("compared", COMPARED)
def test_the_loss_of_negatives_is_that_of_the_rows_read_alone(checkpoint: Checkpoint, compared: Compared) -> None:
    options = LanguageModelOptions(negatives=Negatives(share=1.0, weight=0.5), weights=PartWeights(motion=2.0))
    trained = stage(LanguageModelStage, options, checkpoint)
    layout, wrong = trained.layout, "a blue circle moving left"
    told = [layout.telling(x, Negative(x["captions"][0], wrong), compared) for x in ITEMS[1:4]]
    others = [layout.generation(x, TEXT_FIRST, np.random.default_rng(0)) for x in ITEMS[4:7]]
    nats = []  # of the right and of the wrong row: [K][2]
    for row in told:
        assert row.wrong is not None
        pair = [replace(row, wrong=None), row.wrong]
        nats.append([float(trained.module.predict(sequences.collate([one], 1))[1].sum().detach()) for one in pair])
    expected = np.mean([np.log1p(np.exp(right - wrong)) for right, wrong in nats])
    with torch.no_grad():
        together = trained.module(sequences.collate([*others, *told], 3), torch.Generator(), 0)
        alone = [replace(row, wrong=None) for row in told]
        without = trained.module(sequences.collate([*others, *alone], 3), torch.Generator(), 0)
    assert float(together["negatives"]) == pytest.approx(expected, rel=1e-4) and expected > 0.01
    assert float(without["negatives"]) == 0
    # Wrong rows are in no other loss.
    assert float(together["loss"]) == pytest.approx(float(without["loss"]) + 0.5 * expected, rel=1e-4)


@pytest.mark.parametrize("how", [{"visual_first": 0.0}, {"visual_first": 1.0}, {"visual_first": 0.0, "motion": 1.0}])
def test_right_is_told_from_wrong_after_some_steps(checkpoint: Checkpoint, how: dict[str, float]) -> None:
    options = LanguageModelOptions(negatives=Negatives(share=1.0, topics=["motion"], **how))
    trained = stage(LanguageModelStage, options, checkpoint)
    wrong = [item(index)["captions"][0] for index in range(5, 21)]  # another colour and another way than the item's
    told = [x | {"negatives": (Negative(x["captions"][0], no, "motion"),)} for x, no in zip(ITEMS, wrong, strict=True)]
    rows = sequences.Rows(told, 3, 50, trained.row)
    optimizer = torch.optim.AdamW(trained.module.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for step in range(40):
        batch = trained.collate([rows[step * 8 + at] for at in range(8)])
        found = trained.module(batch, torch.Generator(), step)
        found["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(found["negatives"].detach()))
    assert np.mean(losses[-5:]) < 0.3 < 0.6 < losses[0]


def test_negatives_come_as_often_as_asked_and_only_where_there_are_some(checkpoint: Checkpoint) -> None:
    options = LanguageModelOptions(negatives=Negatives(share=0.5, visual_first=0.25))
    trained = stage(LanguageModelStage, options, checkpoint)
    rich = ITEMS[0] | {"negatives": (Negative("a red circle", "a blue circle"),)}
    rows = [trained.row(rich, 0, np.random.default_rng(seed)) for seed in range(400)]
    told = [row for row in rows if row is not None and row.wrong is not None]
    assert 0.4 < len(told) / len(rows) < 0.6
    first = [row.kinds[0] == GENERATED for row in told]
    assert 0.15 < np.mean(first) < 0.35
    poor = [trained.row(ITEMS[0] | {"negatives": ()}, 0, np.random.default_rng(seed)) for seed in range(20)]
    assert all(row is not None and row.wrong is None for row in poor)


def test_data_without_negatives_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tokens, source = tokenized(checkpoint, tmp_path)
    context = StageContext(
        checkpoint=load(source),
        data=DataSettings(source="tokenized", path=str(tokens)),
        seed=0,
        device=torch.device("cpu"),
    )
    options = LanguageModelOptions(negatives=Negatives(share=0.5))
    assert LanguageModelStage(context, options).dataset().items.said(0).negatives
    for wrong, message in (
        (Negatives(share=0.5, motion=0.5), r"options\.negatives\.motion 0\.5: options\.negatives\.topics is empty"),
        (Negatives(share=0.5, topics=["colour", "mood"]), r"topics mood: no caption of the data is wrong about it"),
    ):
        with pytest.raises(UsageError, match=message):
            LanguageModelStage(context, LanguageModelOptions(negatives=wrong)).dataset()
    poor, folder = tmp_path / "poor", tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "one.png")
    (folder / "one.txt").write_text("a picture\n")
    plan = Plan(data=DataSettings(source="folder", path=str(folder)), checkpoint=source, fields=("visual_ids",))
    tokenize(plan, poor)
    context = replace(context, data=DataSettings(source="tokenized", path=str(poor)))
    with pytest.raises(UsageError, match=r"options\.negatives\.share 0\.5: no item of the data has negatives"):
        LanguageModelStage(context, options).dataset()
    (folder / "one.json").write_text('{"negatives": [{"caption": "gloomy", "wrong": "merry", "topic": "mood"}]}')
    tokenize(plan, poor, force=True)
    options = LanguageModelOptions(negatives=Negatives(share=0.5, motion=0.5, topics=["mood"]))
    assert len(LanguageModelStage(context, options).dataset().items) == 1  # the last item is the first that has some
