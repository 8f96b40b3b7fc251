"""Stages of the language model: reading a prompt, writing tokens.

Contract: tokens are written by `runtime.decoder.generate`, as they are when a clip is made, greedily, so that every run
writes the same. N positions are in the cache before the first of a run; its last one is read again for its scores, so
a run of T tokens is T forward passes of one position, of 2 rows with guidance. The row without the prompt has only the
marker in front of it, as in generation.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from runtime.bench.context import Bench
from runtime.bench.networks import contenders
from runtime.bench.peer import Decoding
from runtime.bench.settings import OURS, Row
from runtime.bench.timing import Run, Turn
from runtime.bench.work import count_language_model
from runtime.context import Context
from runtime.decoder import DecodingOptions, generate, motion_phase

_ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}
GUIDANCE = 2.0  # the work does not depend on how strong it is, and a model's default may be none
BLOCKS = 2  # a block of runs with guidance follows one without, twice: each reads the prompt anew


def prefill(bench: Bench) -> list[Row]:
    rows = []
    model = bench.engines.language_model()
    prompts = {context: _embeddings(bench, context) for context in bench.settings.contexts}

    def reading(prompt: np.ndarray) -> Run:
        return lambda: Context().read(model, [prompt], len(prompt), len(prompt))

    bench.alone(reading(prompts[max(prompts)]))
    measured = {}
    for context, prompt in prompts.items():
        turn = bench.turn(reading(prompt), lambda peer: peer.prefill(prompt))  # noqa: B023
        measured[context] = bench.take_turns(turn)[0]
    bench.engines.close()
    entry = bench.manifest.engines["language_model"]
    for context, times in measured.items():
        work = bench.work("language_model", count_language_model, entry, 1, context)
        flops = None if work is None else work.flops
        rows += contenders("prefill", f"{context} positions", "prompt", times, flops=flops, amount=context, of="tokens")
    return rows


def decode(bench: Bench) -> list[Row]:
    tokens = bench.settings.tokens
    embed = bench.engines.get("token_embedding")
    start = embed(ids=np.array([[bench.manifest.vocabulary.motion_start]]))["embeds"][0]  # [1, D]
    works = {}
    for context in bench.settings.contexts:
        prompt = np.concatenate([_embeddings(bench, context - 1), start])
        for scale in (1.0, GUIDANCE):
            codes = motion_phase(bench.manifest.vocabulary).codes[0]
            works[context, scale] = Decoding(prompt, start, codes, tokens, scale)
    shared = Context()
    own = {key: _own(bench, work, shared) for key, work in works.items()}
    bench.alone(own[max(bench.settings.contexts), GUIDANCE])  # two rows and the longest cache take the most memory
    measured = {}
    for context in bench.settings.contexts:
        plain, guided = (context, 1.0), (context, GUIDANCE)
        turns = [_turn(bench, own[key], works[key]) for key in (plain, guided)]
        measured[plain], measured[guided] = bench.take_turns(*turns, blocks=BLOCKS)
    bench.engines.close()
    weights = _weight_bytes(bench)
    rows = []
    for context in bench.settings.contexts:
        before = measured[context, 1.0][OURS].median
        for scale in (1.0, GUIDANCE):
            times = {name: found.per(tokens) for name, found in measured[context, scale].items()}
            bytes_ = None if weights is None else weights + _cache_bytes(bench, context, scale != 1.0)
            kind = "guided" if scale != 1.0 else "unguided"
            found = contenders("decode", f"{kind}, {context} in cache", "token", times, bytes=bytes_, of="tokens")
            if scale != 1.0:
                ratio = measured[context, scale][OURS].median / before
                found[0] = replace(found[0], ratio=ratio, ratio_to="unguided")
            rows += found
    return rows


def _turn(bench: Bench, ours: Run, work: Decoding) -> Turn:
    part = "this stage" if work.guidance == 1 else "guided tokens"
    return bench.turn(ours, lambda peer: peer.decode(work), part)


def _own(bench: Bench, work: Decoding, context: Context) -> Run:
    """A run of the runtime's generation loop; the prompt stays in `context`."""
    model, table = bench.engines.language_model(), bench.engines.get("token_embedding")
    options = DecodingOptions(max_new=work.tokens, guidance=work.guidance, greedy=True, exact=work.tokens)
    phase = motion_phase(bench.manifest.vocabulary)

    def embed(ids: np.ndarray) -> np.ndarray:
        return table(ids=np.asarray(ids, np.int64))["embeds"]

    def run() -> None:
        steps = generate(
            model,
            embed,
            [work.prompt[:-1]],  # the phase brings the marker back
            phase,
            options,
            max_positions=bench.manifest.language_model.max_positions,
            context=context,
        )
        for _ in steps:
            pass

    return run


def _embeddings(bench: Bench, positions: int) -> np.ndarray:
    """Of a prompt, [positions, D]."""
    return bench.normal(positions, bench.manifest.language_model.hidden_size)


def _weight_bytes(bench: Bench) -> float | None:
    entry = bench.manifest.engines["language_model"]
    work = bench.work("language_model", count_language_model, entry, 1, 1)
    return None if work is None else work.weight_bytes


def _cache_bytes(bench: Bench, context: int, guided: bool) -> float:
    """Bytes of the cache that one token of a run reads, on average over the run."""
    entry = bench.manifest.engines["language_model"]
    position = sum(
        math.prod(dim for dim in tensor.shape[1:] if isinstance(dim, int)) * _ITEM[tensor.dtype]
        for tensor in entry.inputs
        if tensor.name.startswith(("past_key", "past_value"))
    )
    written = (bench.settings.tokens - 1) / 2
    positions = context + written + (1 + written if guided else 0)
    return position * positions
