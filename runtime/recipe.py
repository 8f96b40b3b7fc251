"""The recipe of a generated file: everything needed to make it again.

Contract: a recipe is a JSON object with task, settings, seed, bundle name and digest, and versions. It is stored in the
output's own metadata (nothing that varies between two equal runs, so equal runs give equal files) and, with the
seconds each stage took and the memory, in `<output>.json` beside it.
"""

from __future__ import annotations

import platform
import shlex
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from runtime.bundle import Bundle
from runtime.files import published

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline

KEY = "videolavit"  # metadata key; players ignore it


def versions() -> dict[str, str]:
    """Versions that can change a result."""
    found = {"python": platform.python_version()}
    for name in ("videolavit", "numpy", "av", "onnxruntime", "onnxruntime-gpu", "pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def make_recipe(task: str, bundle: Bundle, request: Any, seed: int, inputs: dict[str, Path]) -> dict[str, Any]:
    """Recipe of `request` (a resolved request). Pixels and motion are left out: `inputs` names their files."""
    settings = {
        field.name: value
        for field in fields(request)
        if not isinstance(value := getattr(request, field.name), np.ndarray | None)
    }
    return {
        "task": task,
        "settings": settings,
        "seed": seed,
        "inputs": {name: str(path) for name, path in inputs.items()},
        "bundle": {"name": bundle.manifest.name, "digest": bundle.digest, "trained": bundle.manifest.trained},
        "versions": versions(),
    }


def encode(recipe: dict[str, Any]) -> str:
    return msgspec.json.encode(recipe).decode()


# Settings that are options of the task's command, under the same name.
_SAMPLING = ("temperature", "top_k", "top_p", "greedy")
_KEYFRAME = ("keyframe_steps", "keyframe_sampler", "keyframe_spacing", "image_guidance", "image_guidance_interval")
_VIDEO = ("video_steps", "video_sampler", "video_spacing", "video_sigmas", "video_guidance_interval", "video_start")
_OPTIONS = {
    "generate": (
        *("clips", "size", "keyframe_size", "candidates", "kept_pictures", "finalists"),
        *("text_guidance", "motion_guidance"),
        *(*_KEYFRAME, *_VIDEO, *_SAMPLING),
    ),
    "imagine": ("size", "candidates", "finalists", "text_guidance", *_KEYFRAME, *_SAMPLING),
    "reconstruct": ("motion", "clips", "start", "size", *_VIDEO, "compare"),
}


def command_line(recipe: dict[str, Any], output: Path) -> str:
    """The command that makes the file again as `output`, ready for a shell. The recipe may come from a stranger."""
    task, settings = str(recipe.get("task")), recipe.get("settings", {})
    inputs = recipe.get("inputs", {})
    words = ["videolavit", task]
    words += [str(value) for value in (settings.get("prompt"), inputs.get("video")) if value is not None]
    if "image" in inputs:
        words += ["--image", str(inputs["image"])]
    for name in _OPTIONS.get(task, ()):
        value = settings.get(name)
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            between = "x" if name.endswith("size") else "-"
            words += [flag, between.join(map(str, value)) if isinstance(value, list | tuple) else str(value)]
    return shlex.join([*words, "--seed", str(recipe.get("seed")), "-o", str(output)])


def costs(pipeline: Pipeline, seconds: dict[str, float] | None = None) -> dict[str, Any]:
    """What a run cost: seconds per stage (those of the pipeline where none are given) and memory in bytes.

    Memory is the process's at most, in all and per stage, and what every engine took of it.
    """
    return {
        "seconds": {k: round(v, 4) for k, v in (pipeline.seconds if seconds is None else seconds).items()},
        "peak_rss_bytes": pipeline.peak_rss,
        "stage_peak_rss_bytes": pipeline.stage_peaks,
        "engine_bytes": pipeline.engine_bytes,
    }


def write_sidecar(output: Path, recipe: dict[str, Any], cost: dict[str, Any]) -> Path:
    """Write `<output>.json`: the recipe, and what the run cost (see `costs`)."""
    path = output.with_name(output.name + ".json")
    document = {**recipe, **cost}
    with published(path) as staging:
        staging.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
    return path
