"""The language model: a plain Llama over the unified vocabulary (reference semantics §2, §10)."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM

from videolavit.config import LanguageModelConfig


def build_language_model(config: LanguageModelConfig, vocab_size: int) -> LlamaForCausalLM:
    """Llama with random weights and untied embeddings.

    Args:
        config: sizes.
        vocab_size: ids of text, image and motion together; `Vocabulary.size`.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.max_positions,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
        )
    )
