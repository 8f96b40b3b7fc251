"""The optimisers: Muon against torch's own and against AdamW, and what each group gets."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from videolavit.training.loop import _fill_moments
from videolavit.training.optimizers import optimizer_of, orthogonal
from videolavit.training.settings import TrainSettings

PLAIN = TrainSettings(stage="toy", steps=1, batch_size=1, learning_rate=0.01, weight_decay=0.1)
SETTINGS = msgspec.structs.replace(PLAIN, optimizer="muon")


class Small(nn.Module):
    """A matrix, a kernel, an embedding, an output layer as language models have it, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4)
        self.wide, self.same = nn.Linear(4, 6), nn.Linear(4, 6)
        self.kernel = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 5, bias=False)


def prepared(module: nn.Module, chosen: TrainSettings) -> torch.optim.Optimizer:
    optimizer = optimizer_of(module, chosen)
    _fill_moments(optimizer)
    return optimizer


def stepped(optimizer: torch.optim.Optimizer, module: nn.Module, steps: int = 3) -> dict[str, torch.Tensor]:
    """The module's parameters after `steps` steps on gradients that are always the same."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 1000))
def test_singular_values_come_near_one(rows: int, columns: int, seed: int) -> None:
    matrices = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    values = torch.linalg.svdvals(matrices)
    after = torch.linalg.svdvals(orthogonal(matrices))
    large = values > 0.05 * values[:, :1]  # five iterations do not lift what is nearly nothing
    assert bool(((after > 0.5) & (after < 1.3))[large].all())


def test_matrices_go_as_with_torchs_muon() -> None:
    ours, theirs = Small(), Small()
    found = stepped(prepared(ours, SETTINGS), ours)
    judge = torch.optim.Muon(
        [theirs.wide.weight, theirs.same.weight],
        lr=0.01,
        weight_decay=0.1,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    expected = stepped(judge, theirs)
    for name in ("wide.weight", "same.weight"):
        start = dict(Small().named_parameters())[name].detach()
        # torch iterates in bfloat16
        torch.testing.assert_close(found[name] - start, expected[name] - start, rtol=0.05, atol=1e-3)


def test_a_kernel_is_a_matrix_of_its_outputs() -> None:
    module = Small()
    kernel, flat = module.kernel.weight, nn.Linear(27, 4, bias=False)
    flat.weight.data.copy_(kernel.detach().flatten(1))
    one, other = prepared(module.kernel, SETTINGS), prepared(flat, SETTINGS)
    gradient = torch.randn(kernel.shape)
    for optimizer, parameter in ((one, kernel), (other, flat.weight)):
        parameter.grad = gradient.reshape(parameter.shape)
        optimizer.step()
    torch.testing.assert_close(kernel.flatten(1), flat.weight)


def test_everything_else_goes_as_with_adamw() -> None:
    ours, theirs = Small(), Small()
    found = stepped(prepared(ours, SETTINGS), ours)
    expected = stepped(prepared(theirs, PLAIN), theirs)
    matrices = {"wide.weight", "same.weight", "kernel.weight"}
    assert {name for name in found if not torch.equal(found[name], expected[name])} == matrices


@pytest.mark.parametrize("chosen", [PLAIN, SETTINGS])
def test_only_matrices_and_kernels_are_decayed(chosen: TrainSettings) -> None:
    module = Small()
    groups = optimizer_of(module, chosen).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in module.parameters() if p.ndim > 1}
