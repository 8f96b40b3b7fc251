"""The `language_model` engine in float32, from a torch model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np

from export.language_model.writing import write_language_model
from export.settings import EngineSettings, Flavour
from videolavit.config import LanguageModelConfig


def write(
    config: LanguageModelConfig,
    vocabulary: int,
    weights: Mapping[str, np.ndarray],
    path: Path,
    flavour: str = "gqa",
) -> Path:
    settings = EngineSettings(flavour=cast(Flavour, flavour))
    return write_language_model(config, vocabulary, weights.items(), path, settings)[0]
