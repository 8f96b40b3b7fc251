"""Resumable states of a run: RUN/step-000500 is the run after 500 steps.

Contract: a state folder is complete or not there (filled in a staging folder, moved by one rename). Weights are
safetensors files, the optimiser's state is read with `weights_only=True`: nothing is unpickled into code. All of it is
gathered on the main process whole, whatever the run is sharded over, so a run may go on with another number of
processes. `save` and `load` are called by every process.
"""

from __future__ import annotations

import pickle
import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from runtime.bundle import publish
from runtime.errors import CheckpointError

FORMAT = 1
POSITION, MODEL, AVERAGE, OPTIMIZER = "state.json", "model.safetensors", "ema.safetensors", "optimizer.pt"
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole, and on the main process only


class Position(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a run stands.

    Attributes:
        step: steps done.
        items: items used by all processes together.
        processes: number of processes.
        seconds: time spent in the loop so far.
        window: sums of the metrics since the last row.
        averaged: updates of the running average.
        scaler: state of the gradient scaler of fp16.
    """

    format: int = FORMAT
    step: int = 0
    items: int = 0
    processes: int = 1
    seconds: float = 0.0
    window: dict[str, tuple[float, int]] = {}
    averaged: int = 0
    scaler: dict[str, float] = {}


def folder_of(run: Path, step: int) -> Path:
    return run / f"step-{step:06d}"


def saved_steps(run: Path) -> list[int]:
    """Steps whose state is in `run`, in order."""
    found = (re.fullmatch(r"step-(\d{6,})", path.name) for path in run.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def gathered(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and persistent buffers under their own names; empty on other than the main process."""
    return cast(dict[str, Tensor], get_model_state_dict(module, options=GATHERED))


def save(
    run: Path,
    position: Position,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AbstractContextManager[None] | None,
    *,
    keep: int,
    main: bool,
) -> None:
    """Write the state after `position.step` steps and remove all but the last `keep` states.

    Inside the context `average` the module holds the averaged weights.
    """
    weights = gathered(module)
    moments: dict[str, Any] = get_optimizer_state_dict(module, optimizer, options=GATHERED)
    if not main:
        if average is not None:
            with average:
                gathered(module)
        return
    with publish(folder_of(run, position.step), replace=True, marker=POSITION, kind="a training state") as staging:
        save_file(_separate(weights), staging / MODEL)
        torch.save(moments, staging / OPTIMIZER)
        if average is not None:
            with average:
                save_file(_separate(gathered(module)), staging / AVERAGE)
        (staging / POSITION).write_bytes(msgspec.json.encode(position))
    for step in saved_steps(run)[:-keep]:
        shutil.rmtree(folder_of(run, step))


def read_position(folder: Path) -> Position:
    """Where the state in `folder` stands. Raises CheckpointError when it cannot be read."""
    path = folder / POSITION
    try:
        position = msgspec.json.decode(path.read_bytes(), type=Position)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path}: {error}; remove {folder} to go on from the state before it") from error
    if position.format != FORMAT:
        raise CheckpointError(f"{path}: format is {position.format}, this version reads {FORMAT}")
    return position


def load_weights(folder: Path, name: str, module: nn.Module, *, sharded: bool) -> None:
    """Fill `module` with the weights in file `name` (MODEL or AVERAGE). Raises CheckpointError when they do not fit."""
    path = folder / name
    try:
        state = load_file(path) if not sharded or torch.distributed.get_rank() == 0 else {}
        set_model_state_dict(module, state, options=_spread(sharded))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: does not fit this stage: {' '.join(str(error).split())[:300]}") from error


def load_optimizer(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool) -> None:
    """Fill `optimizer`. Raises CheckpointError when the file is damaged, holds code, or does not fit."""
    path = folder / OPTIMIZER
    try:
        read = not sharded or torch.distributed.get_rank() == 0
        state = torch.load(path, map_location="cpu", weights_only=True) if read else {}
        set_optimizer_state_dict(module, optimizer, state, options=_spread(sharded))
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be used: {' '.join(str(error).split())[:300]}") from error


def _spread(sharded: bool) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=sharded)


def _separate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with a copy of every tensor that shares memory with an earlier one: the format knows no ties."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in state.items():
        tied = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor.detach().clone() if tied else tensor.detach().contiguous()
    return separate
