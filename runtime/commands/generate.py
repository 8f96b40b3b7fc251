"""`videolavit generate`: a video from text, a picture, or both.

Contract: one output file per seed, written beside its name and renamed; a clip's frames go to the file while the next
clip is made. With `--batch` every line of a JSONL file is a job whose keys are this command's options.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

from runtime.commands.options import (
    Size,
    candidates_options,
    choose_seed,
    keyframe_schedule_options,
    model_options,
    open_pipeline,
    output_options,
    sampling_options,
    seed_option,
    video_schedule_options,
)
from runtime.commands.report import Report
from runtime.errors import UsageError
from runtime.files import check_output
from runtime.requests import ClipResult, Resolved, VideoRequest, resolve

SUFFIXES = (".mp4", ".gif")


class BatchLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One line of a `--batch` file. What a line leaves out is taken from the command line."""

    out: str
    prompt: str | None = None
    image: str | None = None
    seed: int | None = None
    clips: int | None = None


@dataclass(frozen=True)
class Job:
    """One file to make."""

    request: VideoRequest
    image_path: Path | None
    output: Path
    seed: int


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out.mp4"),
    show_default=True,
    help="Where the video goes (.mp4 or .gif).",
)
@click.option("--image", type=click.Path(path_type=Path), help="Start from this picture.")
@click.option("--clips", type=int, default=1, show_default=True, help="Clips of 24 frames, each continuing the last.")
@click.option("--size", type=Size(), help="Video size. [default: the model's]")
@click.option("--keyframe-size", type=Size(), help="Size at which key frames are made. [default: the model's]")
@seed_option
@candidates_options
@click.option(
    "--kept-pictures",
    type=int,
    help="Write motion after so many of the candidates' pictures alone, the best; 0: after all. [default: the model's]",
)
@click.option("--keyframe-steps", type=int, help="Denoising steps of a key frame.")
@click.option("--video-steps", type=int, help="Denoising steps of a clip.")
@click.option("--text-guidance", type=float, help="Guidance while image tokens are written.")
@click.option("--motion-guidance", type=float, help="Guidance while motion tokens are written.")
@click.option("--image-guidance", type=float, help="Guidance while a key frame is denoised.")
@click.option("--fps", type=click.IntRange(1, 120), help="Frames per second of the file. [default: the model's]")
@click.option("--batch", type=click.Path(path_type=Path), help="JSONL file: one job a line.")
@click.option(
    "--count",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="Make this many, with consecutive seeds, as NAME-1, NAME-2, ...",
)
@keyframe_schedule_options
@video_schedule_options
@sampling_options
@output_options
@model_options
def generate(
    prompt: str | None,
    output: Path,
    image: Path | None,
    clips: int,
    seed: int | None,
    fps: int | None,
    batch: Path | None,
    count: int,
    force: bool,
    as_json: bool,
    bundle: str | None,
    memory_budget: int | None,
    threads: int | None,
    provider: str,
    **settings: Any,
) -> None:
    """Make a video from PROMPT, a picture, or both."""
    if batch is not None and (prompt is not None or image is not None or count != 1):
        raise UsageError("--batch: PROMPT, --image and --count belong in the batch file, one job a line")
    with Report(as_json) as report:
        base = VideoRequest(prompt=prompt, clips=clips, **settings)
        if batch is None:
            jobs = _counted(base, image, output, choose_seed(seed), count)
        else:
            jobs = _read_batch(batch, base, seed)
        for job in jobs:
            check_output(job.output, SUFFIXES, force)
        if batch is None:
            # Pictures and settings are checked before a model is opened, so that a mistake answers at once.
            jobs = [_with_image(job) for job in jobs]
        pipeline = open_pipeline(report, bundle=bundle, memory_budget=memory_budget, threads=threads, provider=provider)
        with pipeline:
            manifest = pipeline.manifest

            def ready(job: Job) -> Job:
                job = _with_image(job)
                return replace(job, request=resolve(job.request, manifest.geometry, manifest.defaults))

            for job in jobs:
                ready(job)  # a mistake in the last job shows before the first is made; pictures are not kept
            for job in jobs:
                _run(report, pipeline, ready(job), fps or manifest.geometry.fps, force)


def _counted(base: VideoRequest, image: Path | None, output: Path, seed: int, count: int) -> list[Job]:
    if count == 1:
        return [Job(base, image, output, seed)]
    return [
        Job(base, image, output.with_name(f"{output.stem}-{n}{output.suffix}"), seed + n - 1)
        for n in range(1, count + 1)
    ]


def _with_image(job: Job) -> Job:
    if job.image_path is None or job.request.image is not None:
        return job
    from runtime.images import load_image

    return replace(job, request=replace(job.request, image=load_image(job.image_path)))


def _read_batch(path: Path, base: VideoRequest, seed: int | None) -> list[Job]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"--batch {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--batch {path}: is not UTF-8 text") from error
    jobs: list[Job] = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = msgspec.json.decode(text, type=BatchLine)
        except msgspec.DecodeError as error:
            raise UsageError(f"--batch {path} line {number}: {error}") from error
        if line.image is not None and not Path(line.image).is_file():
            raise UsageError(f"--batch {path} line {number}: image {line.image} does not exist")
        request = replace(base, prompt=line.prompt, clips=line.clips or base.clips)
        job_seed = line.seed if line.seed is not None else choose_seed(seed)
        jobs.append(Job(request, Path(line.image) if line.image else None, Path(line.out), job_seed))
    if not jobs:
        raise UsageError(
            f'--batch {path}: holds no job; write one JSON object a line, with at least "out" and "prompt"'
        )
    return jobs


def _run(report: Report, pipeline: Any, job: Job, fps: int, force: bool) -> None:
    from runtime import recipe
    from runtime.noise import Noise
    from runtime.writer import write_clips

    before = pipeline.seconds
    report.plan(pipeline.memory_plan(job.request))
    document = recipe.make_recipe(
        "generate", pipeline.bundle, job.request, job.seed, {"image": job.image_path} if job.image_path else {}
    )
    clips = pipeline.generate_video(job.request, Noise(job.seed))
    write_clips(job.output, _frames(clips), fps, metadata={recipe.KEY: recipe.encode(document)}, force=force)
    seconds = {name: value - before.get(name, 0.0) for name, value in pipeline.seconds.items()}
    reached = pipeline.reached
    cost = recipe.costs(pipeline, seconds)
    sidecar = recipe.write_sidecar(job.output, document, cost)
    fullest = max(pipeline.stage_peaks, key=lambda stage: pipeline.stage_peaks[stage])
    settings: Resolved = job.request
    width, height = settings.size
    frames = pipeline.manifest.geometry.frames + (job.request.clips - 1) * (pipeline.manifest.geometry.frames - 1)
    report.result(
        f"{job.output}: {frames} frames, {width}x{height}, {fps} fps, seed {job.seed}, "
        f"{sum(seconds.values()):.1f} s (first frame after {reached['first frame']:.1f} s), "
        f"peak memory {pipeline.peak_rss >> 20} MiB in stage {fullest} (recipe: {sidecar})",
        output=str(job.output),
        sidecar=str(sidecar),
        frames=frames,
        width=width,
        height=height,
        fps=fps,
        seed=job.seed,
        **cost,
        first_token_seconds=reached["first token"],
        first_frame_seconds=reached["first frame"],
    )


def _frames(clips: Iterator[ClipResult]) -> Iterator[np.ndarray]:
    """Frames [T, H, W, 3] of the film, clip by clip.

    A later clip's first frame repeats the one before it and is dropped (§12.4).
    """
    return (clip.frames if clip.index == 0 else clip.frames[1:] for clip in clips)
