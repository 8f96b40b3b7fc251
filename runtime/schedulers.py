"""Noise schedules and sampler steps of the denoising loops, in numpy.

Contract: `make_schedule(settings, steps)` returns an immutable `Schedule`; nothing in it counts calls, a step is
told its index. All arithmetic on latents is float32 (reference semantics §8.2, §9.3). `init_noise_sigma` belongs
to the schedule that is run: the reference reads it before it sets the number of steps, so its first
Euler-ancestral picture starts from another noise level (quirk 5, fixed here).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import numpy as np

from runtime.errors import UsageError
from runtime.settings import SchedulerSettings

KARRAS_RHO = 7.0


@dataclass(frozen=True, eq=False)
class Schedule(abc.ABC):
    """A sampler for one number of steps n.

    Attributes:
        timesteps: [n] float32, what the network is told at each step.
        init_noise_sigma: standard deviation of the latents that step 0 starts from.
        prediction: what the network predicts.
    """

    timesteps: np.ndarray
    init_noise_sigma: np.float32
    prediction: str

    @property
    def needs_noise(self) -> bool:
        """Whether `step` wants fresh standard normal noise."""
        return False

    @abc.abstractmethod
    def scale_input(self, x: np.ndarray, i: int) -> np.ndarray:
        """Latents `x` as the network reads them at step `i`; same shape."""

    @abc.abstractmethod
    def step(self, model_output: np.ndarray, i: int, x: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        """Latents after step `i` from latents `x` before it. All arrays have the shape of `x`."""

    @abc.abstractmethod
    def add_noise(self, x: np.ndarray, noise: np.ndarray, i: int) -> np.ndarray:
        """Clean latents `x` with standard normal `noise` as step `i` expects to find them; same shape."""


@dataclass(frozen=True, eq=False)
class EulerSchedule(Schedule):
    """Euler steps on the probability-flow ODE. `sigmas` [n+1] float32, ending in 0."""

    sigmas: np.ndarray

    def scale_input(self, x: np.ndarray, i: int) -> np.ndarray:
        return x / np.sqrt(self.sigmas[i] ** 2 + np.float32(1))

    def step(self, model_output: np.ndarray, i: int, x: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        return self._towards(self.sigmas[i + 1], model_output, i, x)

    def add_noise(self, x: np.ndarray, noise: np.ndarray, i: int) -> np.ndarray:
        return x + noise * self.sigmas[i]

    def _towards(self, target: np.float32, model_output: np.ndarray, i: int, x: np.ndarray) -> np.ndarray:
        """Straight line from noise level `sigmas[i]` to noise level `target`."""
        sigma = self.sigmas[i]
        if self.prediction == "epsilon":
            clean = x - sigma * model_output
        else:
            variance = sigma**2 + np.float32(1)
            clean = model_output * (-sigma / np.sqrt(variance)) + x / variance
        return x + (x - clean) / sigma * (target - sigma)


@dataclass(frozen=True, eq=False)
class EulerAncestralSchedule(EulerSchedule):
    """Euler steps to a lower noise level, then fresh noise up to the next one."""

    @property
    def needs_noise(self) -> bool:
        return True

    def step(self, model_output: np.ndarray, i: int, x: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        if noise is None:
            raise ValueError("an Euler-ancestral step needs noise")
        before, after = self.sigmas[i], self.sigmas[i + 1]
        up = np.sqrt(after**2 * (before**2 - after**2) / before**2)
        down = np.sqrt(after**2 - up**2)
        return self._towards(down, model_output, i, x) + noise * up


@dataclass(frozen=True, eq=False)
class DdimSchedule(Schedule):
    """DDIM with eta 0. `alphas` [n] and `next_alphas` [n]: cumulative alpha at each step and after it, float32."""

    alphas: np.ndarray
    next_alphas: np.ndarray
    clip_sample: bool

    def scale_input(self, x: np.ndarray, i: int) -> np.ndarray:
        return x

    def step(self, model_output: np.ndarray, i: int, x: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        signal, spread = _mixing(self.alphas[i])
        if self.prediction == "epsilon":
            clean, error = (x - spread * model_output) / signal, model_output
        else:
            clean, error = signal * x - spread * model_output, signal * model_output + spread * x
        if self.clip_sample:
            clean = np.clip(clean, -1, 1)
        next_signal, next_spread = _mixing(self.next_alphas[i])
        return next_signal * clean + next_spread * error

    def add_noise(self, x: np.ndarray, noise: np.ndarray, i: int) -> np.ndarray:
        signal, spread = _mixing(self.alphas[i])
        return signal * x + spread * noise


def make_schedule(settings: SchedulerSettings, steps: int) -> Schedule:
    """The schedule of `settings` for `steps` denoising steps. Raises UsageError when `steps` does not fit."""
    if not 1 <= steps <= settings.train_steps:
        raise UsageError(f"{steps} denoising steps: this model's schedule allows 1 to {settings.train_steps}")
    alphas = _cumulative_alphas(settings)  # [train_steps] float32
    timesteps = _spread(settings, steps)  # [n] float64
    if settings.kind == "ddim":
        return _ddim(settings, alphas, timesteps)

    all_sigmas = np.sqrt((1 - alphas) / alphas)  # [train_steps] float32
    sigmas = np.interp(timesteps, np.arange(settings.train_steps), all_sigmas)  # [n] float64
    if settings.karras and settings.kind == "euler":
        if steps < 2:
            raise UsageError("1 denoising step: a Karras schedule needs at least 2")
        sigmas = _karras(settings, sigmas)
        timesteps = _timesteps_of(sigmas, all_sigmas)
    sigmas = np.append(sigmas, 0).astype(np.float32)  # [n + 1]
    if settings.kind == "euler" and settings.continuous_timesteps and settings.prediction == "v_prediction":
        timesteps = np.float32(0.25) * np.log(sigmas[:-1])
    top = sigmas.max()
    init = np.sqrt(top**2 + np.float32(1)) if settings.spacing == "leading" else top
    schedule_type = EulerSchedule if settings.kind == "euler" else EulerAncestralSchedule
    return schedule_type(_frozen(timesteps), init, settings.prediction, _frozen(sigmas))


def _ddim(settings: SchedulerSettings, alphas: np.ndarray, timesteps: np.ndarray) -> DdimSchedule:
    now = np.round(timesteps).astype(np.int64)
    if now.max() >= settings.train_steps:
        raise UsageError(
            f"{len(now)} denoising steps: timestep {now.max()} is past the last training step "
            f"{settings.train_steps - 1}; use fewer steps"
        )
    later = now - settings.train_steps // len(now)
    final = np.float32(1) if settings.set_alpha_to_one else alphas[0]
    next_alphas = np.where(later >= 0, alphas[np.maximum(later, 0)], final)
    return DdimSchedule(
        _frozen(now),
        np.float32(1),
        settings.prediction,
        _frozen(alphas[now]),
        _frozen(next_alphas),
        settings.clip_sample,
    )


def _mixing(alpha: np.float32) -> tuple[np.float32, np.float32]:
    """Factors of the clean latents and of the noise at cumulative alpha `alpha`."""
    return np.sqrt(alpha), np.sqrt(np.float32(1) - alpha)


def _cumulative_alphas(settings: SchedulerSettings) -> np.ndarray:
    """Products of 1 - beta over the scaled-linear betas: [train_steps] float32."""
    betas = np.linspace(settings.beta_start**0.5, settings.beta_end**0.5, settings.train_steps).astype(np.float32) ** 2
    return np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)


def _spread(settings: SchedulerSettings, steps: int) -> np.ndarray:
    """Training timesteps to visit, falling: [steps] float64, whole numbers except with `linspace`."""
    last = settings.train_steps
    if settings.spacing == "linspace":
        return np.linspace(0, last - 1, steps, dtype=np.float32)[::-1].astype(np.float64)
    if settings.spacing == "leading":
        return np.arange(steps)[::-1] * float(last // steps) + settings.steps_offset
    # Rounding of the float stride can yield one value too many; the surplus is at the end.
    return np.arange(last, 0, -last / steps)[:steps].round() - 1


def _karras(settings: SchedulerSettings, sigmas: np.ndarray) -> np.ndarray:
    """Noise levels evenly spread in sigma ** (1 / rho), falling: [n] float64."""
    low = sigmas[-1] if settings.sigma_min is None else settings.sigma_min
    high = sigmas[0] if settings.sigma_max is None else settings.sigma_max
    ends = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
    return np.linspace(*ends, len(sigmas)) ** KARRAS_RHO


def _timesteps_of(sigmas: np.ndarray, all_sigmas: np.ndarray) -> np.ndarray:
    """Fractional training timesteps with noise levels `sigmas`, interpolated in log sigma: [n] float64."""
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(all_sigmas), np.arange(len(all_sigmas)))


def _frozen(values: np.ndarray) -> np.ndarray:
    array = np.array(values, dtype=np.float32)
    array.flags.writeable = False
    return array
