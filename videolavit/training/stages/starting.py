"""What the training of a component starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from videolavit.models.components import build
from videolavit.training.stage import StageContext

_LAST = (
    ".conv2.",
    ".to_out.0.",
    ".ff.net.2.",
    ".proj_out.",
)  # last layers of residual branches, as diffusers calls them
OUTER_ENDS = (".conv2.", ".proj_out.")  # of those that lie in no other branch: what a transformer learns inside goes on


def trainable(context: StageContext, component: str) -> Any:
    """A copy of `component` to train; one that was never trained starts from its module's own initial weights instead,
    drawn from the context's seed."""
    checkpoint = context.checkpoint
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        module = build(checkpoint.config, component)
    if component not in checkpoint.untrained:
        module.load_state_dict(checkpoint.component(component).state_dict())
    return module


@torch.no_grad()
def silence_branches(module: nn.Module, ends: Sequence[str] = _LAST) -> None:
    """Let every residual branch of a module add nothing: it starts as a shallow one and deepens as it learns.

    `ends` are parts of the names of the branches' last layers, as diffusers calls them. Not for trained weights.
    """
    for name, parameter in module.named_parameters():
        if any(end in name for end in ends):
            parameter.zero_()
