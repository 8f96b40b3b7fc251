"""The whole path, runtime against torch: every task, same request, same noise.

Contract: the runtime runs a task freely, then torch runs the same task (on transformers' generate and diffusers'
schedulers: another implementation that shares requests and noise and nothing else), stage by stage on what the
runtime made so far. So a difference never grows into the next stage, and every stage of a bundle can be judged,
however its ids went. Of each id the runtime wrote, torch says whether it would have written the same after the ids
before it; latents, key frames and frames are compared with torch's from the same ids and pictures. What is demanded
depends on the lowest precision among the bundle's engines (`BOUNDS`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor

from runtime.bundle import Bundle
from runtime.errors import ParityError
from runtime.geometry import MACROBLOCK
from runtime.images import resize_image
from runtime.metrics import psnr, ssim
from runtime.noise import Noise
from runtime.pipeline import Pipeline
from runtime.requests import (
    AnswerRequest,
    AnswerResult,
    ClipResult,
    ImageRequest,
    ImageResult,
    ReconstructionRequest,
    Resolved,
    VideoRequest,
)
from runtime.tokenizers import TextTokenizer
from videolavit.checkpoints import Checkpoint
from videolavit.reference import Reference
from videolavit.reference.tokens import Rules

STEPS = 4  # of each denoising loop: errors of an engine show in the first step
_FREE = (1.0, 0, 1.0)  # temperature, top-k and top-p that change no probability

Results = Sequence[ImageResult | ClipResult | AnswerResult]


@dataclass(frozen=True)
class Bounds:
    """What a task must reach; see `Agreement`."""

    share: float
    latent_error: float
    psnr: float
    ssim: float


# From the highest precision to the lowest, with room for other models, but not for a picture of another seed. The worst
# task of the shapes model (docs/benchmarks/precisions.md; fp8 by `verify` alone) had in fp32 all ids, 9e-7, 80 dB; in
# fp16 all ids, 8e-4, 65 dB; in bf16 98 % of the ids, 0.004, 56 dB; in fp8 all ids, 0.11, 36 dB, SSIM 0.98; in int8 8 of
# 9 ids, 0.26, 28 dB, SSIM 0.94; with its language model in int4 4 of 7 ids, and the preset `tiny` with random weights
# 46 %.
BOUNDS = {
    "fp32": Bounds(1.0, 1e-3, 50.0, 0.999),
    "fp16": Bounds(0.95, 0.02, 40.0, 0.99),
    "bf16": Bounds(0.9, 0.1, 30.0, 0.95),
    "fp8": Bounds(0.95, 0.25, 30.0, 0.95),
    "int8": Bounds(0.8, 0.3, 25.0, 0.9),
    "int4": Bounds(0.3, 0.3, 25.0, 0.9),
}


@dataclass(frozen=True)
class Agreement:
    """How far the runtime is from torch on one task.

    Attributes:
        tokens: ids compared; `same`: how many of them torch would have written too.
        latent_error: largest distance of latents from torch's, over the latter's length.
        psnr, ssim: lowest of all pictures; 100 (dB) and 1 where they are equal.
    """

    task: str
    tokens: int = 0
    same: int = 0
    latent_error: float = 0.0
    psnr: float = 100.0
    ssim: float = 1.0

    @property
    def share(self) -> float:
        """Share of the ids that torch would have written too."""
        return self.same / self.tokens if self.tokens else 1.0


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


def precision_of(bundle: Bundle) -> str:
    """The lowest precision among a bundle's engines."""
    return max((entry.precision for entry in bundle.manifest.engines.values()), key=list(BOUNDS).index)


def compare(bundle: Bundle, checkpoint: Checkpoint, seed: int = 0) -> Iterator[Agreement]:
    """Run every case on both and yield how they agree; whether that suffices is for `check` to say."""
    follower = Follower(checkpoint, TextTokenizer(bundle.file(bundle.manifest.tokenizer)))
    with Pipeline(bundle) as pipeline:
        for case in cases(bundle):
            yield follower.agreement(case, case.run(pipeline, Noise(seed)), Noise(seed))


def check(found: Agreement, bounds: Bounds) -> None:
    """Raise ParityError naming the task and the first bound it misses; what is not a number misses."""
    if not found.share >= bounds.share:
        detail = f"{found.tokens - found.same} of {found.tokens} ids"
        raise ParityError(found.task, 1 - found.share, 1 - bounds.share, detail)
    if not found.latent_error <= bounds.latent_error:
        raise ParityError(found.task, found.latent_error, bounds.latent_error, "latents, relative")
    if not found.psnr >= bounds.psnr:
        raise ParityError(found.task, 0, 0, f"PSNR {found.psnr:.1f} dB, at least {bounds.psnr:g}")
    if not found.ssim >= bounds.ssim:
        raise ParityError(found.task, 1 - found.ssim, 1 - bounds.ssim, f"SSIM {found.ssim:.4f}, at least {bounds.ssim}")


class Follower(Reference):
    """The reference, which goes on from the runtime's result after every stage that it has compared."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: TextTokenizer) -> None:
        super().__init__(checkpoint, checkpoint.config, tokenizer)
        self._left: list[Any] = []  # the runtime's results that torch has not reached the end of
        self._found = Agreement("")

    def agreement(self, case: Case, ours: Results, noise: Noise) -> Agreement:
        """Compare results of the runtime; `noise` is one like theirs was."""
        self._left, self._found = list(ours), Agreement(case.task)
        case.run(self, noise)
        return self._found

    # Stages with ids

    def write(self, prompt: list[int], rules: Rules, noise: Noise) -> list[int]:
        now = self._left[0]
        if isinstance(now, ImageResult):
            ours = now.ids
        else:
            ours = now.motion_ids if rules.end == self.config.vocabulary.motion_end else now.image_ids
        dictation = _Dictation(noise, ours, rules.allowed)
        super().write(prompt, replace(rules, sampling=_FREE), dictation)
        self._tokens(ours, dictation.likeliest)
        return list(ours)

    def answer(self, request: AnswerRequest, noise: Noise) -> AnswerResult:
        ours = self._left[0]
        dictation = _Dictation(noise, ours.ids, self.config.vocabulary.text_ranges)
        temperature, top_k, top_p = _FREE
        super().answer(replace(request, greedy=False, temperature=temperature, top_k=top_k, top_p=top_p), dictation)
        self._tokens(ours.ids, dictation.likeliest)
        return ours

    def picture_ids(self, picture: np.ndarray, noise: Noise) -> list[int]:
        theirs = super().picture_ids(picture, noise)
        now = self._left[0]
        if not isinstance(now, ClipResult):
            return theirs  # other results do not hold them; what is written after them tells
        ours = list(now.image_ids[:-1])
        self._tokens(ours, theirs)
        return ours

    def motion_ids(self, motion: np.ndarray) -> list[int]:
        theirs = super().motion_ids(motion)
        now = self._left[0]
        if not isinstance(now, ClipResult):
            return theirs
        self._tokens(now.motion_ids, theirs)
        return list(now.motion_ids)

    # Stages with pictures

    def decode_keyframe(
        self,
        image_ids: list[int],
        size: tuple[int, int],
        settings: Resolved,
        noise: Noise,
        start: Tensor | None = None,
        level: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        latents, picture = super().decode_keyframe(image_ids, size, settings, noise, start, level)
        now = self._left[0]
        if isinstance(now, ImageResult):
            self._latents(now.latents, latents)
            self._pictures([now.image], [picture])
            return now.latents, now.image
        self._pictures([now.keyframe], [resize_image(picture, settings.size)])
        return latents, now.keyframe

    def decode_clip(
        self, keyframe: np.ndarray, motion: Tensor, settings: Resolved, noise: Noise
    ) -> tuple[np.ndarray, np.ndarray]:
        latents, frames = super().decode_clip(keyframe, motion, settings, noise)
        now = self._left.pop(0)  # this is a clip's last stage
        self._latents(now.latents, latents)
        self._pictures(now.frames, frames)
        return now.latents, now.frames

    # Comparison

    def _tokens(self, ours: Sequence[int], theirs: Sequence[int]) -> None:
        found = self._found
        same = sum(a == b for a, b in zip(ours, theirs, strict=False))
        tokens = max(len(ours), len(theirs))
        self._found = replace(found, tokens=found.tokens + tokens, same=found.same + same)

    def _latents(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
        # np.maximum, unlike max, keeps what is not a number.
        self._found = replace(self._found, latent_error=float(np.maximum(self._found.latent_error, error)))

    def _pictures(self, ours: Iterable[np.ndarray], theirs: Iterable[np.ndarray]) -> None:
        for a, b in zip(ours, theirs, strict=True):
            found = self._found
            self._found = replace(found, psnr=min(found.psnr, psnr(a, b)), ssim=min(found.ssim, ssim(a, b)))


class _Dictation(Noise):
    """Noise whose drawn ids are given beforehand; `likeliest` are the ones that torch would have chosen instead."""

    def __init__(self, noise: Noise, ids: Sequence[int], allowed: Sequence[range]) -> None:
        self._noise = noise
        self._ids = iter(ids)
        self._allowed = sorted(chain(*allowed))  # as `videolavit.reference.tokens` orders them
        self.likeliest: list[int] = []

    def normal(self, *shape: int) -> np.ndarray:
        return self._noise.normal(*shape)

    def gumbel(self, *shape: int) -> np.ndarray:
        return self._noise.gumbel(*shape)

    def choice(self, probabilities: np.ndarray) -> np.ndarray:
        """The index of the next given id; of the likeliest one when there is none left."""
        likeliest = self._allowed[int(probabilities[0].argmax())]
        self.likeliest.append(likeliest)
        return np.array([self._allowed.index(next(self._ids, likeliest))])


def _scene(frames: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright square on grey, [side, side, 3] uint8, that moves right: motion [T, 2, rows, columns], x10 scale."""
    picture = np.full((side, side, 3), 90, np.uint8)
    low, high = side // 4, side // 2
    picture[low:high, low:high] = (230, 40, 40)
    cells = -(-side // MACROBLOCK)
    grid = np.zeros((frames, 2, cells, cells), np.float32)
    grid[1:, 0, cells // 4 : cells // 2, cells // 4 : cells // 2] = -1.5
    return picture, grid
