"""What a training stage is, and the list of them.

Contract: a stage knows its data, its module and its objective; it knows nothing of devices, files, optimisers and
resuming, which are the loop's. To be resumable to the bit a stage keeps three promises: `dataset()[i]` is a pure
function of (seed, i); every random draw in `prepare` and in the module's forward comes from the generator that is
passed; what changes during training is a parameter or a persistent buffer of `module`. To run on many devices it
keeps one more: between `prepare` and `after_step` only the module's forward is called.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from runtime.errors import UsageError
from videolavit.checkpoints import Checkpoint
from videolavit.training.settings import DataSettings

_STAGES = "videolavit.training.stages"

# In the order in which they are trained: name -> "module:class", imported when it is used.
STAGES: dict[str, str] = {
    "keyframe-vae": f"{_STAGES}.keyframe_vae:KeyframeVaeStage",
    "video-vae": f"{_STAGES}.video_vae:VideoVaeStage",
    "vision": f"{_STAGES}.vision:VisionStage",
    "visual-tokenizer": f"{_STAGES}.visual_tokenizer:VisualTokenizerStage",
    "motion-tokenizer": f"{_STAGES}.motion_tokenizer:MotionTokenizerStage",
    "keyframe-detokenizer": f"{_STAGES}.keyframe_detokenizer:KeyframeDetokenizerStage",
    "video-detokenizer": f"{_STAGES}.video_detokenizer:VideoDetokenizerStage",
    "language-model": f"{_STAGES}.language_model:LanguageModelStage",
    "instruct": f"{_STAGES}.instruct:InstructStage",
}


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """What a stage is given.

    Attributes:
        checkpoint: source of initial and of frozen weights; modules from `checkpoint.component(name)` are shared,
            frozen and on the CPU: copy what is trained.
        data: what to train on.
        seed: decides all items and every random draw.
        device: where batches arrive and the module lives.
    """

    checkpoint: Checkpoint
    data: DataSettings
    seed: int
    device: torch.device


class NoOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stage without settings of its own."""


class Stage:
    """Base of the stages.

    Attributes:
        name: what the stage is called on the command line.
        trains: components whose weights it changes.
        completes: those of `trains` that need no other stage before they can be used; None: all of them.
        Options: the recipe's table `[options]`; its defaults are the documented ones.
        module: holds all that is trained, and may hold heads that are thrown away. Its
            `forward(batch, generator, step)` returns scalars: "loss" is minimised, the others are logged.
            `generator` is on the device of the batch; `step` counts from 0.
    """

    name: ClassVar[str]
    trains: ClassVar[tuple[str, ...]]
    completes: ClassVar[tuple[str, ...] | None] = None
    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    module: nn.Module

    def __init__(self, context: StageContext, options: Any) -> None:
        self.context = context
        self.options = options

    def dataset(self) -> Dataset[dict[str, Any]]:
        """Map-style items, each a pure function of (seed, index)."""
        raise NotImplementedError

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """One batch of `items`; tensors in it are moved to the device by the loop."""
        batch: dict[str, Any] = default_collate(items)
        return batch

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """What frozen components make of a batch; called on the device, without gradients, before every forward."""
        return batch

    def after_step(self, step: int) -> None:
        """Called after every optimiser step: codebooks that follow averages, revival of dead codes."""

    def validate(self, generator: torch.Generator) -> dict[str, float]:
        """Figures on items that are not trained on, computed with the weights that would be published.

        Called on every process with the same generator, without gradients, in eval mode.
        """
        return {}

    def components(self) -> dict[str, dict[str, Tensor]]:
        """Full state of every component in `trains`, with the names the checkpoint wants."""
        raise NotImplementedError


def find_stage(name: str) -> type[Stage]:
    """The class of stage `name`: one of `STAGES`, or "module:class" for a stage of your own.

    Raises UsageError when there is none.
    """
    place = STAGES.get(name, name)
    module, colon, attribute = place.partition(":")
    if not colon:
        raise UsageError(f"STAGE {name!r}: there is no such stage; choose one of {', '.join(STAGES)}, or MODULE:CLASS")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # a library that the stage needs
        raise UsageError(f"STAGE {name!r}: there is no module {error.name}") from error
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise UsageError(f"STAGE {name!r}: {place} is not a Stage")
    return found
