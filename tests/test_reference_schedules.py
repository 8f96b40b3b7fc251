"""Schedules other than the model's own: the runtime and the torch reference take them alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import assert_close

from runtime.bundle import Bundle
from runtime.detokenizers import KeyframeSettings, Reinjection
from runtime.errors import UsageError
from runtime.noise import Noise
from runtime.pipeline import Pipeline
from runtime.requests import ImageRequest, ReconstructionRequest, VideoRequest, resolve
from runtime.tokenizers import TextTokenizer
from videolavit.checkpoints import load
from videolavit.reference import Reference

KEYFRAMES: tuple[dict[str, Any], ...] = (
    {"keyframe_sampler": "euler", "keyframe_spacing": "trailing"},
    {"keyframe_sampler": "euler-ancestral"},
    {"keyframe_sampler": "heun", "keyframe_spacing": "karras", "image_guidance_interval": (0.3, 5.0)},
    {"keyframe_sampler": "dpmpp-2m", "keyframe_spacing": "ays"},
    {"keyframe_spacing": "trailing", "image_guidance_interval": (0.3, 5.0)},
)
VIDEOS: tuple[dict[str, Any], ...] = (
    {"video_sampler": "heun", "video_sigmas": (0.01, 100.0)},
    {"video_sampler": "dpmpp-2m", "video_guidance_interval": (0.5, 60.0)},
    {"video_spacing": "ays"},
    {"video_sampler": "dpmpp-2m", "video_spacing": "exponential", "video_sigmas": (0.02, 80.0)},
    {"video_sampler": "dpmpp-2m", "video_spacing": "ays"},
    {"video_sampler": "dpmpp-2m", "video_start": "motion", "video_sigmas": (0.02, 5.0)},
    {"video_start": "motion", "through_tokens": True},
)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path, tiny_bundle: Path) -> Reference:
    bundle, checkpoint = Bundle.open(tiny_bundle), load(tiny_checkpoint)
    return Reference(checkpoint, checkpoint.config, TextTokenizer(bundle.file(bundle.manifest.tokenizer)))


@pytest.mark.parametrize("options", KEYFRAMES, ids=lambda o: "-".join(map(str, o.values())))
def test_key_frames(pipeline: Pipeline, reference: Reference, options: dict[str, Any]) -> None:
    request = ImageRequest(prompt="a red circle", keyframe_steps=5, greedy=True, **options)
    ours = pipeline.generate_image(request, Noise(2))
    theirs = reference.generate_image(request, Noise(2))
    assert ours.ids == theirs.ids
    assert_close(ours.latents, theirs.latents, 1e-3 * float(np.abs(theirs.latents).max()))


@pytest.mark.parametrize("options", KEYFRAMES[2:4], ids=["heun", "dpmpp-2m"])
def test_key_frames_of_later_clips(pipeline: Pipeline, reference: Reference, options: dict[str, Any]) -> None:
    """A frame is noised to, and denoised from, the same step."""
    request = VideoRequest(prompt="a red circle", keyframe_steps=6, inverse_rate=0.5, clips=2, **options)
    settings = resolve(request, pipeline.manifest.geometry, pipeline.manifest.defaults)
    frame = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    codes = np.arange(20)
    size = settings.keyframe_size
    ours, _ = pipeline._keyframes.decode(
        codes, KeyframeSettings.of(settings, size), Noise(5), Reinjection(frame=frame, rate=0.5)
    )
    noise = Noise(5)
    start = reference.noise_last_frame(frame, 3, settings, noise)
    ids = pipeline.manifest.vocabulary.image_span(codes)
    theirs, _ = reference.decode_keyframe(ids, size, settings, noise, start, 3)
    assert_close(ours, theirs, 1e-3 * float(np.abs(theirs).max()))


@pytest.mark.parametrize("options", VIDEOS, ids=lambda o: "-".join(map(str, o.values())))
def test_clips(pipeline: Pipeline, reference: Reference, options: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    request = ReconstructionRequest(
        keyframe=random.integers(0, 256, (128, 128, 3), dtype=np.uint8),
        motion=random.normal(size=(24, 2, 8, 8)).astype(np.float32),
        video_steps=4,
        **options,
    )
    ours, theirs = pipeline.reconstruct(request, Noise(2)), reference.reconstruct(request, Noise(2))
    assert_close(ours.latents, theirs.latents, 1e-3 * float(np.abs(theirs.latents).max()))


def test_an_unknown_start_is_refused(pipeline: Pipeline) -> None:
    request = VideoRequest(prompt="a red circle", video_start="picture")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--video-start picture: choose from noise, motion"):
        resolve(request, pipeline.manifest.geometry, pipeline.manifest.defaults)
