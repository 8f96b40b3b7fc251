"""Torch in eager mode as a peer: the modules that the engines were made from, with the same weights.

Contract: modules are built when a stage needs them and stay. On the CPU they compute in float32, whatever the engines
do; on a CUDA device in the type that is asked for (*not run*). Guidance runs the language model twice for a token, with
a cache each, as transformers' own guidance does. The whole clip is the reference pipeline's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.bench.source import Source
from export.graphs.registry import GRAPHS, LANGUAGE_MODEL
from export.onnx import torch_module
from runtime.bench.peer import Call, Decoding
from runtime.bench.timing import Run
from runtime.noise import Noise
from runtime.requests import VideoRequest
from runtime.tokenizers import TextTokenizer
from videolavit.checkpoints import Checkpoint

NAME = "torch"


def make(folder: str | None, preset: str, layers: int | None, device: str, dtype: str, *, threads: int) -> TorchPeer:
    """The peer, with `threads` threads on the CPU.

    `folder`, `preset` and `layers` are a `Source`'s; `device` is as torch names it, `dtype` `float32` or `float16`.
    """
    torch.set_num_threads(threads)
    source = Source(folder=None if folder is None else Path(folder), preset=preset, layers=layers)
    return TorchPeer(source.checkpoint(), torch.device(device), getattr(torch, dtype))


class TorchPeer:
    """See the module."""

    name = NAME

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._device, self._dtype = device, dtype

    def calls(self, calls: Sequence[Call]) -> Run:
        prepared = []
        modules: dict[str, Any] = {}
        for call in calls:
            graph = GRAPHS[call.engine]
            if call.engine not in modules:
                modules[call.engine] = torch_module(self._checkpoint, graph).to(self._device, self._dtype)
            names = graph.signature(self._checkpoint.config).inputs
            prepared.append((modules[call.engine], [self._tensor(call.inputs[name]) for name in names]))

        def run() -> None:
            for module, tensors in prepared:
                module(*tensors)

        return self._inferring(run)

    def prefill(self, prompt: np.ndarray) -> Run:
        model, embeds = self._language_model(), self._tensor(prompt)[None]
        return self._inferring(lambda: _forward(model, embeds, _cache()))

    def decode(self, work: Decoding) -> Run:
        model = self._language_model()
        contexts = [self._tensor(work.prompt)[None]]  # [1, N, D]
        if work.guidance != 1:
            contexts.append(self._tensor(work.start)[None])
        caches = [_cache() for _ in contexts]
        with torch.inference_mode():
            for context, cache in zip(contexts, caches, strict=True):
                if context.shape[1] > 1:
                    _forward(model, context[:, :-1], cache)
        embed = model.get_input_embeddings()
        allowed = slice(work.allowed.start, work.allowed.stop)

        def run() -> None:
            for index, context in enumerate(contexts):
                caches[index] = _cropped(caches[index], context.shape[1] - 1)
            inputs = [context[:, -1:] for context in contexts]
            for _ in range(work.tokens):
                scores = [_forward(model, x, cache)[:, allowed] for x, cache in zip(inputs, caches, strict=True)]
                guided = scores[0] if len(scores) == 1 else scores[1] + work.guidance * (scores[0] - scores[1])
                token = guided.argmax(-1, keepdim=True) + work.allowed.start  # [1, 1]
                int(token)  # generation has to know it
                inputs = [embed(token)] * len(contexts)

        return self._inferring(run)

    def clip(self, request: VideoRequest, seed: int) -> Run:
        from videolavit.reference import Reference

        with tempfile.TemporaryDirectory(prefix="videolavit-bench-") as folder:
            path = Path(folder) / "tokenizer.model"
            path.write_bytes(self._checkpoint.tokenizer)
            tokenizer = TextTokenizer(path)
        reference = Reference(self._checkpoint, self._checkpoint.config, tokenizer).to(self._device, self._dtype)

        def run() -> None:
            for _ in reference.generate_video(request, Noise(seed)):
                pass

        return self._inferring(run)

    def _language_model(self) -> Any:
        return self._checkpoint.component(LANGUAGE_MODEL).to(self._device, self._dtype)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _inferring(self, run: Callable[[], object]) -> Run:
        """`run` without gradients, over when the device is done."""

        def whole() -> None:
            with torch.inference_mode():
                run()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

        return whole


def _forward(model: Any, embeds: torch.Tensor, cache: Any) -> torch.Tensor:
    """Scores [1, V] at the last of the positions embeds [1, S, D], which go into the cache."""
    return model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def _cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def _cropped(cache: Any, length: int) -> Any:
    """The first `length` positions of a cache; a new one where that is none."""
    if not length:
        return _cache()
    surplus = cache.get_seq_length() - length
    if surplus > 0:
        cache.crop(-surplus)
    return cache
