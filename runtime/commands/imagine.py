"""`videolavit imagine`: a picture from text, a picture, or both.

Contract: one PNG (or JPEG) per run, written beside its name and renamed, its recipe in the file and in a sidecar.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

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
)
from runtime.commands.report import Report
from runtime.files import check_output
from runtime.requests import ImageRequest, resolve

SUFFIXES = (".png", ".jpg", ".jpeg")


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out.png"),
    show_default=True,
    help="Where the picture goes (.png or .jpg).",
)
@click.option("--image", type=click.Path(path_type=Path), help="A picture to go with, or instead of, the text.")
@click.option("--size", type=Size(), help="Picture size. [default: the model's]")
@seed_option
@candidates_options
@click.option("--keyframe-steps", type=int, help="Denoising steps.")
@click.option("--text-guidance", type=float, help="Guidance while image tokens are written.")
@click.option("--image-guidance", type=float, help="Guidance while the picture is denoised.")
@keyframe_schedule_options
@sampling_options
@output_options
@model_options
def imagine(
    prompt: str | None,
    output: Path,
    image: Path | None,
    seed: int | None,
    force: bool,
    as_json: bool,
    bundle: str | None,
    memory_budget: int | None,
    threads: int | None,
    provider: str,
    **settings: Any,
) -> None:
    """Make a picture from PROMPT, a picture, or both."""
    from runtime import recipe
    from runtime.images import load_image, save_image
    from runtime.noise import Noise

    check_output(output, SUFFIXES, force)
    seed = choose_seed(seed)
    picture = load_image(image) if image is not None else None
    with (
        Report(as_json) as report,
        open_pipeline(
            report, bundle=bundle, memory_budget=memory_budget, threads=threads, provider=provider
        ) as pipeline,
    ):
        request = resolve(
            ImageRequest(prompt=prompt, image=picture, **settings),
            pipeline.manifest.geometry,
            pipeline.manifest.defaults,
        )
        document = recipe.make_recipe("imagine", pipeline.bundle, request, seed, {"image": image} if image else {})
        report.plan(pipeline.memory_plan(request))
        result = pipeline.generate_image(request, Noise(seed))
        save_image(output, result.image, {recipe.KEY: recipe.encode(document)}, force=force)
        cost = recipe.costs(pipeline)
        sidecar = recipe.write_sidecar(output, document, cost)
        height, width = result.image.shape[:2]
        report.result(
            f"{output}: {width}x{height}, {len(result.ids)} image tokens, seed {seed}, "
            f"{sum(pipeline.seconds.values()):.1f} s (recipe: {sidecar})",
            output=str(output),
            sidecar=str(sidecar),
            width=width,
            height=height,
            seed=seed,
            image_tokens=len(result.ids),
            **cost,
        )
