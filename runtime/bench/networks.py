"""Stages that are calls of engines: tokenizer, detokenizers, autoencoders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.bench.context import Bench
from runtime.bench.peer import Call
from runtime.bench.settings import OURS, Row
from runtime.bench.timing import Run, Times
from runtime.bench.work import Work, count_call
from runtime.bundle import TensorEntry
from runtime.engines import EngineSet
from runtime.geometry import VAE_FACTOR

BRANCHES = 2  # conditional and unconditional, in one call


def visual_tokens(bench: Bench) -> list[Row]:
    features = _input(bench, "visual_merger", "features")
    patches, width = int(features.shape[1]), int(features.shape[2])
    side = bench.manifest.geometry.image_size
    calls = [
        Call("visual_encoder", {"pixels": bench.normal(1, 3, side, side)}),
        Call(
            "visual_merger",
            {
                "features": bench.normal(1, patches, width),
                "keep": bench.generator.integers(0, 2, (1, patches)).astype(np.float32),
            },
        ),
    ]
    return _rows(bench, "visual-tokens", f"{side}x{side}", "picture", calls)


def motion_decode(bench: Bench) -> list[Row]:
    codes = bench.generator.integers(
        0, bench.manifest.vocabulary.motion_codes, (1, bench.manifest.geometry.motion_tokens)
    )
    return _rows(bench, "motion-decode", f"{codes.size} codes", "clip", [Call("motion_decoder", {"codes": codes})])


def keyframe_unet(bench: Bench) -> list[Row]:
    size = bench.settings.sizes(bench.manifest)[1]
    width, height = size
    held = {
        "prompt_embeds": bench.normal(*_shape(bench, "keyframe_unet", "prompt_embeds", BRANCHES)),
        "pooled": bench.normal(*_shape(bench, "keyframe_unet", "pooled", BRANCHES)),
        "time_ids": np.tile(np.array([[height, width, 0, 0, height, width]], np.float32), (BRANCHES, 1)),
    }
    latents = bench.normal(BRANCHES, 4, height // VAE_FACTOR, width // VAE_FACTOR)
    call = Call("keyframe_unet", {"latents": latents, "timestep": np.array([500], np.float32)} | held, tuple(held))
    return _rows(bench, "keyframe-unet", _text(size), "step", [call])


def keyframe_vae(bench: Bench) -> list[Row]:
    size = bench.settings.sizes(bench.manifest)[1]
    latents = bench.normal(1, 4, size[1] // VAE_FACTOR, size[0] // VAE_FACTOR)
    return _rows(bench, "keyframe-vae", _text(size), "picture", [Call("keyframe_vae_decoder", {"latents": latents})])


def video_unet(bench: Bench) -> list[Row]:
    size = bench.settings.sizes(bench.manifest)[0]
    frames = bench.manifest.geometry.frames
    held = {
        "states": bench.normal(*_shape(bench, "video_unet", "states", BRANCHES)),
        "time_ids": np.tile(np.array([[bench.manifest.geometry.fps, 127, 0.02]], np.float32), (BRANCHES, 1)),
    }
    channels = int(_input(bench, "video_unet", "sample").shape[2])
    sample = bench.normal(BRANCHES, frames, channels, size[1] // VAE_FACTOR, size[0] // VAE_FACTOR)
    call = Call("video_unet", {"sample": sample, "timestep": np.array([0.5], np.float32)} | held, tuple(held))
    return _rows(bench, "video-unet", f"{_text(size)}, {frames} frames", "step", [call])


def video_vae(bench: Bench) -> list[Row]:
    size = bench.settings.sizes(bench.manifest)[0]
    frames, chunk = bench.manifest.geometry.frames, bench.manifest.defaults.decode_chunk
    latents = bench.normal(frames, 4, size[1] // VAE_FACTOR, size[0] // VAE_FACTOR)
    calls = [
        Call("video_vae_decoder", {"latents": latents[first : first + chunk]}) for first in range(0, frames, chunk)
    ]
    return _rows(bench, "video-vae", f"{_text(size)}, {frames} frames", "clip", calls, frames, "frames")


def _rows(
    bench: Bench, stage: str, detail: str, unit: str, calls: Sequence[Call], amount: float = 1.0, of: str = ""
) -> list[Row]:
    ours = own_run(bench.engines, calls)
    bench.alone(ours)
    times = bench.take_turns(bench.turn(ours, lambda peer: peer.calls(calls)))[0]
    bench.engines.close()
    return contenders(stage, detail, unit, times, flops=_flops(bench, calls), amount=amount, of=of)


def _flops(bench: Bench, calls: Sequence[Call]) -> float | None:
    """Operations of all calls, those of one engine at one size counted once; None where one is not counted."""
    counted: dict[object, Work | None] = {}
    total = 0.0
    for call in calls:
        key = call.engine, tuple(sorted((name, value.shape) for name, value in call.inputs.items()))
        if key not in counted:
            counted[key] = bench.work(call.engine, count_call, call.inputs)
        work = counted[key]
        if work is None:
            return None
        total += work.flops
    return total


def own_run(engines: EngineSet, calls: Sequence[Call]) -> Run:
    """The runtime's calls: what is held is on the device before the first run."""
    loaded = []
    for call in calls:
        engine = engines.get(call.engine)
        engine.hold(**{name: call.inputs[name] for name in call.held})
        loaded.append((engine, {name: value for name, value in call.inputs.items() if name not in call.held}))

    def run() -> None:
        for engine, inputs in loaded:
            engine(**inputs)

    return run


def contenders(
    stage: str,
    detail: str,
    unit: str,
    times: dict[str, Times],
    *,
    flops: float | None = None,
    bytes: float | None = None,
    amount: float = 1.0,
    of: str = "",
) -> list[Row]:
    """A row for each contender, the runtime's own first; those of peers say how they compare.

    `bytes` are of the runtime's own weights, which a peer may hold in another form.
    """
    median = times[OURS].median
    return [
        Row(
            stage=stage,
            detail=detail,
            contender=name,
            times=own,
            unit=unit,
            amount=amount,
            of=of,
            flops=flops,
            bytes=bytes if name == OURS else None,
            ratio=None if name == OURS else own.median / median,
            ratio_to="" if name == OURS else OURS,
        )
        for name, own in times.items()
    ]


def _input(bench: Bench, engine: str, name: str) -> TensorEntry:
    return next(tensor for tensor in bench.manifest.engines[engine].inputs if tensor.name == name)


def _shape(bench: Bench, engine: str, name: str, rows: int) -> tuple[int, ...]:
    """Shape of an input whose only free dimension is the rows."""
    return tuple(rows if isinstance(dim, str) else dim for dim in _input(bench, engine, name).shape)


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
