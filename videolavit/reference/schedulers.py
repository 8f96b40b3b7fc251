"""diffusers' schedulers, built from the model's settings and fed with our own draws.

Contract: one scheduler object serves one denoising loop. No function here touches torch's global generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from torch import Tensor
from torch.overrides import TorchFunctionMode

from runtime.noise import Noise
from runtime.settings import SchedulerSettings


def build_scheduler(settings: SchedulerSettings, steps: int, device: torch.device) -> Any:
    """A scheduler with its timesteps set for `steps` (reference semantics §8.2, §9.3)."""
    common: dict[str, Any] = {
        "num_train_timesteps": settings.train_steps,
        "beta_start": settings.beta_start,
        "beta_end": settings.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": settings.prediction,
        "timestep_spacing": settings.spacing,
        "steps_offset": settings.steps_offset,
    }
    scheduler: Any
    if settings.kind == "ddim":
        scheduler = DDIMScheduler(
            **common, set_alpha_to_one=settings.set_alpha_to_one, clip_sample=settings.clip_sample
        )
    elif settings.kind == "euler-ancestral":
        scheduler = EulerAncestralDiscreteScheduler(**common)
    else:
        scheduler = EulerDiscreteScheduler(
            **common,
            use_karras_sigmas=settings.karras,
            sigma_min=settings.sigma_min if settings.karras else None,
            sigma_max=settings.sigma_max if settings.karras else None,
            timestep_type="continuous" if settings.continuous_timesteps else "discrete",
        )
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def normal(noise: Noise, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normal of `shape`, on the device and in the type of `like`."""
    return torch.from_numpy(noise.normal(*shape)).to(like.device, like.dtype)


def step(scheduler: Any, output: Tensor, timestep: Tensor, latents: Tensor, noise: Noise) -> Tensor:
    """Latents after one step. Only Euler-ancestral draws: one normal of the latents' shape."""
    with _Draws(noise):
        return scheduler.step(output, timestep, latents, return_dict=False)[0]


class _Draws(TorchFunctionMode):
    """While active, torch.randn answers with the next draw of `noise`."""

    def __init__(self, noise: Noise) -> None:
        super().__init__()
        self._noise = noise

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.randn:
            return func(*args, **kwargs)
        drawn = torch.from_numpy(self._noise.normal(*args[0]))
        return drawn.to(kwargs.get("device"), kwargs.get("dtype"))
