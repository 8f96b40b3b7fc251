"""Schedules against diffusers' schedulers and the golden runs of the reference."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from golden import assert_close, load

from runtime.errors import UsageError
from runtime.schedulers import Schedule, ScheduleOptions, make_schedule
from runtime.settings import KEYFRAME_SCHEDULER, VIDEO_SCHEDULER, SchedulerSettings
from videolavit.reference.schedulers import build_scheduler

SPACINGS: tuple[Any, ...] = ("leading", "trailing", "linspace")
PREDICTIONS: tuple[Any, ...] = ("epsilon", "v_prediction")
KINDS: tuple[Any, ...] = ("euler", "euler-ancestral", "ddim")


def diffusers_scheduler(settings: SchedulerSettings) -> Any:
    common: dict[str, Any] = {
        "num_train_timesteps": settings.train_steps,
        "beta_start": settings.beta_start,
        "beta_end": settings.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": settings.prediction,
        "timestep_spacing": settings.spacing,
        "steps_offset": settings.steps_offset,
    }
    if settings.kind == "ddim":
        return diffusers.DDIMScheduler(
            **common, set_alpha_to_one=settings.set_alpha_to_one, clip_sample=settings.clip_sample
        )
    if settings.kind == "euler-ancestral":
        return diffusers.EulerAncestralDiscreteScheduler(**common)
    return diffusers.EulerDiscreteScheduler(
        **common,
        use_karras_sigmas=settings.karras,
        timestep_type="continuous" if settings.continuous_timesteps else "discrete",
        sigma_min=settings.sigma_min,
        sigma_max=settings.sigma_max,
    )


def settings_grid() -> list[SchedulerSettings]:
    grid = [VIDEO_SCHEDULER, KEYFRAME_SCHEDULER]
    for spacing in SPACINGS:
        for prediction in PREDICTIONS:
            for kind in KINDS:
                grid.append(SchedulerSettings(kind=kind, prediction=prediction, spacing=spacing))
            grid.append(SchedulerSettings(kind="euler", prediction=prediction, spacing=spacing, karras=True))
            grid.append(
                SchedulerSettings(
                    kind="ddim",
                    prediction=prediction,
                    spacing=spacing,
                    set_alpha_to_one=True,
                    clip_sample=True,
                    steps_offset=0,
                    beta_end=0.02,
                )
            )
    return grid


@pytest.mark.parametrize("steps", [2, 3, 7, 25, 50])
@pytest.mark.parametrize("settings", settings_grid(), ids=lambda s: f"{s.kind}-{s.prediction}-{s.spacing}-{s.karras}")
def test_loop_equals_diffusers(settings: SchedulerSettings, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = make_schedule(settings, steps)
    theirs = diffusers_scheduler(settings)
    theirs.set_timesteps(steps)
    times = theirs.timesteps.numpy()[:steps]  # diffusers' trailing spacing can yield one timestep too many
    assert schedule.timesteps.shape == (steps,)
    np.testing.assert_allclose(schedule.timesteps, times, rtol=1e-5, atol=1e-4)
    assert schedule.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=2e-6)

    rng = np.random.default_rng(steps)
    x = rng.standard_normal((1, 4, 5, 6), dtype=np.float32) * schedule.init_noise_sigma
    y = torch.from_numpy(x)
    for i in range(steps):
        scaled = theirs.scale_model_input(y, theirs.timesteps[i]).numpy()
        np.testing.assert_allclose(schedule.scale_input(x, i), scaled, rtol=1e-5, atol=1e-5 * np.abs(scaled).max())
        output = np.tanh(scaled) + rng.standard_normal(x.shape, dtype=np.float32)
        noise = rng.standard_normal(x.shape, dtype=np.float32)
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor",
            lambda *_, value=noise, **__: torch.from_numpy(value),
        )
        y = theirs.step(torch.from_numpy(output), theirs.timesteps[i], y).prev_sample
        x = schedule.step(output, i, x, noise if schedule.needs_noise else None)
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, y.numpy(), rtol=1e-5, atol=2e-6 * max(1.0, float(np.abs(x).max())))


@pytest.mark.parametrize("settings", settings_grid(), ids=lambda s: f"{s.kind}-{s.prediction}-{s.spacing}-{s.karras}")
def test_add_noise_equals_diffusers(settings: SchedulerSettings) -> None:
    steps = 10
    theirs = diffusers_scheduler(settings)
    theirs.set_timesteps(steps)
    schedule = make_schedule(settings, steps)
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 1, 4, 3, 3), dtype=np.float32)
    for i in range(steps):
        expected = theirs.add_noise(torch.from_numpy(x), torch.from_numpy(noise), theirs.timesteps[i : i + 1]).numpy()
        assert_close(schedule.add_noise(x, noise, i), expected, 2e-6 * float(np.abs(expected).max()))


@pytest.mark.parametrize("name", ["h_detokenizer_raw_motion", "h_detokenizer_from_tokens"])
def test_video_schedule_matches_golden(name: str) -> None:
    golden = load(name).outputs
    schedule = make_schedule(VIDEO_SCHEDULER, 4)
    np.testing.assert_allclose(schedule.sigmas, golden["sigmas"], rtol=1e-6)  # type: ignore[attr-defined]
    np.testing.assert_allclose(schedule.timesteps, golden["timesteps"], rtol=1e-6)
    np.testing.assert_allclose(schedule.init_noise_sigma, golden["init_noise_sigma"], rtol=1e-6)


def test_keyframe_schedules_match_golden() -> None:
    golden = load("i_keyframe").outputs
    ancestral = make_schedule(KEYFRAME_SCHEDULER, 4)
    np.testing.assert_array_equal(ancestral.timesteps, golden["ea_first/all_timesteps"])
    np.testing.assert_allclose(ancestral.sigmas, golden["ea_first/sigmas"], rtol=1e-6)  # type: ignore[attr-defined]
    # The reference reads the level before the steps are set: only its second call starts from the schedule's own.
    np.testing.assert_allclose(ancestral.init_noise_sigma, golden["ea_second/init_noise_sigma_used"], rtol=1e-6)
    assert abs(ancestral.init_noise_sigma - golden["ea_first/init_noise_sigma_used"]) > 1
    np.testing.assert_allclose(ancestral.sigmas[2], golden["reinject_ea/sigma_at_level"], rtol=1e-6)  # type: ignore[attr-defined]
    ddim = make_schedule(SchedulerSettings(kind="ddim"), 4)
    np.testing.assert_array_equal(ddim.timesteps, golden["ddim/all_timesteps"])
    assert ddim.init_noise_sigma == golden["ddim/init_noise_sigma_used"]


@pytest.mark.parametrize("steps", [1, 6, 7, 12, 49, 333, 999])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_number_of_timesteps(spacing: Any, steps: int) -> None:
    for kind in ("euler", "ddim"):
        schedule = make_schedule(SchedulerSettings(kind=kind, spacing=spacing), steps)
        assert schedule.timesteps.shape == (steps,)
        assert np.all(np.diff(schedule.timesteps) < 0) and np.all(schedule.timesteps >= 0)


def test_refuses_impossible_step_counts() -> None:
    with pytest.raises(UsageError, match="0 denoising steps"):
        make_schedule(KEYFRAME_SCHEDULER, 0)
    with pytest.raises(UsageError, match="1001"):
        make_schedule(KEYFRAME_SCHEDULER, 1001)
    with pytest.raises(UsageError, match="at least 2"):
        make_schedule(VIDEO_SCHEDULER, 1)
    with pytest.raises(UsageError, match="1000 denoising steps"):
        make_schedule(SchedulerSettings(kind="ddim"), 1000)
    with pytest.raises(ValueError, match="noise"):
        make_schedule(KEYFRAME_SCHEDULER, 4).step(np.zeros(1, np.float32), 0, np.zeros(1, np.float32))


def test_schedule_cannot_be_changed() -> None:
    schedule = make_schedule(VIDEO_SCHEDULER, 4)
    with pytest.raises(AttributeError):
        schedule.timesteps = np.zeros(4)  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        schedule.timesteps[0] = 0


# --- second-order samplers, spacings of levels, options ---------------------------------------------------------


VIDEO_LIKE = (VIDEO_SCHEDULER, SchedulerSettings(kind="ddim", prediction="v_prediction", spacing="trailing"))


def native(settings: SchedulerSettings, steps: int, sampler: str, spacing: str) -> Any:
    """diffusers' own scheduler of that kind, placing its steps by itself."""
    common: dict[str, Any] = {
        "beta_start": settings.beta_start,
        "beta_end": settings.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": settings.prediction,
        "steps_offset": settings.steps_offset,
        "timestep_spacing": spacing if spacing in SPACINGS else settings.spacing,
        "use_karras_sigmas": spacing == "karras",
        "use_exponential_sigmas": spacing == "exponential",
    }
    kind = diffusers.HeunDiscreteScheduler if sampler == "heun" else diffusers.DPMSolverMultistepScheduler
    scheduler = kind(**common)
    scheduler.set_timesteps(steps)
    return scheduler


def follow(ours: Schedule, theirs: Any, *, unit_variance: bool) -> None:
    """Both loops on the same made-up predictions. `unit_variance`: theirs keeps the variance of latents at 1."""
    rng = np.random.default_rng(len(ours.timesteps))
    x = rng.standard_normal((1, 4, 5, 6), dtype=np.float32) * ours.init_noise_sigma
    y = torch.from_numpy(x / np.sqrt(ours.levels[0] ** 2 + 1) if unit_variance else x)
    past: list[np.ndarray] = []
    for i in range(len(ours.timesteps)):
        scaled = theirs.scale_model_input(y, theirs.timesteps[i]).numpy()
        np.testing.assert_allclose(ours.scale_input(x, i), scaled, rtol=1e-4, atol=2e-5 * float(np.abs(scaled).max()))
        output = np.tanh(scaled) + rng.standard_normal(x.shape, dtype=np.float32)
        y = theirs.step(torch.from_numpy(output), theirs.timesteps[i], y).prev_sample
        x = ours.step(output, i, x, past=past)
        assert x.dtype == np.float32
    np.testing.assert_allclose(x, y.numpy(), rtol=1e-4, atol=1e-4 * float(np.abs(x).max()))


@pytest.mark.parametrize("steps", [2, 3, 10, 25])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", [*SPACINGS, "karras"])
def test_heun_equals_diffusers(spacing: Any, prediction: Any, steps: int) -> None:
    settings = SchedulerSettings(kind="euler", prediction=prediction)
    theirs = native(settings, steps, "heun", spacing)
    # diffusers takes the ends of Karras levels from the steps, we from training
    ends = (float(theirs.sigmas[-2]), float(theirs.sigmas[0])) if spacing == "karras" else None
    ours = make_schedule(settings, steps, ScheduleOptions(sampler="heun", spacing=spacing, sigmas=ends))
    calls = 2 * steps - 1
    assert ours.timesteps.shape == (calls,)
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps[:calls].numpy(), atol=1e-3)
    np.testing.assert_allclose(ours.levels, theirs.sigmas[:calls].numpy(), rtol=1e-5)
    assert ours.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-5)
    follow(ours, theirs, unit_variance=False)


@pytest.mark.parametrize("steps", [2, 3, 10, 25])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["trailing", "karras", "exponential"])
def test_dpm_solver_equals_diffusers(spacing: Any, prediction: Any, steps: int) -> None:
    settings = SchedulerSettings(kind="ddim", prediction=prediction, beta_end=0.02)
    ours = make_schedule(settings, steps, ScheduleOptions(sampler="dpmpp-2m", spacing=spacing))
    theirs = native(settings, steps, "dpmpp-2m", spacing)
    np.testing.assert_allclose(ours.levels, theirs.sigmas[:steps].numpy(), rtol=2e-5)
    # It rounds the timesteps of Karras levels, and gets along without them in its arithmetic.
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps[:steps].numpy(), atol=1.001)
    follow(ours, theirs, unit_variance=True)


@pytest.mark.parametrize("steps", [2, 3, 10, 25])
def test_dpm_solver_of_continuous_levels_equals_diffusers(steps: int) -> None:
    ours = make_schedule(VIDEO_SCHEDULER, steps, ScheduleOptions(sampler="dpmpp-2m"))
    theirs = diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=0.002, sigma_max=700.0, sigma_data=1.0, prediction_type="v_prediction"
    )
    theirs.set_timesteps(steps)
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=1e-5)
    assert ours.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-5)
    follow(ours, theirs, unit_variance=False)


@pytest.mark.parametrize("spacing", ["exponential", "karras"])
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpmpp-2m", 2)])
def test_order_of_convergence_on_a_known_solution(sampler: str, order: int, spacing: str) -> None:
    """Of data with standard deviation s, latents at level sigma are their start times sqrt(s² + sigma²), scaled."""
    s, low, high = 0.5, 0.05, 20.0

    def error(steps: int) -> float:
        options = ScheduleOptions(sampler=sampler, spacing=spacing, sigmas=(low, high))
        schedule = make_schedule(SchedulerSettings(kind="euler"), steps, options)
        x, past = np.array([1.0], np.float32) * np.float32(np.sqrt(s**2 + high**2)), []  # type: ignore[var-annotated]
        for i in range(schedule.first_call(steps - 1)):  # up to the lowest level; the step to 0 is of first order
            level = schedule.levels[i]
            x = schedule.step(x * level / (s**2 + level**2), i, x, past=past)  # the best epsilon there is
        return abs(float(x[0]) / np.sqrt(s**2 + low**2) - 1)

    errors = [error(steps) for steps in (21, 41, 81)]
    found = [np.log2(a / b) for a, b in pairwise(errors)]
    assert all(abs(one - order) < 0.45 for one in found), (errors, found)


def mixture(x: np.ndarray, level: float) -> np.ndarray:
    """The best clean latents [n] for noisy ones [n] of data around -1 and 0.4."""
    means, spread = np.array([-1.0, 0.4]), 0.15**2
    shares = np.array([0.4, 0.6]) * np.exp(-((x[:, None] - means) ** 2) / (2 * (spread + level**2)))
    shares /= shares.sum(axis=1, keepdims=True)
    return (shares * (means + spread / (spread + level**2) * (x[:, None] - means))).sum(axis=1)


@pytest.mark.parametrize("settings", VIDEO_LIKE, ids=["continuous", "discrete"])
def test_half_the_steps_come_as_near(settings: SchedulerSettings) -> None:
    """Where the best prediction is known, 12 steps of second order on published levels beat 25 of the model's own."""
    start = np.random.default_rng(0).standard_normal(500)

    def denoised(steps: int, **options: Any) -> np.ndarray:
        schedule = make_schedule(settings, steps, ScheduleOptions(**options))
        x, past = (start * schedule.levels[0]).astype(np.float32), []  # type: ignore[var-annotated]
        for i in range(len(schedule.timesteps)):
            level = float(schedule.levels[i])
            clean = mixture(x.astype(np.float64), level)
            v = (x / (level**2 + 1) - clean) / (level / np.sqrt(level**2 + 1))
            x = schedule.step(v.astype(np.float32), i, x, past=past)
        return x

    exact = denoised(400, sampler="heun")

    def error(steps: int, **options: Any) -> float:
        return float(np.sqrt(np.mean((denoised(steps, **options) - exact) ** 2)))

    own = error(25, sampler="euler")
    assert error(12, sampler="dpmpp-2m", spacing="ays") < own
    assert error(25, sampler="dpmpp-2m", spacing="ays") < own / 3
    assert error(25, sampler="heun", spacing="ays") < own / 3


def test_published_levels_of_ten_steps() -> None:
    published = diffusers.schedulers.AysSchedules
    video = make_schedule(VIDEO_SCHEDULER, 10, ScheduleOptions(spacing="ays"))
    np.testing.assert_allclose(video.levels, published["StableDiffusionVideoSigmas"][:10], rtol=1e-6)
    keyframe = make_schedule(SchedulerSettings(kind="ddim"), 10, ScheduleOptions(sampler="euler", spacing="ays"))
    np.testing.assert_allclose(keyframe.levels, published["StableDiffusionXLSigmas"][:10], rtol=3e-3)
    np.testing.assert_allclose(keyframe.timesteps, published["StableDiffusionXLTimesteps"], atol=2)
    wide = make_schedule(VIDEO_SCHEDULER, 20, ScheduleOptions(spacing="ays", sigmas=(0.02, 80.0)))
    assert wide.levels[0] == pytest.approx(80.0) and wide.levels[-1] > 0.02
    assert np.all(np.diff(wide.levels) < 0)
    twenty = make_schedule(VIDEO_SCHEDULER, 20, ScheduleOptions(spacing="ays"))
    np.testing.assert_allclose(twenty.levels[::2], video.levels, rtol=1e-5)


def test_levels_of_ddim_are_those_of_its_timesteps() -> None:
    ddim = make_schedule(SchedulerSettings(kind="ddim"), 8)
    euler = make_schedule(SchedulerSettings(kind="ddim"), 8, ScheduleOptions(sampler="euler"))
    np.testing.assert_allclose(ddim.levels, euler.levels, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        (VIDEO_SCHEDULER, {"sampler": "ddim"}, "continuous"),
        (VIDEO_SCHEDULER, {"spacing": "trailing"}, "continuous"),
        (VIDEO_SCHEDULER, {"sampler": "rk4"}, "choose from euler"),
        (VIDEO_SCHEDULER, {"spacing": "even"}, "choose from leading"),
        (KEYFRAME_SCHEDULER, {"spacing": "karras"}, "not for sampler euler-ancestral"),
        (KEYFRAME_SCHEDULER, {"sampler": "ddim", "spacing": "ays"}, "not for sampler ddim"),
        (KEYFRAME_SCHEDULER, {"sampler": "heun", "sigmas": (0.1, 10.0)}, "no effect on spacing leading"),
    ],
)
def test_what_does_not_fit_is_refused(settings: SchedulerSettings, options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_schedule(settings, 5, ScheduleOptions(**options))
    with pytest.raises(UsageError, match=words):
        build_scheduler(settings, 5, torch.device("cpu"), ScheduleOptions(**options))


@pytest.mark.parametrize("sampler", ["heun", "dpmpp-2m"])
def test_steps_that_look_back_ask_for_the_past(sampler: str) -> None:
    schedule = make_schedule(VIDEO_SCHEDULER, 4, ScheduleOptions(sampler=sampler))
    with pytest.raises(ValueError, match="call before"):
        schedule.step(np.zeros(1, np.float32), 0, np.zeros(1, np.float32))
