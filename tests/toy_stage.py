"""A stage small enough to be trained hundreds of steps in a test: the motion encoder learns which way all moves.

It has what real stages have: draws of its own, dropout, a buffer that follows the steps, a head that is thrown away,
a parameter that nothing uses.
"""

from __future__ import annotations

import copy
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from videolavit import checkpoints
from videolavit.config import PRESETS, MotionConditionConfig
from videolavit.models.components import COMPONENTS
from videolavit.training.stage import Stage, StageContext


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`noise` is added to the inputs; from step `broken_from` on the loss is NaN; at `signal_at` Ctrl-C comes.

    `scale` is of the two numbers to be learnt, and has a type that JSON lacks.
    """

    noise: float = 0.1
    dropout: float = 0.1
    broken_from: int = 10**9
    signal_at: int = 10**9
    scale: tuple[float, float] = (1.0, 1.0)


class Items(Dataset[dict[str, Tensor]]):
    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        offset = torch.randn(2, generator=generator)
        motion = offset.view(2, 1, 1, 1) + 0.1 * torch.randn(2, 2, 16, 16, generator=generator)
        return {"motion": motion, "offset": offset, "name": f"item {index}"}


class ToyModule(nn.Module):
    def __init__(self, encoder: nn.Module, width: int, options: Options) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(width, 2)
        self.spare = nn.Parameter(torch.zeros(2))
        self.options = options
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: dict[str, Any], generator: torch.Generator, step: int) -> dict[str, Tensor]:
        motion = batch["motion"]
        motion = motion + self.options.noise * torch.randn(motion.shape, generator=generator)
        states = self.dropout(self.encoder(motion).mean(dim=(1, 2)))
        loss = (self.head(states) - batch["offset"]).square().mean()
        if step >= self.options.broken_from:
            loss = loss * float("nan")
        return {"loss": loss, "largest": states.abs().amax(dim=1).mean(), "offset": batch["offset"][:, 0].mean()}


class ToyStage(Stage):
    name = "toy"
    trains = ("motion_encoder",)
    Options = Options

    def __init__(self, context: StageContext, options: Options) -> None:
        super().__init__(context, options)
        encoder = copy.deepcopy(context.checkpoint.component("motion_encoder")).requires_grad_(True).train()
        self.module = ToyModule(encoder, context.checkpoint.config.motion_encoder.out_dim, options)

    def dataset(self) -> Dataset[dict[str, Any]]:
        return Items(self.context.seed, self.context.data.size)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        assert not torch.is_grad_enabled() and isinstance(batch["name"], list)
        return {**batch, "offset": torch.tensor(self.options.scale) * batch["offset"]}

    def after_step(self, step: int) -> None:
        self.module.steps += 1
        if step == self.options.signal_at:
            os.kill(os.getpid(), signal.SIGINT)

    def validate(self, generator: torch.Generator) -> dict[str, float]:
        assert not self.module.training and not torch.is_grad_enabled()
        batch = self.collate([Items(self.context.seed + 1, 8)[index] for index in range(8)])
        return {"error": float(self.module(self.prepare(batch, generator), generator, 0)["loss"])}

    def components(self) -> dict[str, dict[str, Tensor]]:
        return {"motion_encoder": self.module.encoder.state_dict()}


def toy_checkpoint(folder: Path) -> Path:
    """A checkpoint folder in which only the motion encoder has weights; nothing else of it is read by the toy."""
    config = replace(PRESETS["tiny"], motion_encoder=MotionConditionConfig(dim=8, heads=1, depth=1, out_dim=8))
    folder.mkdir()
    header = {"format": checkpoints.FORMAT, "untrained": tuple(COMPONENTS), "model": config}
    (folder / checkpoints.CONFIG).write_bytes(msgspec.json.encode(header))
    for name in (checkpoints.TOKENIZER, *(f"{component}.safetensors" for component in COMPONENTS)):
        (folder / name).touch()
    weights = dict(checkpoints.RandomWeights(config, 0).tensors("motion_encoder"))
    save_file(weights, folder / "motion_encoder.safetensors")
    return folder
