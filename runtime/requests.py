"""What a user can ask for, and what comes back: frozen requests and results of every task.

Contract: the runtime pipeline and the torch reference take the same request and the same noise and return the
same kind of result, which is how one is judged by the other. A field that is None means the model's own default
(`TaskDefaults`, `Geometry`); `resolve` turns a request into one with every field set, and that is what a recipe
records. Left at None are only the parts of a denoising schedule that neither the request nor the defaults change, which
are then the model's own (`SchedulerSettings`). Sizes are (width, height) in pixels. Pictures are uint8 [H, W, 3] RGB.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from runtime.errors import UsageError
from runtime.geometry import Geometry
from runtime.schedule_names import VIDEO_STARTS, VideoStart
from runtime.schedulers import ScheduleOptions
from runtime.settings import TaskDefaults

Resolved = Any  # a request with every field set, which the type of its optional fields cannot say


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """Text, a picture, or both -> one picture (reference semantics §12.1, §12.6).

    Attributes:
        candidates: tries of which the one is kept that the prompt is likeliest to be said of. One where there is no
            prompt, or where `greedy` would make them all the same.
        finalists: of the candidates, the likeliest with different pictures, which are drawn; their pictures are read
            again as they came out, and the one is kept that the prompt is then likeliest to be said of. One draws what
            is kept and nothing else. At most as many as candidates.
    """

    prompt: str | None = None
    image: np.ndarray | None = None  # [H, W, 3] uint8
    size: tuple[int, int] | None = None
    keyframe_steps: int | None = None
    text_guidance: float | None = None
    image_guidance: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    max_image_tokens: int | None = None
    min_image_tokens: int | None = None
    candidates: int | None = None
    finalists: int | None = None
    keyframe_sampler: str | None = None
    keyframe_spacing: str | None = None
    image_guidance_interval: tuple[float, float] | None = None
    greedy: bool = False


@dataclass(frozen=True, kw_only=True)
class VideoRequest:
    """Text, a picture, or both -> `clips` clips (§12.2, §12.3, §12.4).

    `sampled_motion` None follows the reference: greedy from text alone, sampled when a picture is given; and sampled
    where there are several candidates, which it tells apart.
    `greedy` takes the arg-max everywhere. `candidates`: as for pictures, tries of each clip's key frame and motion.
    `kept_pictures`: of the candidates' pictures, so many that the prompt is likeliest to be said of; the motions, as
    many as there are candidates, are written after these in turn, so that none is spent on a wrong picture. 0 keeps
    all. At most as many as candidates; a picture that is given is the only one.
    `finalists`: as for pictures; a key frame that is given is not drawn.
    """

    prompt: str | None = None
    image: np.ndarray | None = None  # [H, W, 3] uint8
    clips: int = 1
    size: tuple[int, int] | None = None
    keyframe_size: tuple[int, int] | None = None
    keyframe_steps: int | None = None
    video_steps: int | None = None
    text_guidance: float | None = None
    motion_guidance: float | None = None
    image_guidance: float | None = None
    video_guidance: tuple[float, float] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    max_image_tokens: int | None = None
    min_image_tokens: int | None = None
    candidates: int | None = None
    kept_pictures: int | None = None
    finalists: int | None = None
    inverse_rate: float | None = None
    noise_augmentation: float | None = None
    motion_bucket: int | None = None
    keyframe_sampler: str | None = None
    keyframe_spacing: str | None = None
    image_guidance_interval: tuple[float, float] | None = None
    video_sampler: str | None = None
    video_spacing: str | None = None
    video_sigmas: tuple[float, float] | None = None
    video_guidance_interval: tuple[float, float] | None = None
    video_start: VideoStart | None = None
    sampled_motion: bool | None = None
    greedy: bool = False


@dataclass(frozen=True, kw_only=True)
class ReconstructionRequest:
    """Key frame and motion of a video -> the video again (§12.7), from raw motion or through tokens.

    Attributes:
        keyframe: [H, W, 3] uint8 at the source's size.
        motion: [T, 2, rows, columns] float32 macroblock grid, x1 scale, before any resize.
    """

    keyframe: np.ndarray
    motion: np.ndarray
    through_tokens: bool = False
    size: tuple[int, int] | None = None
    video_steps: int | None = None
    video_guidance: tuple[float, float] | None = None
    noise_augmentation: float | None = None
    motion_bucket: int | None = None
    video_sampler: str | None = None
    video_spacing: str | None = None
    video_sigmas: tuple[float, float] | None = None
    video_guidance_interval: tuple[float, float] | None = None
    video_start: VideoStart | None = None


@dataclass(frozen=True, kw_only=True)
class AnswerRequest:
    """A question about a picture, a video, or nothing -> text (§13).

    Attributes:
        pictures: one picture, or one key frame per clip of a video; [H, W, 3] uint8 each.
        motions: for a video, [T, 2, rows, columns] per clip: macroblock grid in x10 scale; else None.
    """

    question: str
    pictures: tuple[np.ndarray, ...] = ()
    motions: tuple[np.ndarray, ...] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    max_answer_tokens: int | None = None
    min_answer_tokens: int | None = None
    greedy: bool = True


Request = VideoRequest | ImageRequest | ReconstructionRequest | AnswerRequest


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """`ids`: generated ids including image_end; `latents` [4, h, w] before decoding; `image` [H, W, 3] uint8."""

    ids: tuple[int, ...]
    latents: np.ndarray
    image: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ClipResult:
    """One clip. `image_ids` are the key frame's ids, `motion_ids` the generated motion ids (empty for raw motion).

    `latents` [T, 4, h, w] before decoding; `keyframe` [H, W, 3] and `frames` [T, H, W, 3] uint8.
    """

    index: int
    image_ids: tuple[int, ...]
    motion_ids: tuple[int, ...]
    keyframe: np.ndarray
    latents: np.ndarray
    frames: np.ndarray


@dataclass(frozen=True, kw_only=True)
class AnswerResult:
    """`ids` as generated; `text` as shown to a person (§13.3)."""

    ids: tuple[int, ...]
    text: str


def resolve(request: Request, geometry: Geometry, defaults: TaskDefaults) -> Resolved:
    """`request` with every None that has a default filled in, checked. Raises UsageError naming the flag."""
    reconstruction = isinstance(request, ReconstructionRequest)
    values: dict[str, object] = {}
    for field in fields(request):
        if getattr(request, field.name) is not None:
            continue
        if field.name == "size":
            values["size"] = geometry.keyframe_size if isinstance(request, ImageRequest) else geometry.video_size
        elif field.name == "keyframe_size":
            values["keyframe_size"] = geometry.keyframe_size
        elif field.name == "video_guidance" and reconstruction:
            values["video_guidance"] = defaults.reconstruction_guidance
        elif field.name == "candidates" and (request.prompt is None or request.greedy):  # type: ignore[union-attr]
            values["candidates"] = 1
        elif hasattr(defaults, field.name):
            values[field.name] = getattr(defaults, field.name)
    resolved: Resolved = replace(request, **values)  # type: ignore[arg-type]
    for name in ("finalists", "kept_pictures"):
        if name in values:
            resolved = replace(resolved, **{name: min(getattr(resolved, name), resolved.candidates)})
    if isinstance(request, VideoRequest) and request.sampled_motion is None:
        resolved = replace(resolved, sampled_motion=resolved.image is not None or resolved.candidates > 1)
    _check(resolved, geometry)
    return resolved


def keyframe_schedule(settings: Resolved) -> ScheduleOptions:
    """What a resolved request changes of the key frame's schedule."""
    return ScheduleOptions(sampler=settings.keyframe_sampler, spacing=settings.keyframe_spacing)


def video_schedule(settings: Resolved) -> ScheduleOptions:
    """What a resolved request changes of the video's schedule."""
    return ScheduleOptions(sampler=settings.video_sampler, spacing=settings.video_spacing, sigmas=settings.video_sigmas)


def from_tokens(settings: Resolved) -> bool:
    """Whether the motion of a resolved request for a clip was tokens, as it always is where the model writes it."""
    return not isinstance(settings, ReconstructionRequest) or settings.through_tokens


_LIMITS: dict[str, tuple[float, float]] = {
    "clips": (1, 100),
    "keyframe_steps": (1, 1000),
    "video_steps": (2, 1000),  # a Karras schedule needs two points
    "text_guidance": (0, 100),
    "motion_guidance": (0, 100),
    "image_guidance": (0, 100),
    "temperature": (0.01, 100),
    "top_k": (0, 1_000_000),
    "top_p": (0.0001, 1),
    "max_image_tokens": (1, 4096),
    "candidates": (1, 1000),
    "kept_pictures": (0, 1000),
    "finalists": (1, 100),
    "max_answer_tokens": (1, 4096),
    "inverse_rate": (0, 0.99),
    "noise_augmentation": (0, 10),
}


def _check(request: Request, geometry: Geometry) -> None:
    for name, (low, high) in _LIMITS.items():
        value = getattr(request, name, None)
        if value is not None and not low <= value <= high:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be from {low:g} to {high:g}")
    for name in ("size", "keyframe_size"):
        size = getattr(request, name, None)
        if size is not None:
            geometry.check_size(f"--{name.replace('_', '-')}", size)
    for name in ("video_sigmas", "image_guidance_interval", "video_guidance_interval"):
        interval = getattr(request, name, None)
        if interval is not None and not 0 <= interval[0] < interval[1]:
            raise UsageError(
                f"--{name.replace('_', '-')} {interval[0]:g}-{interval[1]:g}: must be two noise levels, the lower first"
            )
    if (sigmas := getattr(request, "video_sigmas", None)) is not None and sigmas[0] == 0:
        raise UsageError(f"--video-sigmas 0-{sigmas[1]:g}: the lower level must be above 0, which steps end in anyway")
    if (start := getattr(request, "video_start", None)) is not None and start not in VIDEO_STARTS:
        raise UsageError(f"--video-start {start}: choose from {', '.join(VIDEO_STARTS)}")
    prompt = getattr(request, "prompt", None)
    if prompt is not None and not prompt.strip():
        raise UsageError('PROMPT is empty: say what to generate, for example "a red circle moving right"')
    candidates = getattr(request, "candidates", None)
    if candidates is not None and candidates > 1:
        if prompt is None:
            raise UsageError(
                f"--candidates {candidates}: the prompt tells which is best; give a PROMPT, or leave --candidates out"
            )
        if request.greedy:  # type: ignore[union-attr]
            raise UsageError(f"--candidates {candidates}: with --greedy all are the same; leave one of the two out")
    for name in ("finalists", "kept_pictures"):
        count = getattr(request, name, None)
        if candidates is not None and count is not None and count > candidates:
            raise UsageError(
                f"--{name.replace('_', '-')} {count}: more than there are candidates ({candidates}); ask for at most "
                "as many, or for more with --candidates"
            )
    if isinstance(request, AnswerRequest) and not request.question.strip():
        raise UsageError('QUESTION is empty: ask something, for example "what moves?"')
    if (
        isinstance(request, AnswerRequest)
        and request.motions is not None
        and len(request.motions) != len(request.pictures)
    ):
        raise UsageError(f"{len(request.motions)} motions for {len(request.pictures)} key frames: give one for each")
    if isinstance(request, VideoRequest | ImageRequest) and prompt is None and request.image is None:
        raise UsageError("nothing to generate from: give a PROMPT, --image, or both")
