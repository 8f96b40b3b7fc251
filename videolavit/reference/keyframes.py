"""Denoising of key frames (reference semantics §8).

Contract: everything is batched over pictures and in the units of the VAE's latents; the loop yields the latents after
every call of the network, so that each can be looked at. Conditional and unconditional halves go through the UNet as
one batch, unconditional first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from runtime.geometry import VAE_FACTOR
from runtime.noise import Noise
from runtime.schedulers import AS_IT_IS, ScheduleOptions
from runtime.settings import SchedulerSettings
from videolavit.reference.schedulers import build_scheduler, first_call, is_guided, normal, step

LATENT_CHANNELS = 4


def size_ids(size: tuple[int, int], like: Tensor) -> Tensor:
    """Time ids [1, 6] of an uncropped picture of `size` (width, height): original size, crop, target size (§8.1)."""
    width, height = size
    return torch.tensor([[height, width, 0, 0, height, width]], device=like.device, dtype=like.dtype)


def denoise(
    unet: Any,
    settings: SchedulerSettings,
    prompt: Tensor,
    pooled: Tensor,
    time_ids: Tensor,
    *,
    size: tuple[int, int],
    steps: int,
    guidance: float,
    noise: Noise,
    options: ScheduleOptions = AS_IT_IS,
    interval: tuple[float, float] | None = None,
    start: Tensor | None = None,
    level: int = 0,
) -> Iterator[Tensor]:
    """Latents [B, 4, h, w] after every call.

    Args:
        prompt: [B, P, D] prompt embeddings.
        pooled: [B, E] pooled embeddings.
        time_ids: [B, 6].
        size: (width, height) in pixels.
        options: what to change of the schedule of `settings`.
        interval: noise levels that are guided; outside them the conditional prediction is taken as it is.
        start: latents to start from at `level`; None draws them.
        level: steps of the schedule to leave out.
    """
    scheduler = build_scheduler(settings, steps, prompt.device, options)
    if start is None:
        width, height = size
        shape = (len(prompt), LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR)
        start = normal(noise, shape, prompt) * scheduler.init_noise_sigma
    latents = start  # [B, 4, h, w]
    prompts = torch.cat([torch.zeros_like(prompt), prompt])
    added = {
        "text_embeds": torch.cat([torch.zeros_like(pooled), pooled]),
        "time_ids": torch.cat([time_ids, time_ids]),
    }
    for call in range(first_call(scheduler, level), len(scheduler.timesteps)):
        timestep = scheduler.timesteps[call]
        sample = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)  # [2B, 4, h, w]
        output = unet(sample, timestep, encoder_hidden_states=prompts, added_cond_kwargs=added).sample
        without, given = output.chunk(2)
        guided = without + guidance * (given - without) if is_guided(scheduler, call, interval) else given
        latents = step(scheduler, guided, timestep, latents, noise)
        yield latents


def encode(vae: Any, pictures: Tensor) -> Tensor:
    """pictures [B, 3, H, W] in [-1, 1] -> scaled latents [B, 4, h, w], the mode of the posterior."""
    return vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Scaled latents [B, 4, h, w] -> pictures [B, 3, H, W], about [-1, 1]."""
    return vae.decode(latents / vae.config.scaling_factor).sample


def noised(
    latents: Tensor,
    settings: SchedulerSettings,
    *,
    steps: int,
    level: int,
    noise: Noise,
    options: ScheduleOptions = AS_IT_IS,
) -> Tensor:
    """Clean latents [B, 4, h, w] brought to the noise of step `level` of a schedule of `steps` (§8.3)."""
    scheduler = build_scheduler(settings, steps, latents.device, options)
    timesteps = scheduler.timesteps[first_call(scheduler, level)].expand(len(latents))  # [B]
    return scheduler.add_noise(latents, normal(noise, tuple(latents.shape), latents), timesteps)
