"""onnxruntime-genai as a peer of the language model's stages.

Contract: the same weights in the same precision, on the CPU. It reads ids where the stages have embeddings, so a prompt
is as many ids, whichever; no time depends on what they are. It chooses from the whole vocabulary, and has no
classifier-free guidance: its place in the rows of guided tokens stays empty.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from export.bench import genai, llama_folder
from export.bench.source import Source
from runtime.apart import apart
from runtime.bench.peer import Call, Decoding
from runtime.bench.timing import Run
from runtime.errors import UsageError
from runtime.requests import VideoRequest

NAME = "genai"
_ID = 3  # of a prompt: any will do


def make(
    folder: str | None, preset: str, layers: int | None, device: str, precision: str, *, threads: int
) -> GenaiPeer:
    """The peer, with `threads` threads; `folder`, `preset` and `layers` are a `Source`'s.

    Raises UsageError for a device or a precision it is not measured with, ModuleNotFoundError without its library.
    """
    if device != "cpu":
        raise UsageError(f"--against {NAME}: computes on the cpu, not on {device}; use --provider cpu")
    if precision not in genai.PRECISIONS:
        known = ", ".join(genai.PRECISIONS)
        raise UsageError(f"--against {NAME}: the language model is {precision}; it is compared in {known}")
    importlib.import_module(genai.MODULE)  # here, because another process would wrap the error
    source = Source(folder=None if folder is None else Path(folder), preset=preset, layers=layers)
    return GenaiPeer(source, precision, threads)


class GenaiPeer:
    """See the module. The model is built when a stage first needs it, in a temporary folder, and stays loaded."""

    name = NAME

    def __init__(self, source: Source, precision: str, threads: int) -> None:
        self._source, self._precision, self._threads = source, precision, threads

    @cached_property
    def _model(self) -> Any:
        with tempfile.TemporaryDirectory(prefix="videolavit-genai-") as folder:
            llama, built = Path(folder) / "llama", Path(folder) / "built"
            apart("onnxruntime-genai's model", _convert, self._source, llama, built, self._precision)
            return genai.load(built, self._threads)

    def calls(self, calls: Sequence[Call]) -> None:
        return None

    def clip(self, request: VideoRequest, seed: int) -> None:
        return None

    def prefill(self, prompt: np.ndarray) -> Run:
        model, ids = self._model, _ids(len(prompt))

        def run() -> None:
            reader = genai.generator(model, len(prompt) + 1)
            reader.append_tokens(ids)
            reader.generate_next_token()

        return run

    def decode(self, work: Decoding) -> Run | None:
        if work.guidance != 1:
            return None
        before = len(work.prompt) - 1
        writer = genai.generator(self._model, len(work.prompt) + work.tokens)
        if before:
            writer.append_tokens(_ids(before))

        def run() -> None:
            writer.rewind_to(before)
            # Appending runs the model; the first choice from its scores runs nothing.
            writer.append_tokens(_ids(1))
            for _ in range(work.tokens):
                writer.generate_next_token()
                writer.get_next_tokens()

        return run


def _convert(source: Source, llama: Path, built: Path, precision: str) -> None:
    checkpoint = source.checkpoint()
    llama_folder.write(checkpoint.config, checkpoint.weights, llama)
    genai.build(llama, built, precision)


def _ids(count: int) -> np.ndarray:
    return np.full((1, count), _ID, np.int32)
