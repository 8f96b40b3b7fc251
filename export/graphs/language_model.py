"""The `language_model` engine: a Llama decoder with a KV cache, written node by node (reference semantics §10).

Contract, with B rows, S new positions, C cache capacity, D width, V vocabulary, H/K query/key heads, d head width:

    inputs_embeds [B, S, D] float32     new positions, right-padded
    past_lengths  [B] int32             positions each row has in the cache
    new_lengths   [B] int32             real positions among the S, at least 1
    past_key_i, past_value_i            [B, K, C, d'], layer i
    logits [B, V] float32               at each row's last real position
    present_key_i, present_value_i      [B, K, C, d'], the same buffers as the past ones

d' is d rounded up to what the attention operator takes (official sizes: d' = d = 128). The widened part of a head is
zero in every weight, so it changes no result. The cache has the type that the graph computes in: float32, also for
integer weights on ONNX Runtime, else float16 or bfloat16.

The caller binds one buffer as past and present, so the cache is updated in place. Three kinds of call are right:
prefill (`past_lengths` all 0, any S, any `new_lengths` <= S), one token a row (S = 1, any `past_lengths`), and a
continuation with S > 1 of a single row without padding (B = 1, `new_lengths` = S). A padded position is written to
the cache behind the row's end and overwritten by the next token before anything reads it. C is at least every
row's past length + S and at most `max_positions`.

Three flavours of attention (`export.language_model.attention`) give the same results by the same contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import onnx

from export.language_model.writing import language_model_in_memory
from export.settings import EngineSettings, Flavour
from videolavit.config import LanguageModelConfig


def build_language_model(
    config: LanguageModelConfig, vocabulary_size: int, weights: Mapping[str, np.ndarray], attention: str = "gqa"
) -> onnx.ModelProto:
    """The engine's graph in float32, its weights inside.

    Args:
        weights: Llama state-dict name -> array; each is read once, in graph order, and may be loaded on access.
        attention: flavour, a key of `export.language_model.attention.ATTENTION`.

    Raises CheckpointError for a missing or misshapen weight, UsageError for an unknown flavour.
    """
    settings = EngineSettings(flavour=cast(Flavour, attention))
    return language_model_in_memory(config, vocabulary_size, weights, settings)
