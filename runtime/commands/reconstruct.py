"""`videolavit reconstruct`: a video again from one key frame and the motion that followed it.

Contract: reads the source clip by clip, so memory does not grow with its length; `--compare` sets the source beside
the result and reports PSNR and SSIM against it, next to two baselines that use no motion.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from runtime.commands.options import (
    Size,
    choose_seed,
    model_options,
    open_pipeline,
    output_options,
    seed_option,
    video_schedule_options,
)
from runtime.commands.report import Report
from runtime.files import check_output
from runtime.metrics import psnr, ssim
from runtime.motion.sources import MotionClip
from runtime.requests import ReconstructionRequest, resolve

SUFFIXES = (".mp4", ".gif")


@dataclass
class Score:
    """Sums over the frames so far of PSNR (dB) and SSIM, for the result and for the repeated key frame."""

    frames: int = 0
    sums: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("psnr", "ssim", "repeat_psnr", "repeat_ssim"), 0.0)
    )

    def add(self, source: np.ndarray, result: np.ndarray, keyframe: np.ndarray) -> None:
        self.frames += 1
        self.sums["psnr"] += psnr(source, result)
        self.sums["ssim"] += ssim(source, result)
        self.sums["repeat_psnr"] += psnr(source, keyframe)
        self.sums["repeat_ssim"] += ssim(source, keyframe)

    def means(self) -> dict[str, float]:
        return {name: round(total / max(1, self.frames), 3) for name, total in self.sums.items()}


@click.command()
@click.argument("video", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out.mp4"),
    show_default=True,
    help="Where the video goes (.mp4 or .gif).",
)
@click.option(
    "--motion",
    "route",
    type=click.Choice(["raw", "tokens"]),
    default="raw",
    show_default=True,
    help="Use the motion as read, or after a trip through motion tokens.",
)
@click.option(
    "--clips",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    help="How many consecutive clips of 24 frames.",
)
@click.option("--start", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Start at this second.")
@click.option("--size", type=Size(), help="Video size. [default: the model's]")
@click.option("--video-steps", type=int, help="Denoising steps of a clip.")
@click.option("--compare", is_flag=True, help="Put the source beside the result and report PSNR and SSIM.")
@video_schedule_options
@seed_option
@output_options
@model_options
def reconstruct(
    video: Path,
    output: Path,
    route: str,
    clips: int,
    start: float,
    size: tuple[int, int] | None,
    video_steps: int | None,
    compare: bool,
    seed: int | None,
    force: bool,
    as_json: bool,
    bundle: str | None,
    memory_budget: int | None,
    threads: int | None,
    provider: str,
    **schedule: Any,
) -> None:
    """Rebuild VIDEO from its key frames and motion vectors."""
    from itertools import islice

    from runtime import recipe
    from runtime.motion.sources import MotionSettings, reconstruction_clips
    from runtime.noise import Noise
    from runtime.video import probe
    from runtime.writer import write_clips

    check_output(output, SUFFIXES, force)
    probe(video)  # a file that is no video is refused before a model is opened
    seed = choose_seed(seed)
    with (
        Report(as_json) as report,
        open_pipeline(
            report, bundle=bundle, memory_budget=memory_budget, threads=threads, provider=provider
        ) as pipeline,
    ):
        geometry, defaults = pipeline.manifest.geometry, pipeline.manifest.defaults
        settings = MotionSettings(fps=geometry.reconstruction_fps, rescale=False)
        source = islice(reconstruction_clips(video, settings, geometry.frames, start), clips)
        noise = Noise(seed)
        originals = Originals(video, geometry.reconstruction_fps)
        score = Score()
        written = 0

        def request_of(keyframe: np.ndarray, grid: np.ndarray) -> ReconstructionRequest:
            request = ReconstructionRequest(
                keyframe=keyframe,
                motion=grid,
                through_tokens=route == "tokens",
                size=size,
                video_steps=video_steps,
                **schedule,
            )
            return resolve(request, geometry, defaults)

        def made() -> Iterator[Iterable[np.ndarray]]:
            nonlocal written
            for clip in source:
                result = pipeline.reconstruct(request_of(clip.keyframe, clip.grid), noise)
                written += len(result.frames)
                if not compare:
                    yield result.frames
                    continue
                pairs = []
                height, width = result.frames.shape[1:3]
                for original, frame in zip(
                    originals.of(clip, geometry.frames, (width, height)), result.frames, strict=True
                ):
                    score.add(original, frame, result.keyframe)
                    pairs.append(np.concatenate([original, frame], axis=1))
                yield pairs

        example = request_of(np.zeros((1, 1, 3), np.uint8), np.zeros((1, 2, 1, 1), np.float32))
        document = recipe.make_recipe("reconstruct", pipeline.bundle, example, seed, {"video": video})
        document["settings"] |= {"motion": route, "clips": clips, "start": start, "compare": compare}
        report.plan(pipeline.memory_plan(example))
        write_clips(
            output, made(), geometry.reconstruction_fps, metadata={recipe.KEY: recipe.encode(document)}, force=force
        )
        cost = recipe.costs(pipeline)
        sidecar = recipe.write_sidecar(output, document, cost)
        means = score.means() if compare else {}
        quality = (
            f"; PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.3f} (repeating the key frame: "
            f"{means['repeat_psnr']:.2f} dB, {means['repeat_ssim']:.3f})"
            if compare
            else ""
        )
        report.result(
            f"{output}: {written} frames at {geometry.reconstruction_fps} fps, seed {seed}, "
            f"{sum(pipeline.seconds.values()):.1f} s{quality} (recipe: {sidecar})",
            output=str(output),
            sidecar=str(sidecar),
            frames=written,
            fps=geometry.reconstruction_fps,
            seed=seed,
            **means,
            **cost,
        )


class Originals:
    """The source's frames at the model's rate, read once, in order, alongside the clips."""

    def __init__(self, video: Path, fps: float) -> None:
        from runtime.video import read_frames

        self._frames = enumerate(read_frames(video, fps))

    def of(self, clip: MotionClip, count: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """The `count` frames that `clip` stands for, at `size` (width, height): uint8 [H, W, 3]."""
        from runtime.images import resize_image

        for index, frame in self._frames:
            if index >= clip.frame_index:
                yield resize_image(frame, size)
            if index == clip.frame_index + count - 1:
                return
