"""Names and shapes of a component's tensors, and the components that a task may have for itself.

Contract: `inventory` allocates nothing. A component's name is one of `videolavit.models.components.COMPONENTS`, or
`TASK/NAME` for a copy that one task has of its own: the official release was fine-tuned for understanding, and the
modules named in `FINE_TUNED` exist twice there (file layout of the snapshot).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from videolavit.config import ModelConfig
from videolavit.models.components import build

UNDERSTANDING = "understanding"
FINE_TUNED = ("language_model", "visual_tokenizer", "motion_tokenizer")


def for_task(name: str, task: str = UNDERSTANDING) -> str:
    """Name of the copy of component `name` that `task` has of its own."""
    return f"{task}/{name}"


def module_of(component: str) -> str:
    """The entry of `COMPONENTS` a component is built from: its name without the task."""
    return component.rpartition("/")[2]


def inventory(config: ModelConfig, component: str) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, in the order of the module."""
    return dict(_inventory(config, module_of(component)))


@lru_cache(maxsize=64)  # building a module takes up to seconds, and one check asks for the same several times
def _inventory(config: ModelConfig, module: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    with torch.device("meta"):
        built = build(config, module)
    return tuple((name, tuple(tensor.shape)) for name, tensor in built.state_dict().items())
