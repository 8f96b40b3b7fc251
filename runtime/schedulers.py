"""Samplers of the denoising loops, in numpy.

Contract: `make_schedule(settings, steps, options)` returns an immutable `Schedule`, a list of network calls: what the
network reads and is told at call i, and what its answer makes of the latents. Most samplers call it once a step. What a
call leaves for the next one is kept in a list that belongs to the loop (`past`), so a schedule serves any number of
loops. All arithmetic on latents is float32 (reference semantics §8.2, §9.3). `init_noise_sigma` belongs to the schedule
that is run: the reference reads it before it sets the number of steps, so its first Euler-ancestral picture starts from
another noise level (quirk 5, fixed here).

Latents are clean ones plus sigma times normal noise, except with DDIM, which keeps their variance at 1.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import msgspec
import numpy as np

from runtime import noise_levels
from runtime.errors import UsageError
from runtime.schedule_names import LEVEL_SPACINGS, OF_TIMESTEPS, SAMPLERS, TIMESTEP_SPACINGS
from runtime.settings import SchedulerSettings

Past = list[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """What a request changes of the schedule a model comes with; None leaves it as it is.

    Attributes:
        sampler: one of SAMPLERS in `runtime.schedule_names`.
        spacing: of the steps, one of its TIMESTEP_SPACINGS and LEVEL_SPACINGS.
        sigmas: lowest and highest noise level of a spacing of levels.
    """

    sampler: str | None = None
    spacing: str | None = None
    sigmas: tuple[float, float] | None = None


AS_IT_IS = ScheduleOptions()


@dataclass(frozen=True, eq=False)
class Schedule(abc.ABC):
    """A sampler for one number of steps, as n network calls.

    Attributes:
        timesteps: [n] float32, what the network is told at each call.
        init_noise_sigma: standard deviation of the latents that call 0 starts from.
        prediction: what the network predicts.
    """

    timesteps: np.ndarray
    init_noise_sigma: np.float32
    prediction: str

    @property
    def needs_noise(self) -> bool:
        """Whether `step` wants fresh standard normal noise."""
        return False

    @property
    @abc.abstractmethod
    def levels(self) -> np.ndarray:
        """Noise level sigma at each call: [n] float32."""

    def first_call(self, step: int) -> int:
        """The call that begins step `step`."""
        return step

    @abc.abstractmethod
    def scale_input(self, x: np.ndarray, i: int) -> np.ndarray:
        """Latents `x` as the network reads them at call `i`; same shape."""

    @abc.abstractmethod
    def step(
        self, model_output: np.ndarray, i: int, x: np.ndarray, noise: np.ndarray | None = None, past: Past | None = None
    ) -> np.ndarray:
        """Latents after call `i` from latents `x` before it. All arrays have the shape of `x`.

        `past` is one list for a whole loop, empty at its beginning, in which calls leave what later ones need.
        """

    @abc.abstractmethod
    def add_noise(self, x: np.ndarray, noise: np.ndarray, i: int) -> np.ndarray:
        """Clean latents `x` with standard normal `noise` as call `i` expects to find them; same shape."""


@dataclass(frozen=True, eq=False)
class EulerSchedule(Schedule):
    """Euler steps on the probability-flow ODE. `sigmas` [steps + 1] float32, ending in 0."""

    sigmas: np.ndarray

    @property
    def levels(self) -> np.ndarray:
        return self.sigmas[:-1]

    def scale_input(self, x: np.ndarray, i: int) -> np.ndarray:
        return x / np.sqrt(self.levels[i] ** 2 + np.float32(1))

    def step(
        self, model_output: np.ndarray, i: int, x: np.ndarray, noise: np.ndarray | None = None, past: Past | None = None
    ) -> np.ndarray:
        return self._towards(self.sigmas[i + 1], model_output, i, x)

    def add_noise(self, x: np.ndarray, noise: np.ndarray, i: int) -> np.ndarray:
        return x + noise * self.levels[i]

    def clean(self, model_output: np.ndarray, i: int, x: np.ndarray) -> np.ndarray:
        """The clean latents that the network's answer to call `i` stands for."""
        sigma = self.levels[i]
        if self.prediction == "epsilon":
            return x - sigma * model_output
        variance = sigma**2 + np.float32(1)
        return model_output * (-sigma / np.sqrt(variance)) + x / variance

    def _towards(self, target: np.float32, model_output: np.ndarray, i: int, x: np.ndarray) -> np.ndarray:
        """Straight line from the noise level of call `i` to noise level `target`."""
        sigma = self.levels[i]
        return x + (x - self.clean(model_output, i, x)) / sigma * (target - sigma)


@dataclass(frozen=True, eq=False)
class EulerAncestralSchedule(EulerSchedule):
    """Euler steps to a lower noise level, then fresh noise up to the next one."""

    @property
    def needs_noise(self) -> bool:
        return True

    def step(
        self, model_output: np.ndarray, i: int, x: np.ndarray, noise: np.ndarray | None = None, past: Past | None = None
    ) -> np.ndarray:
        if noise is None:
            raise ValueError("an Euler-ancestral step needs noise")
        before, after = self.sigmas[i], self.sigmas[i + 1]
        up = np.sqrt(after**2 * (before**2 - after**2) / before**2)
        down = np.sqrt(after**2 - up**2)
        return self._towards(down, model_output, i, x) + noise * up


@dataclass(frozen=True, eq=False)
class HeunSchedule(EulerSchedule):
    """Heun's method: an Euler step, then the same step again along the mean of the slopes at both its ends.

    Second order, at two calls a step; the last step, to 0, is an Euler step. Call 2k begins step k and call 2k + 1
    corrects it (arXiv 2206.00364, algorithm 1 without churn).
    """

    @property
    def levels(self) -> np.ndarray:
        return self.sigmas[(np.arange(len(self.timesteps)) + 1) // 2]

    def first_call(self, step: int) -> int:
        return 2 * step

    def step(
        self, model_output: np.ndarray, i: int, x: np.ndarray, noise: np.ndarray | None = None, past: Past | None = None
    ) -> np.ndarray:
        if past is None:
            raise ValueError("a Heun step needs what the call before left")
        slope = (x - self.clean(model_output, i, x)) / self.levels[i]
        step, corrects = divmod(i, 2)
        length = self.sigmas[step + 1] - self.sigmas[step]
        if not corrects:
            past[:] = [x, slope]
            return x + slope * length
        start, first = past
        past.clear()
        return start + (first + slope) / np.float32(2) * length


@dataclass(frozen=True, eq=False)
class DpmSolverSchedule(EulerSchedule):
    """DPM-Solver++(2M): second order at one call a step, from the clean latents of this call and the one before.

    The first step, and the last, to 0, are of first order (arXiv 2211.01095, algorithm 2).
    """

    def step(
        self, model_output: np.ndarray, i: int, x: np.ndarray, noise: np.ndarray | None = None, past: Past | None = None
    ) -> np.ndarray:
        if past is None:
            raise ValueError("a DPM-Solver++ step needs what the call before left")
        clean = self.clean(model_output, i, x)
        before, now, after = self.sigmas[max(i - 1, 0)], self.sigmas[i], self.sigmas[i + 1]
        ahead = clean
        if past and after > 0:
            ratio = np.log(now / after) / np.log(before / now) / np.float32(2)
            ahead = clean + ratio * (clean - past[0])
        past[:] = [clean]
        # With h = log(now / after): exp(-h) x + (1 - exp(-h)) ahead
        return x * (after / now) + ahead * (np.float32(1) - after / now)


@dataclass(frozen=True, eq=False)
class DdimSchedule(Schedule):
    """DDIM with eta 0. `alphas` [n] and `next_alphas` [n]: cumulative alpha at each step and after it, float32."""

    alphas: np.ndarray
    next_alphas: np.ndarray
    clip_sample: bool

    @property
    def levels(self) -> np.ndarray:
        return np.sqrt((1 - self.alphas) / self.alphas)

    def scale_input(self, x: np.ndarray, i: int) -> np.ndarray:
        return x

    def step(
        self, model_output: np.ndarray, i: int, x: np.ndarray, noise: np.ndarray | None = None, past: Past | None = None
    ) -> np.ndarray:
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


_SCHEDULES: dict[str, type[EulerSchedule]] = {
    "euler": EulerSchedule,
    "euler-ancestral": EulerAncestralSchedule,
    "heun": HeunSchedule,
    "dpmpp-2m": DpmSolverSchedule,
}


def make_schedule(settings: SchedulerSettings, steps: int, options: ScheduleOptions = AS_IT_IS) -> Schedule:
    """The schedule of `settings`, as `options` change it, for `steps` denoising steps.

    Raises UsageError when `steps` does not fit, or parts of the schedule do not fit each other.
    """
    if not 1 <= steps <= settings.train_steps:
        raise UsageError(f"{steps} denoising steps: this model's schedule allows 1 to {settings.train_steps}")
    kind, spacing = options.sampler or settings.kind, chosen_spacing(settings, options)
    if options.spacing in TIMESTEP_SPACINGS:
        settings = msgspec.structs.replace(settings, spacing=options.spacing)
    alphas = noise_levels.cumulative_alphas(settings)  # [train_steps] float32
    timesteps = noise_levels.spread(settings, steps)  # [n] float64
    if kind == "ddim":
        return _ddim(settings, alphas, timesteps)

    all_sigmas = np.sqrt((1 - alphas) / alphas)  # [train_steps] float32
    sigmas = np.interp(timesteps, np.arange(settings.train_steps), all_sigmas)  # [n] float64
    if spacing in LEVEL_SPACINGS:
        if steps < 2:
            raise UsageError(f"1 denoising step: spacing {spacing} needs at least 2")
        # Where nothing gives an end, the model's own schedule ends with the steps, any other with training.
        ends = (sigmas[-1], sigmas[0]) if options.spacing is None else (all_sigmas[0], all_sigmas[-1])
        given = options.sigmas or (settings.sigma_min, settings.sigma_max)
        low, high = (end if level is None else level for level, end in zip(given, ends, strict=True))
        sigmas = noise_levels.between(spacing, high, low, steps, continuous=settings.continuous_timesteps)
        timesteps = noise_levels.timesteps_of(sigmas, all_sigmas)
    sigmas = np.append(sigmas, 0).astype(np.float32)  # [n + 1]
    if kind != "euler-ancestral" and settings.continuous_timesteps and settings.prediction == "v_prediction":
        timesteps = np.float32(0.25) * np.log(sigmas[:-1])
    if kind == "heun":
        timesteps = np.repeat(timesteps, 2)[1:]
    top = sigmas.max()
    init = np.sqrt(top**2 + np.float32(1)) if settings.spacing == "leading" or kind == "dpmpp-2m" else top
    return _SCHEDULES[kind](_frozen(timesteps), init, settings.prediction, _frozen(sigmas))


def chosen_spacing(settings: SchedulerSettings, options: ScheduleOptions) -> str:
    """How steps are spread: by `options`, or by the model's own `settings`. Raises UsageError for what does not fit."""
    kind = options.sampler or settings.kind
    if kind not in SAMPLERS:
        raise UsageError(f"sampler {kind!r}: not known; choose from {', '.join(SAMPLERS)}")
    own = "karras" if settings.karras and kind not in OF_TIMESTEPS else settings.spacing
    spacing = options.spacing or own
    if spacing not in (*TIMESTEP_SPACINGS, *LEVEL_SPACINGS):
        known = ", ".join((*TIMESTEP_SPACINGS, *LEVEL_SPACINGS))
        raise UsageError(f"spacing {spacing!r}: not known; choose from {known}")
    if spacing in LEVEL_SPACINGS and kind in OF_TIMESTEPS:
        others = ", ".join(name for name in SAMPLERS if name not in OF_TIMESTEPS)
        raise UsageError(f"spacing {spacing}: not for sampler {kind}; choose one of {others}")
    if settings.continuous_timesteps and (options.sampler, options.spacing) != (None, None):
        # Such a network is told the noise level itself, and was trained far outside the range of timesteps.
        if kind in OF_TIMESTEPS:
            others = ", ".join(name for name in SAMPLERS if name not in OF_TIMESTEPS)
            raise UsageError(f"sampler {kind}: not for a model of continuous noise levels; choose one of {others}")
        if spacing in TIMESTEP_SPACINGS:
            others = ", ".join(LEVEL_SPACINGS)
            raise UsageError(f"spacing {spacing}: not for a model of continuous noise levels; choose one of {others}")
    if options.sigmas is not None and spacing not in LEVEL_SPACINGS:
        raise UsageError(
            f"noise levels {options.sigmas[0]:g}-{options.sigmas[1]:g}: have no effect on spacing {spacing}; choose "
            f"one of {', '.join(LEVEL_SPACINGS)}"
        )
    return spacing


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


def _frozen(values: np.ndarray) -> np.ndarray:
    array = np.array(values, dtype=np.float32)
    array.flags.writeable = False
    return array
