"""Run by two processes: a model in FSDP's shards is saved, loaded into another one, and trained on, to the bit."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from toy_stage import Items, Options, ToyModule

from videolavit.config import MotionConditionConfig
from videolavit.models.motion_encoder import MotionConditionEncoder
from videolavit.training import states
from videolavit.training.average import Average
from videolavit.training.loop import _fill_moments
from videolavit.training.optimizers import optimizer_of
from videolavit.training.settings import TrainSettings

SETTINGS = TrainSettings(stage="toy", steps=6, batch_size=2, learning_rate=0.01)


def sharded(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Average]:
    torch.manual_seed(seed)
    encoder = MotionConditionEncoder(MotionConditionConfig(dim=8, heads=1, depth=1, out_dim=8))
    module = ToyModule(encoder, 8, Options(dropout=0.0, noise=0.0))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in encoder.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer = optimizer_of(module, SETTINGS)
    _fill_moments(optimizer)
    return module, optimizer, Average(module, 0.9)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, average: Average, steps: range) -> list[float]:
    items, losses = Items(0, 30), []
    for step in steps:
        first = 4 * step + 2 * dist.get_rank()
        batch = torch.utils.data.default_collate([items[index % 30] for index in (first, first + 1)])
        loss = module(batch, torch.Generator(), step)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        losses.append(loss.item())
    return losses


def main(run: Path) -> None:
    dist.init_process_group("gloo")
    module, optimizer, average = sharded(seed=0)
    before = train(module, optimizer, average, range(3))
    position, first = states.Position(step=3, averaged=average.updates), dist.get_rank() == 0
    states.save(run, position, module, optimizer, average.applied(), keep=2, main=first)
    dist.barrier()

    other, other_optimizer, other_average = sharded(seed=1)
    assert train(*sharded(seed=1), range(3)) != before  # it is another model until it is filled
    folder = states.folder_of(run, 3)
    states.load_weights(folder, states.AVERAGE, other, sharded=True)
    other_average.restore(states.read_position(folder).averaged)
    states.load_weights(folder, states.MODEL, other, sharded=True)
    states.load_optimizer(folder, other, other_optimizer, sharded=True)

    losses = [
        train(*each, range(3, 6)) for each in ((module, optimizer, average), (other, other_optimizer, other_average))
    ]
    assert losses[0] == losses[1], losses
    assert_same(module, other)
    with average.applied(), other_average.applied():
        assert_same(module, other)
    dist.destroy_process_group()


def assert_same(one: nn.Module, two: nn.Module) -> None:
    first, second = states.gathered(one), states.gathered(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
