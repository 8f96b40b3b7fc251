"""Export of the language model at official sizes: memory, time, size, and whether it runs.

    python benchmarks/export_language_model.py FOLDER [--layers 32] [--precision int4] [--flavour gqa]

Writes random float16 weights in shards as a published snapshot has them into FOLDER, exports them, runs a prompt and
some tokens in ONNX Runtime, each in a process of its own whose peak resident memory is printed, and deletes FOLDER.
Needs about 19 GB of disk for 32 layers; `--no-run` leaves out the last step, which needs the model in memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from steps import measured, show

from export.settings import EngineSettings
from videolavit.config import PRESETS, LanguageModelConfig

INDEX = "model.safetensors.index.json"
SHARD = 4 << 30  # bytes, about
GIB = 1 << 30
NEW_TOKENS = 8
POOL = 10_000_019  # random numbers drawn; weights are stretches of them, and a prime lets no two rows be equal


def config_of(layers: int) -> tuple[LanguageModelConfig, int]:
    """Sizes of the official language model with some of its layers, and its vocabulary."""
    preset = PRESETS["video-lavit-7b"]
    return replace(preset.language_model, layers=layers), preset.vocabulary.size


def shapes_of(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensors of the checkpoint in the order in which a published one has them."""
    config, vocabulary = config_of(layers)
    width, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        shapes |= {f"{name}.mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{name}.{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def write_shards(folder: Path, layers: int) -> None:
    import torch

    from videolavit.safetensors_writer import write_safetensors

    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes_of(layers).items():
        bytes_ = 2 * torch.Size(shape).numel()
        if size + bytes_ > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += bytes_
    where = {}
    pool = torch.empty(POOL).uniform_(-(3**0.5), 3**0.5).half()
    for number, shapes in enumerate(shards, 1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        where.update(dict.fromkeys(shapes, path.name))

        def tensors(shapes: dict[str, tuple[int, ...]] = shapes) -> Iterator[tuple[str, torch.Tensor]]:
            for name, shape in shapes.items():
                if len(shape) == 1:
                    yield name, torch.ones(shape, dtype=torch.float16)
                else:
                    size = torch.Size(shape).numel()
                    start = zlib.crc32(name.encode()) % POOL
                    yield name, (pool.roll(start).repeat(-(-size // POOL))[:size] / shape[1] ** 0.5).view(shape)

        write_safetensors(path, shapes, tensors())
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def export(folder: Path, layers: int, settings: EngineSettings) -> None:
    from export.language_model.source import arrays
    from export.language_model.writing import write_language_model
    from videolavit.snapshot.files import open_set

    found = open_set(folder.parent, folder.name, (INDEX,), [])
    if found is None:
        raise SystemExit(f"{folder}: no shards")
    tensors = ((name, found.where[name].get(name)) for name in sorted(found.where))
    config, vocabulary = config_of(layers)
    write_language_model(config, vocabulary, arrays(tensors), folder / "language_model.onnx", settings)


def run(folder: Path, layers: int) -> dict[str, Any]:
    import numpy as np

    from runtime.backends.onnxruntime import OnnxRuntimeLanguageModel
    from runtime.engines import EngineOptions

    config, vocabulary = config_of(layers)
    started = time.perf_counter()
    model = OnnxRuntimeLanguageModel(folder / "language_model.onnx", EngineOptions(), config.max_positions)
    loaded = time.perf_counter()
    model.start(1, 64)
    generator = np.random.default_rng(0)
    prompt = generator.standard_normal((1, 16, config.hidden_size), dtype=np.float32)
    logits = model.forward(prompt, np.array([16]))
    prefilled = time.perf_counter()
    for _ in range(NEW_TOKENS):
        step = generator.standard_normal((1, 1, config.hidden_size), dtype=np.float32)
        logits = model.forward(step, np.array([1]))
    done = time.perf_counter()
    if logits.shape != (1, vocabulary) or not np.isfinite(logits).all():
        raise SystemExit(f"logits {logits.shape} are not finite numbers of the vocabulary")
    return {
        "load s": loaded - started,
        "prefill of 16 s": prefilled - loaded,
        "s a token": (done - prefilled) / NEW_TOKENS,
        "logits std": float(logits.std()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--flavour", default=None)
    parser.add_argument("--backend", default="onnx")
    parser.add_argument("--no-run", action="store_true")
    arguments = parser.parse_args()
    settings = EngineSettings(backend=arguments.backend, precision=arguments.precision, flavour=arguments.flavour)
    folder: Path = arguments.folder
    folder.mkdir()
    try:
        show("shards", measured(write_shards, folder, arguments.layers))
        source = sum(path.stat().st_size for path in folder.iterdir())
        figures = measured(export, folder, arguments.layers, settings)
        files = [folder / "language_model.onnx", folder / "language_model.onnx.data"]
        show("export", figures | {"source GiB": source / GIB, "GiB": sum(f.stat().st_size for f in files) / GIB})
        for path in folder.glob("*.safetensors"):
            path.unlink()
        if not arguments.no_run:
            show("run", measured(run, folder, arguments.layers))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
