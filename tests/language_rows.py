"""Tokenised items made up for tests of training the language model, and the smallest checkpoint they fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videolavit.checkpoints import Checkpoint, RandomWeights
from videolavit.config import PRESETS, LanguageModelConfig
from videolavit.models.components import COMPONENTS
from videolavit.tokenizer_training import SHAPES_TOKENIZER
from videolavit.training.data.examples import Question
from videolavit.training.data.tokenizing import Plan, tokenize
from videolavit.training.settings import DataSettings
from videolavit.training.stage import StageContext
from videolavit.training.stages import sequences
from videolavit.training.stages.language_model import LanguageModelStage
from videolavit.training.stages.sequences import Mix

TINY = PRESETS["tiny"]
WIDTH = 64
SMALL = LanguageModelConfig(hidden_size=WIDTH, intermediate_size=64, layers=1, heads=4, kv_heads=4, max_positions=512)
CONFIG = replace(TINY, language_model=SMALL, visual_tokenizer=replace(TINY.visual_tokenizer, llm_dim=WIDTH))
V = CONFIG.vocabulary
K = CONFIG.geometry.motion_tokens
TEXT_FIRST = Mix(condition_dropout=0, motion_alone=0, visual_first=0)


def small_checkpoint() -> Checkpoint:
    tokenizer = SHAPES_TOKENIZER.read_bytes()
    return Checkpoint(CONFIG, tokenizer=tokenizer, weights=RandomWeights(CONFIG, 0), untrained=tuple(COMPONENTS))


def tokenized(checkpoint: Checkpoint, folder: Path) -> tuple[Path, Path]:
    """A folder of three tokenised scenes and that of the checkpoint that made it, both in `folder`."""
    tokens, source = folder / "tokens", folder / "checkpoint"
    checkpoint.save(source)
    fields = ("motion_ids", "visual_ids", "features", "keep_logits")
    tokenize(Plan(data=DataSettings(), checkpoint=source, fields=fields, count=3), tokens)
    return tokens, source


def item(index: int, clips: int = 1, moving: bool = True) -> dict[str, Any]:
    """An item as `TokenizedDataset` gives it: colour and direction are in its ids and features."""
    rng = np.random.default_rng(index)
    colour, way = index % 4, index // 4 % 4
    name, direction = ("red", "green", "blue", "white")[colour], ("right", "left", "up", "down")[way]
    logits = torch.log_softmax(torch.from_numpy(rng.normal(size=(clips, 64, 2))).float() + torch.tensor([0, 2.0]), -1)
    features = torch.from_numpy(rng.normal(size=(clips, 64, CONFIG.visual_tokenizer.eva.width))).float()
    features[..., colour] += 3
    found = {
        "index": index,
        "captions": (f"a {name} circle moving {direction}",),
        "questions": (
            Question("what colour is the circle?", name, "colour"),
            Question("which direction does it move?", direction, "direction"),
        ),
        "visual_ids": [V.first_visual + colour + torch.arange(5 + k) for k in range(clips)],
        "features": features,
        "keep_logits": logits,
    }
    if moving:
        found["motion_ids"] = torch.full((clips, K), V.first_motion + way)
    return found


ITEMS = [item(index) for index in range(16)]


def stage(kind: type[LanguageModelStage], options: Any, checkpoint: Checkpoint) -> LanguageModelStage:
    data = DataSettings(source="tokenized", path="nowhere")
    return kind(StageContext(checkpoint=checkpoint, data=data, seed=3, device=torch.device("cpu")), options)


def steps(trained: LanguageModelStage, count: int, same: bool = False, rate: float = 1e-2) -> list[dict[str, float]]:
    rows = sequences.Rows(ITEMS, 3, 50, trained.row)
    optimizer = torch.optim.AdamW(trained.module.parameters(), lr=rate, weight_decay=0)
    generator = torch.Generator()
    found = []
    for step in range(count):
        start = 0 if same else step * 4
        batch = trained.prepare(trained.collate([rows[at] for at in range(start, start + 4)]), generator)
        losses = trained.module(batch, generator, step)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: float(value.detach()) for name, value in losses.items()})
    return found
