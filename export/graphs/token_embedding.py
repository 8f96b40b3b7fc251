"""The `token_embedding` engine: ids -> input embeddings of the language model (reference semantics §10, §13).

Contract: ids [B, S] int64 -> embeds [B, S, D] float32, the rows of `model.embed_tokens.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from export.graphs.writer import GraphWriter, Store, weight
from videolavit.config import LanguageModelConfig


def build_token_embedding(
    config: LanguageModelConfig,
    vocabulary_size: int,
    weights: Mapping[str, np.ndarray],
    store: Store = numpy_helper.from_array,
) -> onnx.ModelProto:
    """The engine's graph. `weights` maps Llama state-dict names to arrays. Raises CheckpointError."""
    width = config.hidden_size
    graph = GraphWriter(store)
    ids = graph.input("ids", TensorProto.INT64, ("B", "S"))
    table = weight(weights, "model.embed_tokens.weight", (vocabulary_size, width))
    graph.node("Gather", [graph.constant("embed_tokens.weight", table), ids], "embed_tokens", ["embeds"])
    graph.output("embeds", TensorProto.FLOAT, ("B", "S", width))
    return graph.model("token_embedding")
