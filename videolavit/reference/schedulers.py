"""diffusers' schedulers, built from the model's settings and fed with our own draws.

Contract: one scheduler object serves one denoising loop. No function here touches torch's global generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.schedulers import AysSchedules
from torch import Tensor
from torch.overrides import TorchFunctionMode

from runtime.noise import Noise
from runtime.schedule_names import LEVEL_SPACINGS, TIMESTEP_SPACINGS
from runtime.schedulers import AS_IT_IS, ScheduleOptions, chosen_spacing
from runtime.settings import SchedulerSettings


def build_scheduler(
    settings: SchedulerSettings, steps: int, device: torch.device, options: ScheduleOptions = AS_IT_IS
) -> Any:
    """A scheduler with its timesteps set for `steps` (reference semantics §8.2, §9.3), as `options` change it.

    Raises UsageError for parts that do not fit each other.
    """
    kind, spacing = options.sampler or settings.kind, chosen_spacing(settings, options)
    common: dict[str, Any] = {
        "num_train_timesteps": settings.train_steps,
        "beta_start": settings.beta_start,
        "beta_end": settings.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": settings.prediction,
        "timestep_spacing": spacing if spacing in TIMESTEP_SPACINGS else settings.spacing,
        "steps_offset": settings.steps_offset,
    }
    scheduler: Any
    if kind == "ddim":
        scheduler = DDIMScheduler(
            **common, set_alpha_to_one=settings.set_alpha_to_one, clip_sample=settings.clip_sample
        )
    elif kind == "euler-ancestral":
        scheduler = EulerAncestralDiscreteScheduler(**common)
    else:
        own = options.spacing is None and options.sigmas is None
        low, high = (settings.sigma_min, settings.sigma_max) if own else _range(settings, options)
        scheduler = EulerDiscreteScheduler(
            **common,
            use_karras_sigmas=spacing == "karras",
            use_exponential_sigmas=spacing == "exponential",
            sigma_min=low if spacing in LEVEL_SPACINGS else None,
            sigma_max=high if spacing in LEVEL_SPACINGS else None,
            timestep_type="continuous" if settings.continuous_timesteps else "discrete",
        )
        if spacing == "ays":
            scheduler.set_timesteps(sigmas=_ays(settings, options, steps), device=device)
            return _of_kind(kind, common, scheduler)
    scheduler.set_timesteps(steps, device=device)
    return _of_kind(kind, common, scheduler) if isinstance(scheduler, EulerDiscreteScheduler) else scheduler


def _range(settings: SchedulerSettings, options: ScheduleOptions) -> tuple[float, float]:
    """Lowest and highest noise level: what is asked for, else the model's, else those of training."""
    betas = torch.linspace(settings.beta_start**0.5, settings.beta_end**0.5, settings.train_steps) ** 2
    alphas = (1 - betas).cumprod(0)
    trained = ((1 - alphas) / alphas).sqrt()
    low, high = options.sigmas or (settings.sigma_min, settings.sigma_max)
    return float(trained[0]) if low is None else low, float(trained[-1]) if high is None else high


def _ays(settings: SchedulerSettings, options: ScheduleOptions, steps: int) -> list[float]:
    """Published levels of ten steps, taken to `steps` and to the model's range along log sigma, and a 0."""
    kind, last = ("Video", 0.002) if settings.continuous_timesteps else ("XL", 0.02917)
    published = torch.tensor([*AysSchedules[f"StableDiffusion{kind}Sigmas"][:-1], last]).double().log()
    low, high = (math.log(level) for level in _range(settings, options))
    stretched = low + (published - published[-1]) * ((high - low) / (published[0] - published[-1]))
    levels = torch.nn.functional.interpolate(stretched[None, None], steps + 1, mode="linear", align_corners=True)
    return [*levels[0, 0, :-1].exp().tolist(), 0.0]


def _of_kind(kind: str, common: dict[str, Any], euler: Any) -> Any:
    """The solver `kind` on the steps of an Euler scheduler: diffusers' other solvers know fewer ways to place them."""
    sigmas, timesteps = euler.sigmas, euler.timesteps
    if kind == "heun":
        heun = HeunDiscreteScheduler(**common)
        heun.set_timesteps(len(timesteps), device=timesteps.device)
        heun.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        heun.timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
        return heun
    if kind == "dpmpp-2m":
        solver = DPMSolverMultistepScheduler(**common, solver_order=2, algorithm_type="dpmsolver++")
        solver.set_timesteps(len(timesteps), device=timesteps.device)
        solver.sigmas, solver.timesteps, solver.num_inference_steps = sigmas, timesteps, len(timesteps)
        return solver
    return euler


def first_call(scheduler: Any, step: int) -> int:
    """Where step `step` begins in the scheduler's timesteps: Heun has each step but the last twice."""
    return 2 * step if isinstance(scheduler, HeunDiscreteScheduler) else step


def is_guided(scheduler: Any, call: int, interval: tuple[float, float] | None) -> bool:
    """Whether the noise level of a call, a place in the scheduler's timesteps, lies in `interval`."""
    if interval is None:
        return True
    if isinstance(scheduler, DDIMScheduler):
        alpha = scheduler.alphas_cumprod[int(scheduler.timesteps[call])]
        level = ((1 - alpha) / alpha).sqrt()
    else:
        level = scheduler.sigmas[call]
    return interval[0] <= float(level) <= interval[1]


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
