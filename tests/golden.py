"""Golden vectors computed with the reference model, read from tests/data/golden."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

FOLDER = Path(__file__).parent / "data" / "golden"


@dataclass(frozen=True)
class Golden:
    """One case. Weights are float32 (their float16 storage is exact), integers keep their type."""

    meta: dict[str, Any]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]


def load(name: str) -> Golden:
    groups: dict[str, dict[str, np.ndarray]] = {"inputs": {}, "outputs": {}, "weights": {}}
    with safe_open(FOLDER / f"{name}.safetensors", "np") as file:
        meta = json.loads(file.metadata()["golden"])
        for key in sorted(file.keys()):
            group, rest = key.split("/", 1)
            array = file.get_tensor(key)
            groups[group][rest] = array.astype(np.float32) if array.dtype == np.float16 else array
    return Golden(meta, **groups)


def assert_close(actual: Any, expected: Any, atol: float) -> None:
    """Largest absolute difference is at most `atol`; shapes are equal."""
    a, e = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert a.shape == e.shape, f"shape {a.shape}, expected {e.shape}"
    worst = float(np.abs(a - e).max()) if a.size else 0.0
    assert worst <= atol, f"differs by {worst:.3g}, allowed {atol:.3g}"
