"""The stages of every task, as the engines they use.

Contract: names of engines, in the order in which `runtime.pipeline` asks for them; what a plan of the memory is made
from. A test runs every task and compares.
"""

from __future__ import annotations

from runtime.requests import AnswerRequest, ImageRequest, ReconstructionRequest, Resolved, VideoRequest
from runtime.residency import Stage

TOKENS: Stage = ("token_embedding", "language_model")
_PICTURE_TOKENS: tuple[Stage, ...] = (("visual_encoder",), ("visual_merger",))
_KEYFRAME: tuple[Stage, ...] = (("keyframe_conditioner",), ("keyframe_unet",), ("keyframe_vae_decoder",))
_CLIP: tuple[Stage, ...] = (
    ("motion_conditioner",),
    ("video_vae_encoder",),
    ("video_unet",),
    ("video_vae_decoder",),
)


def stages_of(settings: Resolved) -> tuple[Stage, ...]:
    """The stages of a resolved request."""
    # Pictures that were drawn to choose from them are read again.
    choosing = (*_PICTURE_TOKENS, TOKENS) if getattr(settings, "finalists", 1) > 1 else ()
    if isinstance(settings, VideoRequest):
        first = (*_PICTURE_TOKENS, TOKENS) if settings.image is not None else (TOKENS, *_KEYFRAME, *choosing)
        conditioner, *rest = _KEYFRAME
        again: tuple[Stage, ...] = (TOKENS, conditioner, ("keyframe_vae_encoder",), *rest, *choosing)
        clip: tuple[Stage, ...] = (("motion_decoder",), *_CLIP)
        return (*first, *clip, *(settings.clips - 1) * (*again, *clip))
    if isinstance(settings, ImageRequest):
        return (*(_PICTURE_TOKENS if settings.image is not None else ()), TOKENS, *_KEYFRAME, *choosing)
    if isinstance(settings, ReconstructionRequest):
        return (*((("motion_encoder",), ("motion_decoder",)) if settings.through_tokens else ()), *_CLIP)
    if isinstance(settings, AnswerRequest):
        pictures = _PICTURE_TOKENS if settings.pictures else ()
        return (*pictures, *((("motion_encoder",),) if settings.motions is not None else ()), TOKENS)
    raise TypeError(f"{type(settings).__name__} is not a request")
