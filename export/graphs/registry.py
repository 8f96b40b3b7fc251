"""Every engine by name.

Contract: `GRAPHS` holds one entry per engine of a bundle except `language_model`, whose inputs carry a cache and
whose graph is written by `export.language_model`. `ENGINES` is the order in which a bundle is built.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from export.graphs import keyframe, motion, video, visual
from export.graphs.graph import Graph, Input, Signature, integers
from videolavit.config import ModelConfig

LANGUAGE_MODEL = "language_model"


def _embedding(config: ModelConfig, model: Any) -> nn.Module:
    embedding: nn.Module = model.get_input_embeddings()
    return embedding


def _embedding_signature(config: ModelConfig) -> Signature:
    return Signature(
        {"ids": Input(("B", "S"), integers(config.vocabulary.size))},
        {"embeds": ("B", "S", config.language_model.hidden_size)},
    )


_TOKEN_EMBEDDING = Graph((LANGUAGE_MODEL,), _embedding, _embedding_signature, {"B": 2, "S": 5}, ({"B": 1, "S": 1},))

GRAPHS: dict[str, Graph] = {
    **visual.GRAPHS,
    **motion.GRAPHS,
    "token_embedding": _TOKEN_EMBEDDING,
    **keyframe.GRAPHS,
    **video.GRAPHS,
}
ENGINES: tuple[str, ...] = (*GRAPHS, LANGUAGE_MODEL)


def components_of(engine: str) -> tuple[str, ...]:
    """Names of the model components an engine is made from."""
    return (LANGUAGE_MODEL,) if engine == LANGUAGE_MODEL else GRAPHS[engine].components
