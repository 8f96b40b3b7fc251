"""The Llama that all peers run: random weights, as transformers reads them.

Contract: weights are representable in float16 and stored so; the same name gives the same model.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from export.bench.source import PooledWeights
from runtime.errors import UsageError
from runtime.files import published
from videolavit.config import PRESETS, LanguageModelConfig, ModelConfig
from videolavit.inventory import inventory
from videolavit.safetensors_writer import write_safetensors

COMPONENT = "language_model"


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
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shapes = dict(sorted(inventory(config, COMPONENT).items()))
    with published(folder / "model.safetensors") as staging:
        write_safetensors(staging, shapes, PooledWeights(config).stored(COMPONENT))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    words = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": words, "added_tokens": []}))
    llm = config.language_model
    with published(folder / "config.json") as staging:  # the last: with it the model counts as written
        staging.write_text(
            json.dumps(
                {
                    "architectures": ["LlamaForCausalLM"],
                    "model_type": "llama",
                    "vocab_size": config.vocabulary.size,
                    "hidden_size": llm.hidden_size,
                    "intermediate_size": llm.intermediate_size,
                    "num_hidden_layers": llm.layers,
                    "num_attention_heads": llm.heads,
                    "num_key_value_heads": llm.kv_heads,
                    "head_dim": llm.hidden_size // llm.heads,
                    "max_position_embeddings": llm.max_positions,
                    "rms_norm_eps": llm.rms_norm_eps,
                    "rope_theta": llm.rope_theta,
                    "hidden_act": "silu",
                    "tie_word_embeddings": False,
                    "bos_token_id": 1,
                    "eos_token_id": 2,
                    "torch_dtype": "float32",
                }
            )
        )
