"""The stage that makes a whole clip."""

from __future__ import annotations

from collections.abc import Callable

from runtime.bench.context import Bench
from runtime.bench.networks import contenders
from runtime.bench.settings import OURS, Row
from runtime.bench.timing import Times
from runtime.noise import Noise
from runtime.pipeline import Pipeline
from runtime.requests import VideoRequest

# A clip from a sentence needs these, by the order in which they are called.
ENGINES = (
    "token_embedding",
    "language_model",
    "keyframe_conditioner",
    "keyframe_unet",
    "keyframe_vae_decoder",
    "motion_decoder",
    "motion_conditioner",
    "video_vae_encoder",
    "video_unet",
    "video_vae_decoder",
)


def clip(bench: Bench) -> list[Row]:
    """The clip, and how long each of its parts took in the same runs."""
    settings, defaults = bench.settings, bench.manifest.defaults
    size = settings.sizes(bench.manifest)[0]
    request = settings.clip_request(bench.manifest)
    parts: list[dict[str, float]] = []
    with Pipeline(bench.bundle, threads=settings.threads, provider=settings.provider) as pipeline:
        run = _making(pipeline, request, settings.seed, parts)
        bench.alone(run)
        times = bench.take_turns(bench.turn(run, lambda peer: peer.clip(request, settings.seed)))[0]
    how = f"{settings.keyframe_steps or defaults.keyframe_steps} + {settings.video_steps or defaults.video_steps} steps"
    if settings.candidates > 1:
        how += f", {settings.candidates} candidates"
    frames = bench.manifest.geometry.frames
    rows = contenders("clip", f"{size[0]}x{size[1]}, {how}", "clip", times, amount=frames, of="frames")
    counted = parts[-settings.repeats :]
    for name in counted[0]:
        seconds = Times(tuple(part[name] for part in counted))
        rows.append(Row(stage="clip", detail=f"of it {name}", contender=OURS, times=seconds, unit="clip"))
    return rows


def _making(pipeline: Pipeline, request: VideoRequest, seed: int, parts: list[dict[str, float]]) -> Callable[[], None]:
    """A run that makes one clip and adds the seconds of its parts to `parts`."""

    def run() -> None:
        before = pipeline.seconds
        for _ in pipeline.generate_video(request, Noise(seed)):
            pass
        parts.append({name: seconds - before.get(name, 0.0) for name, seconds in pipeline.seconds.items()})

    return run
