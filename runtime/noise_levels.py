"""Which noise levels a denoising loop visits, in which order.

Contract: functions of settings and numbers alone, in numpy. A noise level sigma is the standard deviation of the noise
over that of the clean latents, sqrt((1 - alpha) / alpha) of a training timestep's cumulative alpha (reference
semantics §8.2); levels fall from the first step to the last.

Besides the spacings of training timesteps (`leading`, `trailing`, `linspace`) there are spacings of the levels
themselves: `karras` (even in sigma ** (1/7), arXiv 2206.00364), `exponential` (even in log sigma) and `ays`, the levels
that "Align Your Steps" (arXiv 2404.14507) found best for ten steps of the networks that the two UNets are built like.
"""

from __future__ import annotations

import numpy as np

from runtime.settings import SchedulerSettings

KARRAS_RHO = 7.0

# Eleven levels for ten steps, the last of which ends at 0 instead. Of SVD and of SDXL, as published.
_AYS_CONTINUOUS = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)
_AYS_DISCRETE = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.02917)


def cumulative_alphas(settings: SchedulerSettings) -> np.ndarray:
    """Products of 1 - beta over the scaled-linear betas: [train_steps] float32."""
    betas = np.linspace(settings.beta_start**0.5, settings.beta_end**0.5, settings.train_steps).astype(np.float32) ** 2
    return np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)


def spread(settings: SchedulerSettings, steps: int) -> np.ndarray:
    """Training timesteps to visit, falling: [steps] float64, whole numbers except with `linspace`."""
    last = settings.train_steps
    if settings.spacing == "linspace":
        return np.linspace(0, last - 1, steps, dtype=np.float32)[::-1].astype(np.float64)
    if settings.spacing == "leading":
        return np.arange(steps)[::-1] * float(last // steps) + settings.steps_offset
    # Rounding of the float stride can yield one value too many; the surplus is at the end.
    return np.arange(last, 0, -last / steps)[:steps].round() - 1


def between(spacing: str, high: float, low: float, steps: int, *, continuous: bool) -> np.ndarray:
    """`steps` levels from `high` down to about `low`: [steps] float64. `spacing` is one of LEVEL_SPACINGS.

    The levels of `ays` go from `high` to the last before 0, and `low` is where they would go on to. Levels between the
    published ones, for other numbers of steps, lie on straight lines in log sigma; for another range than the
    published, all are stretched in log sigma. `continuous` tells the two published sets apart.
    """
    if spacing == "karras":
        return np.linspace(high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO), steps) ** KARRAS_RHO
    if spacing == "exponential":
        return np.exp(np.linspace(np.log(high), np.log(low), steps))
    published = np.log(_AYS_CONTINUOUS if continuous else _AYS_DISCRETE)
    share = (published - published[-1]) / (published[0] - published[-1])  # 1 at the highest level, 0 at the lowest
    places = np.linspace(0, len(share) - 1, steps + 1)[:-1]
    return np.exp(np.log(low) + np.interp(places, np.arange(len(share)), share) * (np.log(high) - np.log(low)))


def timesteps_of(sigmas: np.ndarray, all_sigmas: np.ndarray) -> np.ndarray:
    """Fractional training timesteps with noise levels `sigmas`, interpolated in log sigma: [n] float64."""
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(all_sigmas), np.arange(len(all_sigmas)))
