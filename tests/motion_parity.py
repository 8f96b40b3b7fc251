"""The runtime's motion against the real ffmpeg command line and motion-vector-extractor.

Contract: `compare` runs `benchmarks/motion_reference.py` in an environment that has motion-vector-extractor (this one,
or the interpreter named by VIDEOLAVIT_REFERENCE_PYTHON) and compares frame count, frame types, every vector, every
macroblock grid and every pixel of the key frames. Slices are those that ffmpeg takes on this machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from runtime.motion.grid import macroblock_grid
from runtime.motion.mpeg4 import MotionSettings, VectorDecoder, motion_vectors, reencode, rgb

REFERENCE = Path(__file__).resolve().parent.parent / "benchmarks" / "motion_reference.py"
VARIABLE = "VIDEOLAVIT_REFERENCE_PYTHON"
COLUMNS = ("source", "w", "h", "src_x", "src_y", "dst_x", "dst_y", "motion_x", "motion_y", "motion_scale")
HOLE = -10000.0
_DEVIATION = np.array([0.0993703, 0.1130276]) / 10


def reference_python() -> str | None:
    """An interpreter that can run the reference, or None if this machine has none."""
    if shutil.which("ffmpeg") is None:
        return None
    if find_spec("mvextractor"):
        return sys.executable
    return os.environ.get(VARIABLE)


@dataclass(frozen=True)
class Agreement:
    """How many things were compared and how many differ; `frames` and `types` differ as a whole."""

    frames: tuple[int, int]
    types: bool
    vectors: int
    vectors_differing: int
    cells: int
    cells_differing: int
    keyframes: int
    pixels_differing: int

    @property
    def exact(self) -> bool:
        same = self.types and self.frames[0] == self.frames[1] > 0
        return same and not (self.vectors_differing or self.cells_differing or self.pixels_differing)


def compare(video: Path, python: str, folder: Path) -> Agreement:
    """Read `video` both ways; `folder` is for the reference's result."""
    target = folder / f"{video.name}.npz"
    subprocess.run([python, str(REFERENCE), "dump", str(video), str(target)], check=True, timeout=600)
    reference = np.load(target)
    target.unlink()
    types, counts, rows = reference["types"], reference["counts"], reference["vectors"]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    keyframes = iter(reference["keyframes"])
    kinds = []
    vectors = differing = cells = cells_differing = compared = pixels_differing = 0
    decoder = VectorDecoder(pixels_of_p_frames=False)
    for index, frame in enumerate(decoder.decode(reencode(video, MotionSettings(slices="auto")))):
        kinds.append("I" if frame.key_frame else "P")
        if index >= len(types):
            continue
        found = motion_vectors(frame)
        own = np.stack([found[c].astype(np.int64) for c in COLUMNS], 1) if len(found) else np.zeros((0, 10), np.int64)
        expected = rows[offsets[index] : offsets[index + 1]].astype(np.int64)
        vectors += len(expected)
        differing += len(expected) if own.shape != expected.shape else int((own != expected).any(1).sum())
        grid = macroblock_grid(found, frame.width, frame.height, rescale=True)
        dense = dense_grid(expected, frame.width, frame.height)
        cells += dense[0].size
        cells_differing += int((grid != dense).any(0).sum())
        if frame.key_frame and types[index] == "I":
            compared += 1
            picture = next(keyframes)
            own_picture = rgb(frame)
            same_shape = picture.shape == own_picture.shape
            pixels_differing += int((picture != own_picture).any(-1).sum()) if same_shape else picture[..., 0].size
    return Agreement(
        (len(kinds), len(types)),
        kinds == types.tolist(),
        vectors,
        differing,
        cells,
        cells_differing,
        compared,
        pixels_differing,
    )


def dense_grid(rows: np.ndarray, width: int, height: int) -> np.ndarray:
    """Grid [2, rows, columns] by the plain definition: a float64 map per pixel, then the largest of every block."""
    dense = np.full((height, width, 2), HOLE)
    if len(rows):
        values = rows[:, :1] * rows[:, 7:9] / rows[:, 9:] / np.array([width, height]) / _DEVIATION
        dense[rows[:, 6].clip(0, height - 1), rows[:, 5].clip(0, width - 1)] = values
    padded = np.full((-(-height // 16) * 16, -(-width // 16) * 16, 2), HOLE)
    padded[:height, :width] = dense
    blocks = padded.reshape(padded.shape[0] // 16, 16, padded.shape[1] // 16, 16, 2).max(axis=(1, 3))
    grid = blocks.transpose(2, 0, 1).astype(np.float32)
    return np.where(grid < -1000, np.float32(0), grid)
