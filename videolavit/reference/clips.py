"""Denoising of clips from a key frame and its motion (reference semantics §9.2 to §9.4).

Contract: batched over videos; motion is at latent size and in the detokenizer's scale. The loop yields the latents
after every call of the network. Unconditional and conditional halves go through the UNet as one batch, unconditional
first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from runtime.noise import Noise
from runtime.schedulers import AS_IT_IS, ScheduleOptions
from runtime.settings import SchedulerSettings
from videolavit.reference.schedulers import build_scheduler, is_guided, normal, step

LATENT_CHANNELS = 4


def denoise(
    unet: Any,
    settings: SchedulerSettings,
    image_latents: Tensor,
    motion: Tensor,
    states: Tensor,
    time_ids: Tensor,
    *,
    steps: int,
    guidance: tuple[float, float],
    noise: Noise,
    options: ScheduleOptions = AS_IT_IS,
    interval: tuple[float, float] | None = None,
    start: Tensor | None = None,
) -> Iterator[Tensor]:
    """Latents [B, T, 4, h, w] after every call.

    Args:
        image_latents: [B, 4, h, w] of the key frames.
        motion: [B, 2, T, h, w].
        states: [B, T, 256, D] of the motion condition encoder.
        time_ids: [B, 3] frames per second, motion bucket, noise augmentation.
        guidance: scale at the first and at the last frame.
        options: what to change of the schedule of `settings`.
        interval: noise levels that are guided; outside them the conditional prediction is taken as it is.
        start: [B, T, 4, h, w] scaled latents that are denoised, under noise of the highest level; None: noise alone.
    """
    videos, frames = len(image_latents), motion.shape[2]
    scheduler = build_scheduler(settings, steps, image_latents.device, options)
    shape = (videos, frames, LATENT_CHANNELS, *image_latents.shape[2:])
    drawn = normal(noise, shape, image_latents)
    if start is None:
        latents = drawn * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(start, drawn, scheduler.timesteps[:1])
    pictures = image_latents[:, None].expand(shape)
    vectors = motion.permute(0, 2, 1, 3, 4)  # [B, T, 2, h, w]
    context = torch.cat([torch.zeros_like(states), states])
    ids = torch.cat([time_ids, time_ids])
    scale = torch.linspace(*guidance, frames, device=latents.device, dtype=latents.dtype).view(1, frames, 1, 1, 1)
    for call, timestep in enumerate(scheduler.timesteps):
        noisy = scheduler.scale_model_input(latents, timestep)
        without = torch.cat([noisy, torch.zeros_like(pictures), torch.zeros_like(vectors)], dim=2)
        given = torch.cat([noisy, pictures, vectors], dim=2)
        output = unet(torch.cat([without, given]), timestep, context, ids)  # [2B, T, 4, h, w]
        v_without, v_given = output.chunk(2)
        guided = v_without + scale * (v_given - v_without) if is_guided(scheduler, call, interval) else v_given
        latents = step(scheduler, guided, timestep, latents, noise)
        yield latents


def augment(pictures: Tensor, strength: float, noise: Noise) -> Tensor:
    """pictures [B, 3, H, W] with noise of standard deviation `strength` added."""
    return pictures + strength * normal(noise, tuple(pictures.shape), pictures)


def encode(vae: Any, pictures: Tensor) -> Tensor:
    """pictures [B, 3, H, W] in [-1, 1] -> latents [B, 4, h, w]: the mode of the posterior, not scaled."""
    return vae.encode(pictures).latent_dist.mode()


def decode(vae: Any, latents: Tensor, chunk: int) -> Tensor:
    """Scaled latents [B, T, 4, h, w] -> frames [B, T, 3, H, W], about [-1, 1], `chunk` frames of a video at a time.

    A chunk is decoded as a video of its own, so its borders are seen by the decoder's temporal convolutions.
    """
    videos = []
    for video in latents / vae.config.scaling_factor:
        parts = [vae.decode(part, num_frames=len(part)).sample for part in video.split(chunk)]
        videos.append(torch.cat(parts))
    return torch.stack(videos)
