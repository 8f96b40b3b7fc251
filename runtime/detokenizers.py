"""Tokens back to pixels: the key-frame and the video detokenizer over their engines.

Contract: each takes host arrays and returns latents and uint8 pictures; every random draw comes from the given
noise in the order the reference makes it (reference semantics, end of §14).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from runtime import diffusion
from runtime.bundle import Manifest
from runtime.engines import EngineSet
from runtime.errors import UsageError
from runtime.geometry import CONTEXT_GRID, VAE_FACTOR
from runtime.images import resize_image, to_signed, to_uint8
from runtime.motion.compensation import compensated
from runtime.noise import Noise
from runtime.progress import Observer, Progress, Stopwatch
from runtime.requests import Resolved, VideoRequest, from_tokens, keyframe_schedule, video_schedule
from runtime.resize import bicubic
from runtime.schedule_names import VideoStart
from runtime.schedulers import AS_IT_IS, ScheduleOptions, make_schedule


@dataclass(frozen=True, kw_only=True)
class KeyframeSettings:
    """Size (width, height) in pixels, denoising steps, how to take them, guidance and the noise levels it acts on."""

    size: tuple[int, int]
    steps: int
    guidance: float
    guidance_interval: tuple[float, float] | None = None
    schedule: ScheduleOptions = AS_IT_IS

    @classmethod
    def of(cls, settings: Resolved, size: tuple[int, int]) -> KeyframeSettings:
        """Those of a resolved request."""
        return cls(
            size=size,
            steps=settings.keyframe_steps,
            guidance=settings.image_guidance,
            guidance_interval=settings.image_guidance_interval,
            schedule=keyframe_schedule(settings),
        )


@dataclass(frozen=True, kw_only=True)
class Reinjection:
    """Start a later clip from the last `frame` [H, W, 3] before it, skipping `rate` of the steps (§8.3)."""

    frame: np.ndarray
    rate: float


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """As of a key frame, but with guidance of first and last frame, and SVD's micro-conditions.

    Attributes:
        start: see `TaskDefaults.video_start`.
        tokenized: whether the motion was tokens.
    """

    size: tuple[int, int]
    steps: int
    guidance: tuple[float, float]
    fps: int
    motion_bucket: int
    noise_augmentation: float
    decode_chunk: int
    guidance_interval: tuple[float, float] | None = None
    schedule: ScheduleOptions = AS_IT_IS
    start: VideoStart = "noise"
    tokenized: bool = False

    @classmethod
    def of(cls, settings: Resolved, manifest: Manifest) -> VideoSettings:
        """Those of a resolved request to a model."""
        return cls(
            size=settings.size,
            steps=settings.video_steps,
            guidance=settings.video_guidance,
            fps=manifest.geometry.fps,
            motion_bucket=settings.motion_bucket,
            noise_augmentation=settings.noise_augmentation,
            decode_chunk=manifest.defaults.decode_chunk,
            guidance_interval=settings.video_guidance_interval,
            schedule=video_schedule(settings),
            start=settings.video_start,
            tokenized=from_tokens(settings),
        )


class KeyframeDetokenizer:
    """Visual codes -> picture (§7, §8)."""

    def __init__(self, engines: EngineSet, manifest: Manifest, observer: Observer, watch: Stopwatch) -> None:
        self._engines = engines
        self._manifest = manifest
        self._observer = observer
        self._watch = watch

    def decode(
        self, codes: np.ndarray, settings: KeyframeSettings, noise: Noise, reinjection: Reinjection | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes [n] -> (latents [4, h, w], picture [H, W, 3] uint8)."""
        return self.decode_each([codes], settings, [noise], reinjection)[0]

    def decode_each(
        self,
        codes: Sequence[np.ndarray],
        settings: KeyframeSettings,
        sources: Sequence[Noise],
        reinjection: Reinjection | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `decode`, each of `codes` with noise of its own; engine after engine, so that none is loaded twice."""
        schedule = make_schedule(self._manifest.keyframe_scheduler, settings.steps, settings.schedule)
        scaling = np.float32(self._manifest.keyframe_vae_scaling)
        with self._watch.stage("keyframe"):
            conditions = self._conditions(codes)
            start = 0
            if reinjection is None:
                starts = [self._normal(settings, noise) * np.float32(schedule.init_noise_sigma) for noise in sources]
            else:
                start = schedule.first_call(int(reinjection.rate * settings.steps))
                picture = to_signed(resize_image(reinjection.frame, settings.size))[None]  # [1, 3, H, W]
                clean = self._engines.get("keyframe_vae_encoder")(image=picture)["latents"] * scaling
                starts = [schedule.add_noise(clean, self._normal(settings, noise), start) for noise in sources]
            calls = len(schedule.timesteps) - start
            found = [
                diffusion.denoise_keyframe(
                    self._engines.get("keyframe_unet"),
                    schedule,
                    prompt_embeds=condition["prompt_embeds"],
                    pooled=condition["pooled"],
                    time_ids=diffusion.keyframe_time_ids(settings.size),
                    latents=latents,
                    guidance=settings.guidance,
                    noise=noise,
                    interval=settings.guidance_interval,
                    start=start,
                    on_step=self._progress(index * calls, calls * len(codes)),
                )
                for index, (condition, latents, noise) in enumerate(zip(conditions, starts, sources, strict=True))
            ]
            pictures = [
                to_uint8(self._engines.get("keyframe_vae_decoder")(latents=latents / scaling)["image"])[0]
                for latents in found
            ]
        return [(latents[0], picture) for latents, picture in zip(found, pictures, strict=True)]

    def _conditions(self, codes: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """What the UNet is told of each of `codes`; more tokens than the trained range are cut (§14, quirk 4)."""
        cut = [one[: self._manifest.geometry.patches] for one in codes]
        return [
            self._engines.get("keyframe_conditioner")(codes=one[None], counts=np.array([len(one)], dtype=np.int64))
            for one in cut
        ]

    def _progress(self, before: int, total: int) -> Callable[[int], None]:
        """What a loop calls after each of its steps, `before` of `total` having been done when it began."""
        return lambda done: self._observer(Progress("keyframe", before + done, total))

    @staticmethod
    def _normal(settings: KeyframeSettings, noise: Noise) -> np.ndarray:
        width, height = settings.size
        return noise.normal(1, 4, height // VAE_FACTOR, width // VAE_FACTOR)


class VideoDetokenizer:
    """Key frame and motion -> frames (§9)."""

    def __init__(self, engines: EngineSet, manifest: Manifest, observer: Observer, watch: Stopwatch) -> None:
        self._engines = engines
        self._manifest = manifest
        self._observer = observer
        self._watch = watch

    def decode(
        self, keyframe: np.ndarray, motion: np.ndarray, settings: VideoSettings, noise: Noise
    ) -> tuple[np.ndarray, np.ndarray]:
        """Frames that follow a key frame.

        Args:
            keyframe: [H, W, 3] uint8.
            motion: [2, T, h, w] at latent size, x1 scale.

        Returns latents [T, 4, h, w] and frames [T, H, W, 3] uint8.
        """
        frames = motion.shape[1]
        with self._watch.stage("video"):
            schedule = make_schedule(self._manifest.video_scheduler, settings.steps, settings.schedule)
            context = bicubic(motion[None], (CONTEXT_GRID, CONTEXT_GRID))
            states = self._engines.get("motion_conditioner")(motion=context)["states"]  # [1, T, 256, C]
            shown = resize_image(keyframe, settings.size)
            image = to_signed(shown)[None]  # [1, 3, H, W]
            image = image + np.float32(settings.noise_augmentation) * noise.normal(*image.shape)
            image_latents = self._engines.get("video_vae_encoder")(image=image)["latents"]  # [1, 4, h, w]
            initial = noise.normal(1, frames, *image_latents.shape[1:])
            start = self._moved(shown, motion, settings.tokenized) if settings.start == "motion" else None
            latents = diffusion.denoise_video(
                self._engines.get("video_unet"),
                schedule,
                image_latents=image_latents,
                motion=motion[None],
                states=states,
                guidance=settings.guidance,
                fps=settings.fps,
                motion_bucket=settings.motion_bucket,
                noise_augmentation=settings.noise_augmentation,
                initial=initial,
                start=start,
                interval=settings.guidance_interval,
                on_step=lambda done: self._observer(Progress("video", done, len(schedule.timesteps))),
            )
        with self._watch.stage("video decode"):
            pixels = diffusion.decode_video(
                self._engines.get("video_vae_decoder"), latents, self._manifest.video_vae_scaling, settings.decode_chunk
            )
        return latents[0], to_uint8(pixels)[0]

    def _moved(self, picture: np.ndarray, motion: np.ndarray, tokenized: bool) -> np.ndarray:
        """Scaled latents [1, T, 4, h, w] of the key frame [H, W, 3] moved along its motion [2, T, h, w]."""
        encoder = self._engines.get("video_vae_encoder")
        frames = compensated(picture, motion, tokenized=tokenized)
        latents = [encoder(image=to_signed(frame)[None])["latents"] for frame in frames]
        return np.stack(latents, axis=1) * np.float32(self._manifest.video_vae_scaling)


def check_schedules(manifest: Manifest, settings: Resolved) -> None:
    """Raise UsageError when a denoising schedule of a resolved request for pictures does not fit the model."""
    loops = [("key frame", manifest.keyframe_scheduler, settings.keyframe_steps, keyframe_schedule(settings))]
    if isinstance(settings, VideoRequest):
        loops.append(("video", manifest.video_scheduler, settings.video_steps, video_schedule(settings)))
    for loop, scheduler, steps, options in loops:
        try:
            make_schedule(scheduler, steps, options)
        except UsageError as error:
            raise UsageError(f"{loop}: {error}") from error
