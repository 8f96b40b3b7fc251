"""Export of the video UNet at official size: memory, time, size, and whether it agrees with torch.

    python benchmarks/export_video_unet.py FOLDER [--preset video-lavit-7b] [--precision fp16] [--compare]

Writes random weights in float16 as a converted checkpoint has them into FOLDER and exports them, each in a process of
its own whose peak resident memory is printed, and deletes FOLDER. `--compare` adds what the export command does by
default, the comparison with torch in float32. Needs about 6 GB of disk at official size.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from steps import measured, show

from export.engine import build_engine
from export.settings import EngineSettings
from videolavit.checkpoints import Checkpoint, RandomWeights
from videolavit.config import PRESETS
from videolavit.inventory import inventory
from videolavit.safetensors_writer import write_safetensors

ENGINE = "video_unet"  # and the component it is made from
GIB = 1 << 30


class StoredFile:
    """The component's weights in one file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def tensors(self, component: str) -> Iterator[tuple[str, torch.Tensor]]:
        from safetensors import safe_open

        with safe_open(self._path, framework="pt") as stored:
            for name in sorted(stored.keys()):
                yield name, stored.get_tensor(name).float()


def write_weights(path: Path, preset: str) -> dict[str, Any]:
    config = PRESETS[preset]
    shapes = inventory(config, ENGINE)
    halves = ((name, tensor.half()) for name, tensor in RandomWeights(config, seed=0).tensors(ENGINE))
    write_safetensors(path, shapes, halves)
    return {"million parameters": sum(map(math.prod, shapes.values())) / 1e6, "GiB": path.stat().st_size / GIB}


def export(path: Path, preset: str, settings: EngineSettings, compare: bool) -> dict[str, Any]:
    checkpoint = Checkpoint(PRESETS[preset], tokenizer=b"", weights=StoredFile(path))
    built = build_engine(checkpoint, ENGINE, path.parent, settings, compare)
    parity = {} if built.parity is None else {"error": built.parity.max_abs_error, "allowed": built.parity.tolerance}
    return {"GiB": built.bytes / GIB, **parity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="video-lavit-7b", choices=PRESETS)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--backend", default="onnx")
    parser.add_argument("--compare", action="store_true")
    arguments = parser.parse_args()
    settings = EngineSettings(backend=arguments.backend, precision=arguments.precision)
    folder: Path = arguments.folder
    folder.mkdir()
    try:
        weights = folder / f"{ENGINE}.safetensors"
        show("weights", measured(write_weights, weights, arguments.preset))
        show("export", measured(export, weights, arguments.preset, settings, arguments.compare))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
