"""A model's language part as transformers' Llama, the form that other runtimes read.

Contract: a folder with weights, configuration and a tokenizer that stands for one; what is there already stays.
"""

from __future__ import annotations

import json
from pathlib import Path

from export.graphs.registry import LANGUAGE_MODEL
from runtime.files import published
from videolavit.checkpoints import Weights, stored_tensors
from videolavit.config import ModelConfig
from videolavit.inventory import inventory
from videolavit.safetensors_writer import write_safetensors


def write(config: ModelConfig, weights: Weights, folder: Path) -> None:
    """The language model of `config` into `folder`, with `weights` in the types in which they are stored."""
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shapes = dict(sorted(inventory(config, LANGUAGE_MODEL).items()))
    with published(folder / "model.safetensors") as staging:
        write_safetensors(staging, shapes, stored_tensors(weights, LANGUAGE_MODEL))
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
