"""The stages that are measured, by name, and the engines each needs.

Contract: a stage is a function of a `Bench`, in the process that it has for itself, and gives its rows. Inputs are
seeded and have the shapes of a real run; their values cost nothing. What is timed:

    motion-vectors   a video file to key frames and grids, everything included
    visual-tokens    both networks of the visual tokenizer on one picture, without its preprocessing
    prefill          one prompt of N positions into an empty cache, and the logits at its end
    decode           the project's own generation loop: choice, embedding and forward of tokens after N positions,
                     without guidance and with it
    motion-decode    motion codes to a motion field
    keyframe-unet    one denoising step, both branches of guidance in one call
    keyframe-vae     latents to one key frame
    video-unet       one denoising step of a clip, both branches of guidance in one call
    video-vae        latents to all frames of a clip, in chunks as a run decodes them
    clip             a sentence to the frames of one clip, and the parts of it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from runtime.bench import language, motion, networks, whole
from runtime.bench.context import Bench
from runtime.bench.settings import Row
from runtime.errors import UsageError


@dataclass(frozen=True)
class Stage:
    """A stage, and the engines it cannot do without; all of a bundle's for `clip`."""

    measure: Callable[[Bench], list[Row]]
    engines: tuple[str, ...] = ()


STAGES: dict[str, Stage] = {
    "motion-vectors": Stage(motion.vectors),
    "visual-tokens": Stage(networks.visual_tokens, ("visual_encoder", "visual_merger")),
    "prefill": Stage(language.prefill, ("language_model",)),
    "decode": Stage(language.decode, ("token_embedding", "language_model")),
    "motion-decode": Stage(networks.motion_decode, ("motion_decoder",)),
    "keyframe-unet": Stage(networks.keyframe_unet, ("keyframe_unet",)),
    "keyframe-vae": Stage(networks.keyframe_vae, ("keyframe_vae_decoder",)),
    "video-unet": Stage(networks.video_unet, ("video_unet",)),
    "video-vae": Stage(networks.video_vae, ("video_vae_decoder",)),
    "clip": Stage(whole.clip, whole.ENGINES),
}


def parse_stages(text: str) -> tuple[str, ...]:
    """Names separated by commas, in the order of the table. Raises UsageError for an unknown one, and for none."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    for name in asked:
        if name not in STAGES:
            raise UsageError(f"--stages {name}: there is no such stage; choose from {', '.join(STAGES)}")
    if not asked:
        raise UsageError(f"--stages: no stage is named; choose from {', '.join(STAGES)}")
    return tuple(name for name in STAGES if name in asked)
