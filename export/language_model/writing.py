"""Weights into the language model's graph: streamed into a file beside the model.

Contract: `write_language_model` takes the checkpoint's tensors one by one in any order, encodes each weight as soon as
all its tensors have come, appends it to the data file and forgets it. In memory are at most the tensors of the weights
under way, one layer's where the checkpoint is in the order of its names, and one encoded weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.language_model.decoder import Outline, outline
from export.language_model.formats import Format, format_of
from export.settings import EngineSettings
from export.storage import DataFile
from runtime.errors import CheckpointError
from videolavit.config import LanguageModelConfig


def write_language_model(
    config: LanguageModelConfig,
    vocabulary_size: int,
    tensors: Iterable[tuple[str, np.ndarray]],
    path: Path,
    settings: EngineSettings,
) -> list[Path]:
    """Write the engine to `path` and its weights to a file beside it; returns both.

    Args:
        tensors: (Llama state-dict name, array of any float type) pairs; names the graph does not need are passed over.
        settings: its precision, its backend and its `attention` flavour decide what is written.

    Raises CheckpointError for a missing or misshapen tensor, UsageError for sizes the precision cannot take,
    and OSError when the disk is full; what was written by then stays for the caller to remove.
    """
    plan = outline(config, vocabulary_size, settings.attention, format_of(settings))
    data = path.with_name(f"{path.name}.data")
    with data.open("wb") as stream:
        constants = _encode_all(plan, tensors, DataFile(stream, data.name))
    _complete(plan.model, constants)
    onnx.save(plan.model, path)
    return [path, data]


def _encode_all(
    plan: Outline, tensors: Iterable[tuple[str, np.ndarray]], data: DataFile
) -> list[tuple[Format, TensorProto]]:
    """Every weight of the plan, encoded and stored as soon as its tensors have come."""
    waiting = {name: (weight, form) for weight, form in plan.weights for name in weight.parts}
    arrived: dict[str, dict[str, np.ndarray]] = {}
    constants: list[tuple[Format, TensorProto]] = []
    for name, array in tensors:
        if name not in waiting:
            continue
        weight, form = waiting.pop(name)
        parts = arrived.setdefault(weight.name, {})
        parts[name] = array
        if len(parts) == len(weight.parts):
            for encoded in form.encode(weight.name, weight.array(arrived.pop(weight.name))):
                constants.append((form, data(encoded.name, encoded.dtype, encoded.shape, encoded.data)))
    if waiting:
        raise CheckpointError(
            f"checkpoint: weight {min(waiting)} is missing, and {len(waiting) - 1} more; "
            "give a complete checkpoint of this model"
        )
    return constants


def _complete(model: onnx.ModelProto, constants: list[tuple[Format, TensorProto]]) -> None:
    """Give the model its constants; what is stored as float16 for a float32 graph is widened by a Cast."""
    casts = []
    for form, tensor in constants:
        if tensor.data_type == TensorProto.FLOAT16 and form.dtype == TensorProto.FLOAT:
            name = tensor.name
            tensor.name = f"{name}.float16"
            casts.append(helper.make_node("Cast", [tensor.name], [name], name=f"{name}.cast", to=TensorProto.FLOAT))
        model.graph.initializer.append(tensor)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(casts + nodes)
