"""The whole path, runtime against torch: every task, same request, same noise.

Contract: the two pipelines share requests and noise and nothing else (the torch one runs on transformers'
generate and diffusers' schedulers), so agreement here is agreement of two implementations. Token ids must be equal;
latents must agree to LATENT_TOLERANCE of their own scale; pictures to FRAME_TOLERANCE levels of 255. A generated key
frame is rounded to 8 bits before a clip is made from it, and there a difference of 1e-6 can become one of a whole
level: where the two key frames are not equal to the bit, the clip's latents must agree to CHAINED_TOLERANCE and its
pictures to CHAINED_PSNR, because they are answers to two slightly different questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from runtime.bundle import Bundle
from runtime.errors import ParityError
from runtime.geometry import MACROBLOCK
from runtime.metrics import psnr
from runtime.noise import Noise
from runtime.pipeline import Pipeline
from runtime.requests import (
    AnswerRequest,
    AnswerResult,
    ClipResult,
    ImageRequest,
    ImageResult,
    ReconstructionRequest,
    VideoRequest,
)
from runtime.tokenizers import TextTokenizer
from videolavit.checkpoints import Checkpoint
from videolavit.reference import Reference

LATENT_TOLERANCE = 1e-3  # of the largest magnitude; float32 through tens of guided steps
CHAINED_TOLERANCE = 0.1  # of the largest magnitude
CHAINED_PSNR = 35.0  # dB
FRAME_TOLERANCE = 2  # levels; rounding to 8 bits turns a tiny difference into one level
STEPS = 4  # of each denoising loop: errors of an engine show in the first step

Results = Sequence[ImageResult | ClipResult | AnswerResult]


@dataclass(frozen=True)
class Agreement:
    """How far the runtime is from torch on one task.

    Attributes:
        tokens: generated ids compared; all are equal.
        latent_error: largest difference of latents over their largest magnitude.
        frame_error: largest difference of pictures in levels of 255.
        psnr: of the pictures, dB; 100 when equal.
    """

    task: str
    tokens: int
    latent_error: float
    frame_error: int
    psnr: float


@dataclass(frozen=True)
class Case:
    """One task: `run` is given a pipeline (runtime or reference, they answer to the same calls) and a noise."""

    task: str
    run: Callable[[Pipeline | Reference, Noise], Results]


def cases(bundle: Bundle) -> list[Case]:
    """Every task, on a small moving scene that fits the model's geometry."""
    geometry = bundle.manifest.geometry
    picture, grid = _scene(geometry.frames, geometry.image_size)
    common: dict[str, Any] = {"greedy": True, "keyframe_steps": STEPS, "video_steps": STEPS}
    prompt = "a red circle moving right"

    def video(**request: Any) -> Callable[[Pipeline | Reference, Noise], Results]:
        return lambda pipeline, noise: list(pipeline.generate_video(VideoRequest(**common, **request), noise))

    def image(**request: Any) -> Callable[[Pipeline | Reference, Noise], Results]:
        settings: dict[str, Any] = {"greedy": True, "keyframe_steps": STEPS, **request}
        return lambda pipeline, noise: [pipeline.generate_image(ImageRequest(**settings), noise)]

    def rebuild(through_tokens: bool) -> Callable[[Pipeline | Reference, Noise], Results]:
        request = ReconstructionRequest(
            keyframe=picture, motion=grid / 10, through_tokens=through_tokens, video_steps=STEPS
        )
        return lambda pipeline, noise: [pipeline.reconstruct(request, noise)]

    def answer(**request: Any) -> Callable[[Pipeline | Reference, Noise], Results]:
        asked = AnswerRequest(question="what moves?", max_answer_tokens=12, min_answer_tokens=4, **request)
        return lambda pipeline, noise: [pipeline.answer(asked, noise)]

    return [
        Case("text to image", image(prompt=prompt)),
        Case("text and image to image", image(prompt=prompt, image=picture)),
        Case("text to video", video(prompt=prompt)),
        Case("image to video", video(image=picture)),
        Case("text and image to video", video(prompt=prompt, image=picture)),
        Case("long video", video(prompt=prompt, clips=2)),
        Case("reconstruction, raw motion", rebuild(False)),
        Case("reconstruction, motion tokens", rebuild(True)),
        Case("text question", answer()),
        Case("image question", answer(pictures=(picture,))),
        Case("video question", answer(pictures=(picture, picture[:, ::-1]), motions=(grid, -grid))),
    ]


def compare(bundle: Bundle, checkpoint: Checkpoint, seed: int = 0) -> Iterator[Agreement]:
    """Run every case on both and yield how they agree.

    Raises ParityError, naming the task, at the first id that differs or bound that is broken.
    """
    reference = Reference(checkpoint, checkpoint.config, TextTokenizer(bundle.file(bundle.manifest.tokenizer)))
    with Pipeline(bundle) as pipeline:
        for case in cases(bundle):
            yield agreement(case.task, case.run(pipeline, Noise(seed)), case.run(reference, Noise(seed)))


def agreement(task: str, ours: Results, theirs: Results) -> Agreement:
    tokens, worst = 0, Agreement(task, 0, 0.0, 0, 100.0)
    for a, b in zip(ours, theirs, strict=True):
        ids_a, ids_b = _ids(a), _ids(b)
        if ids_a != ids_b:
            wrong = sum(x != y for x, y in zip(ids_a, ids_b, strict=False)) + abs(len(ids_a) - len(ids_b))
            raise ParityError(task, wrong, 0, f"generated ids: {wrong} of {len(ids_b)} differ")
        tokens += len(ids_a)
        if isinstance(a, AnswerResult) or isinstance(b, AnswerResult):
            continue
        found = _difference(task, a, b)
        _check(found, chained=isinstance(a, ClipResult) and not _same_start(a, b))
        worst = Agreement(
            task,
            0,
            max(worst.latent_error, found.latent_error),
            max(worst.frame_error, found.frame_error),
            min(worst.psnr, found.psnr),
        )
    return replace(worst, tokens=tokens)


def _difference(task: str, a: ImageResult | ClipResult, b: ImageResult | ClipResult) -> Agreement:
    latent_error = float(np.abs(a.latents - b.latents).max()) / float(np.abs(b.latents).max())
    pairs = list(_pictures(a, b))
    frame_error = max(int(np.abs(x.astype(int) - y.astype(int)).max()) for x, y in pairs)
    return Agreement(task, 0, latent_error, frame_error, min(psnr(x, y) for x, y in pairs))


def _same_start(a: ClipResult, b: Any) -> bool:
    """Whether two clips were made from key frames equal to the bit."""
    return np.array_equal(a.keyframe, b.keyframe)


def _check(found: Agreement, *, chained: bool) -> None:
    latent_tolerance = CHAINED_TOLERANCE if chained else LATENT_TOLERANCE
    if not found.latent_error <= latent_tolerance:  # also catches NaN
        raise ParityError(found.task, found.latent_error, latent_tolerance, "latents, relative to their scale")
    if not chained and found.frame_error > FRAME_TOLERANCE:
        raise ParityError(found.task, found.frame_error, FRAME_TOLERANCE, "pictures, in levels of 255")
    if chained and found.psnr < CHAINED_PSNR:
        raise ParityError(found.task, CHAINED_PSNR - found.psnr, 0, f"pictures below {CHAINED_PSNR} dB PSNR")


def _ids(result: ImageResult | ClipResult | AnswerResult) -> tuple[int, ...]:
    return (*result.image_ids, *result.motion_ids) if isinstance(result, ClipResult) else result.ids


def _pictures(a: ImageResult | ClipResult, b: ImageResult | ClipResult) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if isinstance(a, ClipResult) and isinstance(b, ClipResult):
        yield a.keyframe, b.keyframe
        yield from zip(a.frames, b.frames, strict=True)
    elif isinstance(a, ImageResult) and isinstance(b, ImageResult):
        yield a.image, b.image


def _scene(frames: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright square on grey, [side, side, 3] uint8, that moves right: motion [T, 2, rows, columns], x10 scale."""
    picture = np.full((side, side, 3), 90, np.uint8)
    low, high = side // 4, side // 2
    picture[low:high, low:high] = (230, 40, 40)
    cells = -(-side // MACROBLOCK)
    grid = np.zeros((frames, 2, cells, cells), np.float32)
    grid[1:, 0, cells // 4 : cells // 2, cells // 4 : cells // 2] = -1.5
    return picture, grid
