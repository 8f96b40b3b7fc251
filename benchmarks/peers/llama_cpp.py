"""llama.cpp through llama-cpp-python's C interface.

`use_extra_bufts` is off: the repacked buffers it would use for quantised matrices end in an illegal instruction on some
machines with AMX.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from peers.protocol import Setting, Stepwise

LIBRARY = "llama-cpp-python"
PRECISIONS = ("fp32", "int8", "int4")


class Peer(Stepwise):
    """The largest score is searched by numpy in the library's own buffer."""

    def convert(self, setting: Setting) -> None:
        from peers.gguf_model import write_gguf
        from runtime.files import published

        path = _path(setting)
        if not path.is_file():
            with published(path) as staging:
                write_gguf(setting.folder, staging, setting.precision)

    def prepare(self, setting: Setting) -> None:
        import llama_cpp as library

        self._library: Any = library
        self._quiet = library.llama_log_callback(lambda level, text, data: None)
        library.llama_log_set(self._quiet, ctypes.c_void_p(0))
        library.llama_backend_init()
        parameters = library.llama_model_default_params()
        parameters.use_extra_bufts = False
        parameters.n_gpu_layers = 0
        self._model = library.llama_model_load_from_file(str(_path(setting)).encode(), parameters)
        if not self._model:
            raise SystemExit(f"llama.cpp: {_path(setting)} was not loaded")
        context = library.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = setting.capacity
        context.n_threads = context.n_threads_batch = setting.threads
        context.type_k = context.type_v = library.GGML_TYPE_F32  # as the other peers have it
        self._context = library.llama_init_from_model(self._model, context)
        if not self._context:
            raise SystemExit("llama.cpp: no context of that length could be made")
        self._memory = library.llama_get_memory(self._context)
        self._size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))

    def prefill(self, ids: list[int]) -> int:
        self.rewind(0)
        return self._next(ids)

    def decode_step(self, token: int) -> int:
        return self._next([token])

    def rewind(self, length: int) -> None:
        self._library.llama_memory_seq_rm(self._memory, 0, length, -1)

    def _next(self, ids: list[int]) -> int:
        tokens = (self._library.llama_token * len(ids))(*ids)
        batch = self._library.llama_batch_get_one(tokens, len(ids))  # only the last position gives scores
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise SystemExit(f"llama.cpp: a call of {len(ids)} tokens ended with status {status}")
        scores = self._library.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(scores, (self._size,)).argmax())


def _path(setting: Setting) -> Path:
    return setting.folder / f"llama-{setting.precision}.gguf"
