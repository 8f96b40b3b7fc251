"""Typed settings that travel in a bundle's manifest: schedulers, language model shape, task defaults.

Contract: defaults live here once. The values are the official model's unless a bundle says otherwise;
an unknown key is an error.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from runtime.schedule_names import VideoStart


class SchedulerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Noise schedule and sampler of one denoising loop (reference semantics §8.2, §9.3).

    Attributes:
        kind: `euler` (EulerDiscrete), `euler-ancestral` or `ddim` with eta 0.
        spacing: how sampling timesteps are spread over the training steps.
        sigma_min, sigma_max: range of the Karras schedule; only used with `karras`.
    """

    kind: Literal["euler", "euler-ancestral", "ddim"]
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: int = 1
    karras: bool = False
    continuous_timesteps: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    set_alpha_to_one: bool = False
    clip_sample: bool = False


VIDEO_SCHEDULER = SchedulerSettings(
    kind="euler",
    prediction="v_prediction",
    karras=True,
    continuous_timesteps=True,
    sigma_min=0.002,
    sigma_max=700.0,
)
KEYFRAME_SCHEDULER = SchedulerSettings(kind="euler-ancestral")


class LanguageModelShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the generation loop must know about the language model."""

    hidden_size: int = 4096
    layers: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    max_positions: int = 4096


class TaskDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Default settings of the tasks (reference semantics §12, §13.3).

    Attributes:
        image_guidance: classifier-free guidance of the key frame's denoising loop.
        text_guidance: guidance of the language model while it writes image tokens.
        motion_guidance: guidance of the language model while it writes motion tokens.
        video_guidance: (first frame, last frame) guidance of the video denoising loop.
        max_image_tokens, min_image_tokens: bounds on generated image tokens.
        candidates: tries of which one is kept, see `runtime.candidates`.
        kept_pictures: of the candidates, the likeliest, which alone are written motion; 0: all of them. See
            `runtime.token_writer`.
        finalists: of the candidates, so many are drawn before one is kept, see `runtime.requests.ImageRequest`.
        inverse_rate: share of the key-frame schedule that later clips of a long video skip (§12.4).
        keyframe_sampler, keyframe_spacing, video_sampler, video_spacing, video_sigmas: how the denoising loops step,
            see `runtime.schedulers.ScheduleOptions`; None leaves the model's own schedule.
        image_guidance_interval, video_guidance_interval: noise levels between which the denoising loops are guided;
            None for all of them.
        video_start: what a clip is denoised from: `noise` alone (§9.4), or the key frame moved along its `motion`
            vectors, under noise of the highest level. From a low level that takes fewer steps, and what is shown stays
            what it was.
    """

    image_guidance: float = 7.0
    text_guidance: float = 4.0
    motion_guidance: float = 7.0
    video_guidance: tuple[float, float] = (1.0, 4.0)
    reconstruction_guidance: tuple[float, float] = (1.0, 3.0)
    keyframe_steps: int = 50
    video_steps: int = 25
    top_k: int = 50
    top_p: float = 1.0
    temperature: float = 1.0
    max_image_tokens: int = 500
    min_image_tokens: int = 20
    max_answer_tokens: int = 512
    min_answer_tokens: int = 8
    candidates: int = 1
    kept_pictures: int = 0
    finalists: int = 1
    inverse_rate: float = 0.9
    noise_augmentation: float = 0.02
    motion_bucket: int = 127
    decode_chunk: int = 8
    max_clips: int = 16
    keyframe_sampler: str | None = None
    keyframe_spacing: str | None = None
    image_guidance_interval: tuple[float, float] | None = None
    video_sampler: str | None = None
    video_spacing: str | None = None
    video_sigmas: tuple[float, float] | None = None
    video_guidance_interval: tuple[float, float] | None = None
    video_start: VideoStart = "noise"
