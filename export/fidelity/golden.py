"""Golden files: one case of the reference code in a safetensors file.

Contract: `weights/`, `inputs/` and `outputs/` become three dictionaries, the metadata entry `golden` the fourth.
Weights stored in half precision were exactly representable in it, so casting them to float32 loses nothing. A case that
takes its weights from another file of its folder (`weights_from`) has them as if they were its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from runtime.errors import CheckpointError

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Golden:
    """One case: where it lies, what it says about itself, and its arrays by name."""

    path: Path
    meta: dict[str, Any]
    inputs: Arrays
    outputs: Arrays
    weights: Arrays

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.meta["config"]
        return config

    def listed(self, group: Arrays, stem: str) -> list[np.ndarray]:
        """The arrays stored as `stem`_0, `stem`_1, ... in their order."""
        found: list[np.ndarray] = []
        while f"{stem}_{len(found)}" in group:
            found.append(group[f"{stem}_{len(found)}"])
        return found


def read_meta(path: Path) -> dict[str, Any]:
    """What a golden file says about itself, arrays unread. Raises CheckpointError when it is no golden file."""
    try:
        with safe_open(path, "np") as file:
            return json.loads((file.metadata() or {})["golden"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not a golden file ({error!r})") from error


def load(path: Path) -> Golden:
    """Read a case whole. Raises CheckpointError when it is no golden file."""
    meta = read_meta(path)
    groups: dict[str, Arrays] = {"inputs": {}, "outputs": {}, "weights": {}}
    with safe_open(path, "np") as file:
        for key in file.keys():  # noqa: SIM118 - not a dictionary
            group, _, name = key.partition("/")
            array = file.get_tensor(key)
            groups[group][name] = array.astype(np.float32) if array.dtype == np.float16 else array
    if meta.get("weights_from"):
        groups["weights"] = load(path.with_name(meta["weights_from"])).weights
    return Golden(path, meta, **groups)
