"""Which shapes a TensorRT plan is built for.

Contract: an optimisation profile gives every free dimension of an engine's inputs a range and the size to be fastest
at. Pictures get a profile for each size asked for and run at exactly these sizes; rows, prompts and frames get a range.
The language model gets one profile for prompts and one for single positions. Sizes the caller leaves open are
the model's own.
"""

from __future__ import annotations

from dataclasses import dataclass

from export.graphs.registry import LANGUAGE_MODEL
from export.settings import Buckets
from runtime.errors import UsageError
from runtime.geometry import VAE_FACTOR
from videolavit.config import ModelConfig


@dataclass(frozen=True)
class Range:
    """Smallest, best and largest size of a dimension."""

    low: int
    best: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.best <= self.high:
            raise UsageError(f"buckets: {self.low}, {self.best}, {self.high} is no range; give sizes of at least 1")


Profile = dict[str, Range]  # free dimension -> range

# Engines that see one row per clip of a video, not one per branch of guidance
_PER_CLIP = ("visual_encoder", "visual_merger", "motion_encoder", "motion_decoder")


def profiles(engine: str, config: ModelConfig, buckets: Buckets, capacity: int | None = None) -> list[Profile]:
    """The profiles of `engine`, a name of `export.graphs.registry`.

    `capacity`, for the language model, fixes the length of its cache; None leaves it free up to the model's limit.
    """
    if engine == LANGUAGE_MODEL:
        return _language_model(config, buckets, capacity)
    rows = Range(1, buckets.rows, buckets.rows)
    if engine in _PER_CLIP:
        clips = max(config.defaults.max_clips, buckets.rows)
        return [{"B": Range(1, 1, clips)}]
    if engine == "token_embedding":
        limit = config.language_model.max_positions
        return [{"B": rows, "S": Range(1, 1, limit)}]
    if engine == "keyframe_conditioner":
        patches = config.keyframe_decoder.patches
        return [{"B": rows, "L": Range(1, -(-patches // 2), patches)}]
    if engine == "motion_conditioner":
        return [{"B": rows}]
    if engine.startswith("keyframe_"):
        sizes = buckets.image_sizes or (config.geometry.keyframe_size,)
    else:
        sizes = buckets.video_sizes or (config.geometry.video_size,)
    batch = {"B": rows}
    if engine == "video_vae_decoder":
        chunk = min(config.defaults.decode_chunk, config.geometry.frames)
        batch = {"N": Range(1, chunk, config.geometry.frames)}
    elif engine.endswith(("_vae_encoder", "_vae_decoder")):
        batch = {"B": Range(1, 1, buckets.rows)}
    return [batch | _picture(size, config) for size in dict.fromkeys(sizes)]


def capacities(config: ModelConfig, buckets: Buckets) -> tuple[int, ...]:
    """Lengths of the language model's cache, shortest first. Raises UsageError beyond the model's limit."""
    limit = config.language_model.max_positions
    wanted = tuple(sorted(set(buckets.cache_capacities))) or (limit,)
    if wanted[-1] > limit:
        raise UsageError(f"cache_capacities: {wanted[-1]} is more than the model's {limit} positions; ask for fewer")
    return wanted


def _picture(size: tuple[int, int], config: ModelConfig) -> Profile:
    width, height = config.geometry.check_size("buckets", size)
    pixels = {"H": Range(height, height, height), "W": Range(width, width, width)}
    return pixels | {key.lower(): Range(*(r.low // VAE_FACTOR,) * 3) for key, r in pixels.items()}


def _language_model(config: ModelConfig, buckets: Buckets, capacity: int | None) -> list[Profile]:
    longest = capacity or capacities(config, buckets)[-1]
    cache = Range(longest, longest, longest) if capacity else Range(1, capacities(config, buckets)[0], longest)
    prompt = min(buckets.prompt_positions or longest, longest)
    rows = Range(1, buckets.rows, buckets.rows)
    one = {"B": rows, "S": Range(1, 1, 1), "C": cache}
    if prompt == 1:
        return [one]
    return [one, {"B": rows, "S": Range(2, -(-prompt // 2) + 1 if prompt > 2 else 2, prompt), "C": cache}]
