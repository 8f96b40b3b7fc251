"""onnxruntime-genai: its own builder's graph, its own loop."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from peers.protocol import Setting

LIBRARY = "onnxruntime-genai"
PRECISIONS = ("fp32", "int8", "int4")


class Peer:
    """Threads are pinned in the configuration that the builder writes: by default it takes more than there are."""

    def convert(self, setting: Setting) -> None:
        from onnxruntime_genai.models.builder import create_model, parse_extra_options

        folder = _folder(setting)
        if (folder / "done").is_file():
            return
        options = ["int4_block_size=32", "int4_accuracy_level=4"] if setting.precision == "int4" else []
        where = ("", str(setting.folder), str(folder), setting.precision, "cpu", str(folder / "cache"))
        with contextlib.redirect_stdout(io.StringIO()):  # the builder talks; stdout is for results
            create_model(*where, **parse_extra_options(*where, options))
        (folder / "done").touch()

    def prepare(self, setting: Setting) -> None:
        import onnxruntime_genai

        folder = _folder(setting)
        path = folder / "genai_config.json"
        config = json.loads(path.read_text())
        session = config["model"]["decoder"]["session_options"]
        session["intra_op_num_threads"] = setting.threads
        path.write_text(json.dumps(config))
        self._library: Any = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(folder))
        self._capacity = setting.capacity
        self._generator: Any = None

    def prefill(self, ids: list[int]) -> int:
        parameters = self._library.GeneratorParams(self._model)
        parameters.set_search_options(do_sample=False, max_length=self._capacity, min_length=self._capacity)
        self._generator = self._library.Generator(self._model, parameters)
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
