"""This project's runtime: the engines that `export` writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from peers.protocol import Setting, Stepwise

LIBRARY = "onnxruntime"
PRECISIONS = ("fp32", "int8", "int4")


class Peer(Stepwise):
    """ONNX Runtime below the project's own cache and loop."""

    def convert(self, setting: Setting) -> None:
        from export.bench.source import PooledWeights
        from export.engine import write_engine
        from export.settings import EngineSettings
        from peers.model import model_of
        from videolavit.checkpoints import Checkpoint

        folder = _folder(setting)
        if (folder / "done").is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        config = model_of(setting.folder.name)
        checkpoint = Checkpoint(config, tokenizer=b"", weights=PooledWeights(config))
        write_engine(
            checkpoint,
            "language_model",
            folder / "language_model.onnx",
            EngineSettings(precision=setting.precision),  # type: ignore[arg-type]
        )
        write_engine(checkpoint, "token_embedding", folder / "token_embedding.onnx", EngineSettings())
        (folder / "done").touch()

    def prepare(self, setting: Setting) -> None:
        from runtime.backends.onnxruntime import OnnxRuntimeEngine, OnnxRuntimeLanguageModel
        from runtime.engines import EngineOptions

        options = EngineOptions(threads=setting.threads)
        folder = _folder(setting)
        self._table = OnnxRuntimeEngine(folder / "token_embedding.onnx", options)
        self._model = OnnxRuntimeLanguageModel(folder / "language_model.onnx", options, setting.capacity)
        self._capacity = setting.capacity

    def prefill(self, ids: list[int]) -> int:
        self._model.start(1, self._capacity)
        return self._next(ids)

    def decode_step(self, token: int) -> int:
        return self._next([token])

    def rewind(self, length: int) -> None:
        self._model.rewind(np.array([length]))

    def _next(self, ids: list[int]) -> int:
        embeds = self._table(ids=np.array([ids], np.int64))["embeds"]
        return int(self._model.forward(embeds, np.array([len(ids)]))[0].argmax())


def _folder(setting: Setting) -> Path:
    return setting.folder / f"ours-{setting.precision}"
