"""The optimisers of a run: AdamW, and Muon for the matrices of a model.

Contract: `optimizer_of` gives one optimiser whose groups say what is decayed and what is orthogonalised. Learning rate
and weight decay mean the same in both, because Muon's steps are scaled to the size of AdamW's (Liu and others, 2025,
arXiv 2502.16982, Eq. 4), so a recipe may change from one to the other.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from videolavit.training.settings import TrainSettings

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd quintic (Jordan and others, 2024)
SIZE = 0.2  # root mean square of AdamW's steps, which Muon's are brought to


class Muon(torch.optim.AdamW):
    """Momentum whose steps on matrices are orthogonalised; AdamW for the groups without `orthogonal`.

    torch's own Muon takes matrices only; here a kernel [out, in, ...] counts as a matrix [out, in * ...], and matrices
    of one shape are orthogonalised together, which is what makes it cheap for a small model.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on the gradients that are there."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("orthogonal")]
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("orthogonal"):
                self._orthogonal_step(group)

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike[tuple(parameter.flatten(1).shape)].append((parameter, parameter.grad))
        for (rows, columns), pairs in alike.items():
            parameters, gradients = ([pair[place] for pair in pairs] for place in (0, 1))
            moments = [self.state[parameter]["exp_avg"] for parameter in parameters]
            torch._foreach_lerp_(moments, gradients, 1 - MOMENTUM)
            ahead = torch._foreach_lerp(gradients, moments, MOMENTUM)  # Nesterov's
            steps = orthogonal(torch.stack([step.flatten(1) for step in ahead]))  # [N, rows, columns]
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            scaled = steps * (-group["lr"] * SIZE * max(rows, columns) ** 0.5)
            torch._foreach_add_(parameters, [s.view_as(p) for s, p in zip(scaled, parameters, strict=True)])


def orthogonal(matrices: Tensor) -> Tensor:
    """[N, rows, columns] -> the same with singular values near 1, by Newton-Schulz iterations."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-20)[:, None, None]
    first, third, fifth = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = first * x + (third * square + fifth * square @ square) @ x
    return x.mT if tall else x


def optimizer_of(module: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """The optimiser that `settings` names, over what `module` trains.

    Gains, biases and other vectors are not decayed. Muon's matrices are the weights of linear layers and convolutions,
    but for a language model's output layer, which is as little a map between hidden states as an embedding.
    """
    hidden = {
        part.weight
        for name, part in module.named_modules()
        if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not name.endswith("lm_head")
    }
    muon = settings.optimizer == "muon"
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1 and not (muon and p in hidden)]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if muon:
        groups.append({"params": [p for p in trained if p in hidden], "orthogonal": True})
    used = [group for group in groups if group["params"]]
    kind = Muon if muon else torch.optim.AdamW
    return kind(used, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay)
