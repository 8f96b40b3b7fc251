"""The denoising loops of key frame and video, and chunked decoding of a video's latents.

Contract: engines in, latents out, all float32 (reference semantics §8, §9.4). Classifier-free guidance runs both
branches in one call of 2B rows, the unconditional ones first; unconditional means conditions of zeros and the
same time ids. Where nothing is guided (outside a guidance interval, or at scale 1) the conditional branch alone is run,
which is half the work. Where this departs from the reference (§14): starting latents come from the schedule that is run
(quirk 5), re-injected noise is not scaled twice (quirk 6), equal guidance for all frames is a range with equal
ends (quirk 7), a decoded chunk never spans two videos (quirk 9). Everything is float32, the VAE too (quirk 8).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from runtime.errors import UsageError
from runtime.noise import Noise
from runtime.schedulers import Past, Schedule

if TYPE_CHECKING:
    from runtime.engines import Engine

OnStep = Callable[[int], None]
Interval = tuple[float, float]  # noise levels, the lower one first


def keyframe_time_ids(size: tuple[int, int]) -> np.ndarray:
    """Size conditions of an uncropped picture of `size` (width, height) pixels: [1, 6] float32 (§8.1).

    Order: original height and width, crop top and left, target height and width.
    """
    width, height = size
    return np.array([[height, width, 0, 0, height, width]], dtype=np.float32)


def denoise_keyframe(
    unet: Engine,
    schedule: Schedule,
    *,
    prompt_embeds: np.ndarray,
    pooled: np.ndarray,
    time_ids: np.ndarray,
    latents: np.ndarray,
    guidance: float,
    noise: Noise,
    interval: Interval | None = None,
    start: int = 0,
    on_step: OnStep | None = None,
) -> np.ndarray:
    """Key-frame latents [B, 4, h, w], ready to be divided by the VAE's scaling factor and decoded (§8.1).

    Args:
        prompt_embeds: [B, P, D]; pooled: [B, D]; time_ids: [B, 6].
        latents: [B, 4, h, w] as call `start` expects them: normal noise times `schedule.init_noise_sigma` for
            call 0, or clean latents through `schedule.add_noise` for a later clip (§8.3).
        noise: drawn from once per step by schedules that need it.
        interval: noise levels that are guided; None for all.
        start: first call of the schedule to make, 0 .. n-1.
        on_step: told the number of calls made.
    """
    conditions = _Conditions(
        unet, prompt_embeds=_after_zeros(prompt_embeds), pooled=_after_zeros(pooled), time_ids=_twice(time_ids)
    )
    scale = np.float32(guidance)
    guides = guided_calls(schedule, scale, interval)
    past: Past = []
    for i in range(start, len(schedule.timesteps)):
        conditions.hold(both=guides[i])
        scaled = schedule.scale_input(latents, i)
        outputs = unet(latents=_twice(scaled) if guides[i] else scaled, timestep=schedule.timesteps[i : i + 1])
        predicted = _guided(outputs["noise"], scale) if guides[i] else outputs["noise"]  # [B, 4, h, w]
        drawn = noise.normal(*latents.shape) if schedule.needs_noise else None
        latents = schedule.step(predicted, i, latents, drawn, past)
        if on_step is not None:
            on_step(i + 1 - start)
    return latents


def denoise_video(
    unet: Engine,
    schedule: Schedule,
    *,
    image_latents: np.ndarray,
    motion: np.ndarray,
    states: np.ndarray,
    guidance: tuple[float, float],
    fps: int,
    motion_bucket: int,
    noise_augmentation: float,
    initial: np.ndarray,
    start: np.ndarray | None = None,
    interval: Interval | None = None,
    on_step: OnStep | None = None,
) -> np.ndarray:
    """Video latents [B, T, 4, h, w], ready for `decode_video` (§9.4). The schedule draws no noise.

    Args:
        image_latents: [B, 4, h, w] of the noised key frame, not scaled.
        motion: [B, 2, T, h, w] at latent size, x1 scale.
        states: [B, T, 256, C] motion context.
        guidance: of the first and the last frame; linear between them.
        fps, motion_bucket, noise_augmentation: SVD's micro-conditions, given to the network as they are.
        initial: [B, T, 4, h, w] standard normal.
        start: [B, T, 4, h, w] clean latents that the loop starts from, under noise of the first call's level; None:
            from noise alone.
        interval: noise levels that are guided; None for all.
        on_step: told the number of calls made.
    """
    rows, frames, channels = initial.shape[:3]
    time_ids = np.tile(np.array([fps, motion_bucket, noise_augmentation], dtype=np.float32), (2 * rows, 1))  # [2B, 3]
    conditions = _Conditions(unet, states=_after_zeros(states), time_ids=time_ids)
    # Channels of the network's input: noisy latents, image latents, motion. Only the first change from step to step.
    constant = np.concatenate(
        [
            np.broadcast_to(image_latents[:, None], initial.shape),
            motion.transpose(0, 2, 1, 3, 4),
        ],
        axis=2,
    )  # [B, T, 4 + 2, h, w]
    sample = np.zeros((2 * rows, frames, channels + constant.shape[2], *initial.shape[3:]), dtype=np.float32)
    sample[rows:, :, channels:] = constant
    scale = np.linspace(*guidance, frames, dtype=np.float32)[:, None, None, None]  # [T, 1, 1, 1]

    guides = guided_calls(schedule, scale, interval)
    past: Past = []
    latents = initial * schedule.init_noise_sigma if start is None else schedule.add_noise(start, initial, 0)
    for i in range(len(schedule.timesteps)):
        conditions.hold(both=guides[i])
        scaled = schedule.scale_input(latents, i)
        for half in (sample[:rows], sample[rows:]):
            half[:, :, :channels] = scaled
        outputs = unet(sample=sample if guides[i] else sample[rows:], timestep=schedule.timesteps[i : i + 1])
        predicted = _guided(outputs["v"], scale) if guides[i] else outputs["v"]  # [B, T, 4, h, w]
        latents = schedule.step(predicted, i, latents, past=past)
        if on_step is not None:
            on_step(i + 1)
    return latents


def decode_video(vae_decoder: Engine, latents: np.ndarray, scaling: float, chunk: int) -> np.ndarray:
    """Latents [B, T, 4, h, w] -> frames [B, T, 3, H, W] in about [-1, 1].

    `chunk` frames are decoded at a time, as a video of their own: the decoder sees no frames across a border. Each goes
    straight to its place, so that no second copy of all frames is made. Raises UsageError for no latents at all.
    """
    scaled = latents / np.float32(scaling)
    frames: np.ndarray | None = None
    for index, video in enumerate(scaled):
        for first in range(0, len(video), chunk):
            decoded = vae_decoder(latents=video[first : first + chunk])["frames"]
            if frames is None:
                frames = np.empty((*latents.shape[:2], *decoded.shape[1:]), decoded.dtype)
            frames[index, first : first + chunk] = decoded
    if frames is None:
        raise UsageError("video: there are no latents to decode")
    return frames


class _Conditions:
    """What stays the same through a loop, held by its network for both branches or for the conditional one alone.

    Args:
        both: inputs of the network with [2B, ...] rows, the unconditional ones first.
    """

    def __init__(self, unet: Engine, **both: np.ndarray) -> None:
        self._unet = unet
        self._values = both
        self._held: bool | None = None

    def hold(self, both: bool) -> None:
        """See to it that the network holds rows of `both` branches, or of the conditional one. Uploads on a change."""
        if both is not self._held:
            self._unet.hold(**{n: v if both else v[len(v) // 2 :] for n, v in self._values.items()})
            self._held = both


def guided_calls(schedule: Schedule, scale: np.ndarray | np.float32, interval: Interval | None) -> list[bool]:
    """Whether each call of the schedule is guided, which doubles the rows of the network: [calls].

    `scale` is one number or one per frame; nothing is guided where all are 1. `interval` None is all noise levels.
    """
    levels = schedule.levels
    if np.all(scale == 1):
        return [False] * len(levels)
    low, high = interval or (0.0, np.inf)
    return [bool(low <= level <= high) for level in levels]


def _twice(values: np.ndarray) -> np.ndarray:
    """The same for both branches: [B, ...] -> [2B, ...]."""
    return np.concatenate([values, values])


def _after_zeros(values: np.ndarray) -> np.ndarray:
    """Conditions of both branches: [B, ...] -> [2B, ...], zeros first."""
    return np.concatenate([np.zeros_like(values), values])


def _guided(both: np.ndarray, scale: np.ndarray | np.float32) -> np.ndarray:
    """Predictions of both branches [2B, ...] -> guided prediction [B, ...]."""
    unconditional, conditional = np.split(both, 2)
    guided = conditional - unconditional
    guided *= scale
    guided += unconditional
    return guided
