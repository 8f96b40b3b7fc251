"""How well a language model knows held-out clips, and tells a caption from a wrong one by what it would write after it.

    videolavit tokenize shapes --split held-out --shapes 2 --seed 30 --count 512 --fields visual_ids,motion_ids \\
        --checkpoint checkpoints/shapes -o build/tokens/held-out-two
    PYTHONPATH=. python benchmarks/told_pairs.py build/tokens/held-out-two checkpoints/shapes

Contract: of every item the first wrong caption of each topic is taken. Right is a pair after whose right caption the
item's own ids are likelier: those of motion, after the picture, where the topic is `ways` (motions exchanged), those
of the picture where it is `order` (the shapes named in the other order). Losses are means in nats per id, of pictures
and motion after the caption, and of the caption after both. Printed is a line for each checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from runtime.errors import VideoLavitError
from videolavit.checkpoints import load
from videolavit.training.data.tokenized import TokenizedDataset
from videolavit.training.stages.language_model import PartWeights, SequenceModel, nats_apart
from videolavit.training.stages.sequences import Compared, Layout, Mix, Row, collate

TOPICS: dict[str, Compared] = {"ways": "motion", "order": "pictures"}
PAIRS = 32  # computed at once


def pairs(items: TokenizedDataset, topic: str, compared: Compared, layout: Layout) -> list[Row]:
    """The rows of the right captions of `items`, each with the first wrong one that is so by `topic`."""
    found = []
    for index in range(len(items)):
        item = items[index]
        negative = next((each for each in item["negatives"] if each.topic == topic), None)
        if negative is None:
            continue
        found.append(layout.telling(item, negative, compared))
    return found


@torch.inference_mode()
def told(model: SequenceModel, rows: list[Row]) -> np.ndarray:
    """By how many nats what is seen is likelier after the right caption, [K]."""
    gaps: list[float] = []
    for start in range(0, len(rows), PAIRS):
        batch = collate(rows[start : start + PAIRS], 2)
        _, losses, _, _, places = model.predict(batch)
        gaps += nats_apart(batch, losses, places).tolist()
    return np.array(gaps)


@torch.inference_mode()
def losses(model: SequenceModel, items: TokenizedDataset, layout: Layout) -> dict[str, float]:
    """Mean losses of the items' ids after what comes before them, by their part: means over batches."""
    found: dict[str, float] = {}
    for visual_first, parts in ((0.0, ("image", "motion")), (1.0, ("text",))):
        mix = Mix(condition_dropout=0, motion_alone=0, visual_first=visual_first, learn_prompts=False)
        rng = np.random.default_rng(0)  # which of the captions
        rows = [layout.generation(items[index], mix, rng) for index in range(len(items))]
        batches = (collate(rows[start : start + PAIRS], 2) for start in range(0, len(rows), PAIRS))
        means = [model(batch, torch.Generator(), 0) for batch in batches]
        found |= {part: float(np.mean([each[part] for each in means])) for part in parts}
    return found


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
            for topic, compared in TOPICS.items():
                gaps = told(model, pairs(items, topic, compared, layout))
                parts.append(f"{topic} {np.mean(gaps > 0):.3f} of {len(gaps)}")
            parts += [f"{name} {loss:.3f}" for name, loss in losses(model, items, layout).items()]
            print(f"{folder}: {', '.join(parts)}")
    except VideoLavitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
