"""onnxruntime-genai: its own builder's graph, its own loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from export.bench import genai
from peers.protocol import Setting

LIBRARY = genai.PACKAGE
PRECISIONS = genai.PRECISIONS


class Peer:
    """See `export.bench.genai`."""

    def convert(self, setting: Setting) -> None:
        genai.build(setting.folder, _folder(setting), setting.precision)

    def prepare(self, setting: Setting) -> None:
        self._model = genai.load(_folder(setting), setting.threads)
        self._capacity = setting.capacity
        self._generator: Any = None

    def prefill(self, ids: list[int]) -> int:
        self._generator = genai.generator(self._model, self._capacity)
        self._generator.append_tokens(np.array([ids], np.int32))
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def decode(self, token: int, count: int) -> list[int]:
        # The first token is appended, which runs the model; choosing from its scores runs nothing.
        self._generator.append_tokens(np.array([[token]], np.int32))
        tokens = []
        for _ in range(count):
            self._generator.generate_next_token()
            tokens.append(int(self._generator.get_next_tokens()[0]))
        return tokens

    def rewind(self, length: int) -> None:
        self._generator.rewind_to(length)


def _folder(setting: Setting) -> Path:
    return setting.folder / f"genai-{setting.precision}"
