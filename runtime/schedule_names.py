"""What the parts of a denoising schedule are called: samplers, spacings and starts.

Contract: names alone, so that a command can offer them before anything is imported. `runtime.schedulers` says what the
samplers do, `runtime.noise_levels` what the spacings are, `runtime.motion.compensation` what is moved for a start.
"""

from __future__ import annotations

from typing import Literal, get_args

SAMPLERS = ("euler", "heun", "dpmpp-2m", "euler-ancestral", "ddim")
OF_TIMESTEPS = ("euler-ancestral", "ddim")  # as the reference has them, these know training timesteps alone
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
LEVEL_SPACINGS = ("karras", "exponential", "ays")
VideoStart = Literal["noise", "motion"]  # what a clip is denoised from, see runtime.settings.TaskDefaults
VIDEO_STARTS: tuple[VideoStart, ...] = get_args(VideoStart)
