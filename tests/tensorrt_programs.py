"""A program for the stand-in of TensorRT, and what loading its engine takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from fake_tensorrt import Program

from runtime.bundle import BuiltFor, EngineEntry, FileEntry, TensorEntry

BUILT = BuiltFor(library="tensorrt-rtx 1.7.1", compute_capabilities=("8.6", "8.9"))


def product(arrays: dict[str, np.ndarray]) -> None:
    arrays["y"][...] = arrays["x"] * arrays["by"]


def multiplier(**changes: object) -> Program:
    """y [B, n] = x [B, n] * by [1], for up to 2 rows of 4, or 8 rows of 8."""
    return Program(
        **{
            "inputs": {"x": ("FLOAT", (-1, -1)), "by": ("FLOAT", (1,))},
            "outputs": {"y": "FLOAT"},
            "output_shapes": lambda shapes: {"y": shapes["x"]},
            "compute": product,
            "profiles": [{"x": ((1, 4), (2, 4), (2, 4))}, {"x": ((1, 8), (8, 8), (8, 8))}],
            **changes,
        }
    )


def entry(*paths: str, built_for: BuiltFor | None = BUILT, sha256: str = "") -> EngineEntry:
    return EngineEntry(
        files=tuple(FileEntry(path=path, bytes=1, sha256=sha256) for path in paths),
        inputs=(
            TensorEntry(name="x", dtype="float32", shape=("B", "n")),
            TensorEntry(name="by", dtype="float32", shape=(1,)),
        ),
        outputs=(TensorEntry(name="y", dtype="float32", shape=("B", "n")),),
        backend="tensorrt-rtx",
        built_for=built_for,
    )


def x(rows: int, columns: int = 4) -> np.ndarray:
    return np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)


class FakeBundle:
    """The two things of a Bundle that loading an engine uses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, file: FileEntry) -> Path:
        return self.folder / file.path
