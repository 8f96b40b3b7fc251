"""How well a language model tells a caption from a wrong one by what it would write after each.

    videolavit tokenize shapes --split held-out --shapes 2 --seed 30 --count 512 --fields visual_ids,motion_ids \\
        --checkpoint checkpoints/shapes -o build/tokens/held-out-two
    PYTHONPATH=. python benchmarks/told_pairs.py build/tokens/held-out-two checkpoints/shapes

Contract: of every item the first wrong caption of each topic is taken. Right is a pair after whose right caption the
item's own ids are likelier: those of motion, after the picture, where the topic is `ways` (motions exchanged), those
of the picture where it is `order` (the shapes named in the other order). Printed is a line for each checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from runtime.errors import VideoLavitError
from runtime.vocabulary import Vocabulary
from videolavit.checkpoints import load
from videolavit.training.data.tokenized import TokenizedDataset
from videolavit.training.stages.language_model import PartWeights, SequenceModel
from videolavit.training.stages.sequences import CONTEXT, Layout, Row, collate

TOPICS = ("ways", "order")
PAIRS = 32  # computed at once


def pairs(items: TokenizedDataset, topic: str, layout: Layout, vocabulary: Vocabulary) -> list[Row]:
    """The rows of right captions, each with its wrong one, in which only ids that `topic` is about are compared."""
    found = []
    for index in range(len(items)):
        item = items[index]
        negative = next((each for each in item["negatives"] if each.topic == topic), None)
        if negative is None:
            continue
        row = layout.telling(item, negative, visual_first=False, motion_alone=topic == "ways")
        if topic == "order":
            for one in filter(None, (row, row.wrong)):
                shown = [id_ < vocabulary.first_motion for id_ in one.ids]
                one.kinds = [kind if kept else CONTEXT for kind, kept in zip(one.kinds, shown, strict=True)]
        found.append(row)
    return found


@torch.inference_mode()
def told(model: SequenceModel, rows: list[Row]) -> np.ndarray:
    """By how many nats what is seen is likelier after the right caption, [K]."""
    gaps: list[float] = []
    for start in range(0, len(rows), PAIRS):
        batch = collate(rows[start : start + PAIRS], 2)
        _, losses, _, _, places = model.predict(batch)
        nats = torch.zeros(len(batch["ids"])).index_add(0, places, losses)
        right, wrong = batch["pairs"].unbind(1)
        gaps += (nats[wrong] - nats[right]).tolist()
    return np.array(gaps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tokens", type=Path, help="tokenised folder of scenes of two shapes")
    parser.add_argument("checkpoints", type=Path, nargs="+")
    given = parser.parse_args()
    try:
        items = TokenizedDataset(given.tokens, ["visual_ids", "motion_ids"])
        for folder in given.checkpoints:
            checkpoint = load(folder)
            items.require(checkpoint)
            config = checkpoint.config
            layout = Layout(checkpoint.tokenizer, config.vocabulary, config.language_model.max_positions)
            language_model = checkpoint.component("language_model").float().eval()
            model = SequenceModel(language_model, config.vocabulary, PartWeights())
            parts = []
            for topic in TOPICS:
                gaps = told(model, pairs(items, topic, layout, config.vocabulary))
                parts.append(f"{topic} {np.mean(gaps > 0):.3f} of {len(gaps)}")
            print(f"{folder}: {', '.join(parts)}")
    except VideoLavitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
