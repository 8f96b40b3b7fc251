"""The Llama that all peers run: random weights, as transformers reads them.

Contract: weights are representable in float16 and stored so; the same name gives the same model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from export.bench import llama_folder
from export.bench.source import PooledWeights
from runtime.errors import UsageError
from videolavit.config import PRESETS, LanguageModelConfig, ModelConfig


def model_of(name: str) -> ModelConfig:
    """`shapes`, the demo model, or LAYERSxWIDTH with the official vocabulary, heads of 128 (64 below a width of 1024).

    Raises UsageError.
    """
    if name in ("tiny", "shapes"):
        return PRESETS[name]
    layers, _, width = name.partition("x")
    if not (layers.isdigit() and width.isdigit() and int(layers) and int(width) and int(width) % 256 == 0):
        raise UsageError(f"--sizes {name}: write shapes, or LAYERSxWIDTH like 16x2048, the width a multiple of 256")
    heads = int(width) // (128 if int(width) >= 1024 else 64)
    config = LanguageModelConfig(
        hidden_size=int(width),
        intermediate_size=-(-int(width) * 8 // 3 // 256) * 256,
        layers=int(layers),
        heads=heads,
        kv_heads=heads,
    )
    return replace(PRESETS["video-lavit-7b"], name=name, language_model=config)


def write(config: ModelConfig, folder: Path) -> None:
    """Weights, configuration and a tokenizer that stands for one, into `folder`; nothing where they are there."""
    llama_folder.write(config, PooledWeights(config), folder)
