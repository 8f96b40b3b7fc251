"""From a trained stage to the files of its components.

Contract: nothing is published unless every weight is finite in the type in which it is stored.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.bundle import publish
from videolavit.checkpoints import publish_components
from videolavit.training.errors import TrainingError
from videolavit.training.stage import Stage

MARKER = "published.txt"
TYPES = {"float32": torch.float32, "float16": torch.float16}


def rounded(stage: Stage, store: str) -> dict[str, dict[str, Tensor]]:
    """Copies of the stage's components on the CPU, with floating point numbers rounded to `store`.

    Raises TrainingError for a weight that is not finite or too large for the type.
    """
    return {
        name: {key: _rounded(f"{stage.name}: {name}: {key}", tensor, store) for key, tensor in state.items()}
        for name, state in stage.components().items()
    }


def _rounded(what: str, tensor: Tensor, store: str) -> Tensor:
    copy = tensor.detach().cpu().clone().contiguous()
    if not copy.is_floating_point():
        return copy
    if not bool(copy.isfinite().all()):
        raise TrainingError(f"{what}: holds numbers that are not finite; nothing is published")
    stored = copy.to(TYPES[store])
    if not bool(stored.isfinite().all()):
        largest = float(copy.abs().max())
        raise TrainingError(
            f'{what}: {largest:.3g} is too large for {store}; nothing is published, set store = "float32" and --resume'
        )
    return stored


def publish_stage(stage: Stage, components: dict[str, dict[str, Tensor]], run: Path, checkpoint: Path) -> None:
    """Put `components` into RUN/components and then into the folder `checkpoint`."""
    with publish(run / "components", replace=True, marker=MARKER, kind="a run's components") as staging:
        (staging / MARKER).write_text("".join(f"{name}\n" for name in components))
        for name, state in components.items():
            path = staging / f"{name}.safetensors"
            path.parent.mkdir(exist_ok=True)
            save_file(state, path)
    publish_components(checkpoint, components, stage.completes)
