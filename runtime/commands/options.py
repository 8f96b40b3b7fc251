"""Options that several commands share, and how their values become settings.

Contract: a value that is not allowed raises UsageError naming the flag; nothing here opens a model.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from runtime.amounts import parse_bytes
from runtime.errors import UsageError
from runtime.schedule_names import LEVEL_SPACINGS, OF_TIMESTEPS, SAMPLERS, TIMESTEP_SPACINGS, VIDEO_STARTS

if TYPE_CHECKING:
    from runtime.commands.report import Report
    from runtime.pipeline import Pipeline

F = TypeVar("F", bound=Callable[..., Any])


class Size(click.ParamType):
    """WIDTHxHEIGHT in pixels."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", str(value))
        if match is None:
            self.fail(f"{value!r} is not a size; write WIDTHxHEIGHT, for example 576x320", param, ctx)
        return int(match[1]), int(match[2])


class Bytes(click.ParamType):
    """A number of bytes, with K, M or G."""

    name = "BYTES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_bytes(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class Levels(click.ParamType):
    """LOW-HIGH: two noise levels."""

    name = "LOW-HIGH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        match = re.fullmatch(r"(\d*\.?\d+|\d+\.)-(\d*\.?\d+|\d+\.)", str(value))
        if match is None:
            self.fail(f"{value!r} is not a range; write LOW-HIGH, for example 0.3-5", param, ctx)
        return float(match[1]), float(match[2])


def keyframe_schedule_options(function: F) -> F:
    """--keyframe-sampler, --keyframe-spacing, --image-guidance-interval: how a key frame is denoised."""
    for option in (
        click.option(
            "--image-guidance-interval",
            type=Levels(),
            help="Noise levels at which a key frame is guided; at others half the work is saved. [default: all]",
        ),
        click.option(
            "--keyframe-spacing",
            type=click.Choice([*TIMESTEP_SPACINGS, *LEVEL_SPACINGS]),
            help="How a key frame's steps are spread. [default: the model's]",
        ),
        click.option(
            "--keyframe-sampler",
            type=click.Choice(SAMPLERS),
            help="How a key frame's steps are taken; dpmpp-2m needs fewest, heun runs the network twice a step. "
            "[default: the model's]",
        ),
    ):
        function = option(function)
    return function


def video_schedule_options(function: F) -> F:
    """--video-start, -sampler, -spacing, -sigmas and -guidance-interval: how a clip is denoised."""
    for option in (
        click.option(
            "--video-start",
            type=click.Choice(VIDEO_STARTS),
            help="What a clip is denoised from: noise alone, or the key frame moved along the motion vectors, under "
            "noise of the highest of --video-sigmas. [default: the model's]",
        ),
        click.option(
            "--video-guidance-interval",
            type=Levels(),
            help="Noise levels at which a clip is guided; at others half the work is saved. [default: all]",
        ),
        click.option(
            "--video-sigmas",
            type=Levels(),
            help="Lowest and highest noise level of a clip's steps. [default: the model's]",
        ),
        click.option(
            "--video-spacing",
            type=click.Choice(LEVEL_SPACINGS),
            help="How a clip's steps are spread; ays is made for few. [default: the model's]",
        ),
        click.option(
            "--video-sampler",
            type=click.Choice([name for name in SAMPLERS if name not in OF_TIMESTEPS]),
            help="How a clip's steps are taken; dpmpp-2m needs fewest, heun runs the network twice a step. "
            "[default: the model's]",
        ),
    ):
        function = option(function)
    return function


def model_options(function: F) -> F:
    """--bundle, --memory-budget, --threads, --provider: which model runs, and on what."""
    for option in (
        click.option(
            "--provider",
            type=click.Choice(["cpu", "cuda", "auto"]),
            default="cpu",
            show_default=True,
            help="Where ONNX Runtime computes; auto takes cuda where it works, else cpu, and says which.",
        ),
        click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads. [default: all cores]"),
        click.option("--memory-budget", type=Bytes(), help="Keep at most this much of the engines loaded, e.g. 8G."),
        click.option(
            "--bundle", envvar="VIDEOLAVIT_BUNDLE", help="Engine bundle: a folder or a name. [default: shapes]"
        ),
    ):
        function = option(function)
    return function


def output_options(function: F) -> F:
    """--force and --json."""
    function = click.option("--json", "as_json", is_flag=True, help="Events and result as JSON lines on stdout.")(
        function
    )
    return click.option("--force", is_flag=True, help="Replace the output if it exists.")(function)


def sampling_options(function: F) -> F:
    """--temperature, --top-k, --top-p, --greedy."""
    for option in (
        click.option("--greedy", is_flag=True, help="Always take the likeliest token."),
        click.option("--top-p", type=float, help="Sample from the smallest set with this probability."),
        click.option("--top-k", type=int, help="Sample from the k likeliest tokens; 0 is off."),
        click.option("--temperature", type=float, help="Sampling temperature."),
    ):
        function = option(function)
    return function


def candidates_options(function: F) -> F:
    """--candidates, --finalists."""
    for option in (
        click.option(
            "--finalists",
            type=int,
            help="Draw so many of them, read the pictures again and keep one of these. [default: the model's]",
        ),
        click.option(
            "--candidates",
            type=int,
            help="Write it so many times and keep the one that PROMPT is likeliest to be said of. "
            "[default: the model's]",
        ),
    ):
        function = option(function)
    return function


seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), help="Seed of all randomness. [default: random, printed]"
)


def choose_seed(seed: int | None) -> int:
    """The user's seed, or a fresh one small enough to type again."""
    return secrets.randbelow(2**31) if seed is None else seed


def open_pipeline(
    report: Report, *, bundle: str | None, memory_budget: int | None, threads: int | None, provider: str
) -> Pipeline:
    """Open the bundle; says so when its weights are untrained, and what `auto` has chosen."""
    from runtime.bundle import Bundle, find
    from runtime.pipeline import Pipeline

    opened = Bundle.open(find(bundle))
    if not opened.manifest.trained:
        report.note(
            f"bundle {opened.manifest.name!r} has random, untrained weights: it shows that everything runs, "
            "its pictures and words mean nothing"
        )
    if provider == "auto" and any(engine.backend == "onnx" for engine in opened.manifest.engines.values()):
        from runtime.backends.onnxruntime import cuda_problem

        problem = cuda_problem()
        provider = "cpu" if problem else "cuda"
        report.note(f"ONNX Runtime runs on {provider}" + (f" ({problem})" if problem else ""))
    return Pipeline(opened, memory_budget=memory_budget, threads=threads, provider=provider, observer=report.progress)
