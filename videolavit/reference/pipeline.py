"""The tasks, stage by stage (reference semantics §12, §13).

Contract: see the package. Every stage is a method of its own that takes and returns plain values, so that what a task
does and in which order can be read from its method, and recorded by a test.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.errors import MediaError
from runtime.geometry import VAE_FACTOR
from runtime.images import resize_image, to_signed, to_uint8, tokenizer_pixels
from runtime.motion.compensation import compensated
from runtime.motion.grid import model_motion
from runtime.noise import Noise
from runtime.prompts import STOP, answer_text, question_ids
from runtime.requests import (
    AnswerRequest,
    AnswerResult,
    ClipResult,
    ImageRequest,
    ImageResult,
    ReconstructionRequest,
    Request,
    Resolved,
    VideoRequest,
    from_tokens,
    keyframe_schedule,
    resolve,
    video_schedule,
)
from runtime.tokenizers import TextTokenizer
from runtime.vocabulary import EOS
from videolavit.checkpoints import Checkpoint
from videolavit.config import ModelConfig
from videolavit.inventory import UNDERSTANDING, for_task
from videolavit.models.keyframe_decoder import pad_codes
from videolavit.models.motion_tokenizer import MOTION_SCALE
from videolavit.reference import clips, keyframes
from videolavit.reference.tokens import Rules, write

Written = tuple[list[int], Any]  # image ids, and motion ids where it is a clip, else None
_EMPTY = "picture: no part of it was found worth a visual token; try another seed or picture"


class Reference:
    """All tasks of the model in torch.

    Args:
        components: a checkpoint, or the modules by the names of `videolavit.models.components.COMPONENTS`; only those
            that a task needs have to be there. Questions are answered by `understanding/NAME` where that exists.
        config: the model's configuration.
        tokenizer: the model's text tokenizer.

    Every task raises UsageError for a request that is out of bounds and MediaError for a picture it cannot use.
    """

    def __init__(
        self, components: Mapping[str, nn.Module] | Checkpoint, config: ModelConfig, tokenizer: TextTokenizer
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._components = components
        self._task: str | None = None  # whose own components are used where there are any
        self._device = torch.device("cpu")
        self._dtype = torch.float32

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Reference:
        """This object, with every module moved to `device` and `dtype` when it is next used."""
        self._device, self._dtype = torch.device(device), dtype
        return self

    # Tasks

    def generate_image(self, request: ImageRequest, noise: Noise) -> ImageResult:
        """Text, a picture, or both -> one picture (§12.1, §12.6)."""
        settings = self.settings(request)
        prompt = [] if settings.prompt is None else self.tokenizer.encode(settings.prompt)
        if settings.image is not None:
            prompt += self.picture_ids(settings.image, noise)
        images = [self.write_image_ids(prompt, settings, source) for source in _sources(settings.candidates, noise)]
        (ids, _), latents, image = self.best_drawn([(ids, None) for ids in images], settings.size, settings, noise)
        return ImageResult(ids=tuple(ids), latents=latents, image=image)

    def generate_video(self, request: VideoRequest, noise: Noise) -> Iterator[ClipResult]:
        """Text, a picture, or both -> `clips` clips, one after the other (§12.2, §12.3, §12.4)."""
        settings = self.settings(request)
        vocabulary = self.config.vocabulary
        sequence = [] if settings.prompt is None else self.tokenizer.encode(settings.prompt)
        before: ClipResult | None = None
        for index in range(settings.clips):
            given: list[int] | None = None
            if before is None and settings.image is not None:
                given = [*self.picture_ids(settings.image, noise), vocabulary.image_end]
            candidates = self.write_clips(sequence, given, settings, noise)
            if given is not None:
                (image_ids, motion_ids), keyframe = self.likeliest(candidates, 1, settings)[0], settings.image
            else:
                last = None if before is None else before.frames[-1]
                kept, _, keyframe = self.best_drawn(candidates, settings.keyframe_size, settings, noise, last)
                image_ids, motion_ids = kept
            sequence = self.after(sequence, image_ids, motion_ids)
            keyframe = resize_image(keyframe, settings.size)
            latents, frames = self.decode_clip(keyframe, self.motion_of(motion_ids, settings.size), settings, noise)
            before = ClipResult(
                index=index,
                image_ids=tuple(image_ids),
                motion_ids=tuple(motion_ids),
                keyframe=keyframe,
                latents=latents,
                frames=frames,
            )
            yield before

    def reconstruct(self, request: ReconstructionRequest, noise: Noise) -> ClipResult:
        """Key frame and motion of a video -> the video again, from raw motion or through its tokens (§9.4, §12.7)."""
        settings = self.settings(request)
        motion_ids: list[int] = []
        if settings.through_tokens:
            motion_ids = self.motion_ids(settings.motion * np.float32(MOTION_SCALE))
            motion = self.motion_of(motion_ids, settings.size)
        else:
            motion = self.motion_input(settings.motion, _latent_size(settings.size))
        keyframe = resize_image(settings.keyframe, settings.size)
        latents, frames = self.decode_clip(keyframe, motion, settings, noise)
        return ClipResult(
            index=0, image_ids=(), motion_ids=tuple(motion_ids), keyframe=keyframe, latents=latents, frames=frames
        )

    def answer(self, request: AnswerRequest, noise: Noise) -> AnswerResult:
        """A question about a picture, a video, or nothing -> text (§13)."""
        settings = self.settings(request)
        vocabulary = self.config.vocabulary
        rules = Rules(
            allowed=vocabulary.text_ranges,
            end=EOS,
            least=settings.min_answer_tokens,
            most=settings.max_answer_tokens,
            sampling=_sampling(settings),
        )

        def enough(ids: list[int]) -> bool:
            return STOP in self.tokenizer.decode(ids)

        reader = self.for_task(UNDERSTANDING)
        ids = write(reader.module("language_model"), reader.question(settings, noise), rules, noise, stop=enough)
        return AnswerResult(ids=tuple(ids), text=answer_text(self.tokenizer.decode(ids)))

    # Stages: tokens

    def picture_ids(self, picture: np.ndarray, noise: Noise) -> list[int]:
        """Visual ids of `picture` [H, W, 3] uint8, without markers (§6.5)."""
        (ids,) = self.kept_ids((picture,), noise)
        if not ids:
            raise MediaError(_EMPTY)
        return ids

    @torch.inference_mode()
    def kept_ids(self, pictures: Sequence[np.ndarray], noise: Noise) -> list[list[int]]:
        """Visual ids of each of `pictures`, without markers; none of one that keeps no patch."""
        features, keep = self.look(pictures, noise)
        tokenizer = self.module("visual_tokenizer")
        codes = tokenizer.codes(tokenizer.merge(features, keep)) + self.config.vocabulary.first_visual  # [B, N]
        return [row[kept].tolist() for row, kept in zip(codes, keep > 0, strict=True)]

    @torch.inference_mode()
    def look(self, pictures: Sequence[np.ndarray], noise: Noise) -> tuple[Tensor, Tensor]:
        """Features [B, N, W] and keep decision [B, N] of uint8 pictures."""
        tokenizer = self.module("visual_tokenizer")
        features = tokenizer.features(self.pixels(pictures))
        logits = tokenizer.keep_logits(features)  # [B, N, 2]
        gumbel = self.tensor(noise.gumbel(*logits.shape))
        keep = (logits + gumbel).argmax(dim=-1) == 0  # [B, N]
        return features, keep.to(features.dtype)

    def pixels(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """uint8 pictures -> input of the visual tokenizer [B, 3, S, S] (§11.5)."""
        side = self.config.geometry.image_size
        return self.tensor(np.stack([tokenizer_pixels(picture, side) for picture in pictures]))

    def write_clips(
        self, prompt: list[int], image_ids: list[int] | None, settings: Resolved, noise: Noise
    ) -> list[Written]:
        """The candidates: image ids after `prompt`, written unless they are given, and the motion ids that follow.

        Motion follows the likeliest of written pictures alone where not all are kept (`VideoRequest.kept_pictures`).
        """
        if image_ids is None:
            images = [self.write_image_ids(prompt, settings, source) for source in _sources(settings.candidates, noise)]
            if settings.kept_pictures:
                best = self.likeliest([(ids, None) for ids in images], settings.kept_pictures, settings)
                images = [best[index % len(best)][0] for index in range(settings.candidates)]
        else:
            images = [image_ids] * settings.candidates
        motions = [
            self.write_motion_ids(self.after(prompt, ids), settings, source)
            for ids, source in zip(images, _sources(settings.candidates, noise), strict=True)
        ]
        return list(zip(images, motions, strict=True))

    def likeliest(self, candidates: Sequence[Written], count: int, settings: Resolved) -> list[Written]:
        """At most `count` candidates of different pictures, by how likely the prompt is; one alone unjudged."""
        if len(candidates) == 1:
            return list(candidates)
        judged = [(self.likelihood(settings, *one), one) for one in candidates]
        ranked = [one for nats, one in sorted(judged, key=lambda pair: -pair[0]) if nats > -np.inf]
        best: dict[tuple[int, ...], Written] = {}  # by picture
        for one in ranked or candidates[:1]:
            best.setdefault(tuple(one[0]), one)
        return list(best.values())[:count]

    def best_drawn(
        self,
        candidates: Sequence[Written],
        size: tuple[int, int],
        settings: Resolved,
        noise: Noise,
        last_frame: np.ndarray | None = None,
    ) -> tuple[Written, np.ndarray, np.ndarray]:
        """The candidate that is kept, its latents [4, h, w] and picture [H, W, 3] (`ImageRequest.finalists`)."""
        finalists = self.likeliest(candidates, settings.finalists, settings)
        sources = [noise] if len(finalists) == 1 else noise.spawn(len(finalists) + 1)
        # Of several sources the last is for reading the pictures again.
        pairs = zip(finalists, sources, strict=False)
        drawn = [self.draw(ids, size, settings, source, last_frame) for (ids, _), source in pairs]
        if len(finalists) == 1:
            return finalists[0], *drawn[0]
        end = self.config.vocabulary.image_end
        read = zip(self.kept_ids([picture for _, picture in drawn], sources[-1]), finalists, strict=True)
        best = int(np.argmax([self.likelihood(settings, [*ids, end], motion) for ids, (_, motion) in read]))
        return finalists[best], *drawn[best]

    def draw(
        self,
        image_ids: list[int],
        size: tuple[int, int],
        settings: Resolved,
        noise: Noise,
        last_frame: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Latents [4, h, w] and picture [H, W, 3]; of a later clip from the `last_frame` before it (§12.4)."""
        if last_frame is None:
            return self.decode_keyframe(image_ids, size, settings, noise)
        level = int(settings.inverse_rate * settings.keyframe_steps)
        start = self.noise_last_frame(last_frame, level, settings, noise)
        return self.decode_keyframe(image_ids, size, settings, noise, start, level)

    def after(self, prompt: list[int], image_ids: list[int], motion_ids: list[int] | None = None) -> list[int]:
        """Ids of `prompt` and a picture or a clip, with the latter's markers."""
        vocabulary = self.config.vocabulary
        ids = _without_eos([*prompt, vocabulary.image_start, *image_ids])
        return ids if motion_ids is None else [*ids, vocabulary.motion_start, *motion_ids, vocabulary.motion_end]

    @torch.inference_mode()
    def likelihood(self, settings: Resolved, image_ids: list[int], motion_ids: list[int] | None = None) -> float:
        """Log-probability of the prompt and its end after a picture or a clip (`runtime.candidates`)."""
        if not len(self.config.vocabulary.visual_codes_of(image_ids)):
            return -np.inf
        seen, said = self.after([], image_ids, motion_ids), [*self.tokenizer.encode(settings.prompt), EOS]
        ids = torch.tensor([[*seen, *said]], device=self._device)  # [1, L]
        scores = self.module("language_model")(input_ids=ids[:, :-1], use_cache=False).logits[0, -len(said) :].double()
        return float(scores.log_softmax(dim=-1).gather(1, ids[0, -len(said) :, None]).sum())

    def write_image_ids(self, prompt: list[int], settings: Resolved, noise: Noise) -> list[int]:
        """Image ids after `prompt`, image_end included when it was written (§10.2)."""
        vocabulary = self.config.vocabulary
        rules = Rules(
            allowed=vocabulary.image_ranges,
            end=vocabulary.image_end,
            least=settings.min_image_tokens,
            most=settings.max_image_tokens,
            guidance=settings.text_guidance,
            sampling=_sampling(settings),
        )
        return _without_eos(self.write([*prompt, vocabulary.image_start], rules, noise))

    def write_motion_ids(self, prompt: list[int], settings: Resolved, noise: Noise) -> list[int]:
        """Motion ids after `prompt`, exactly as many as a clip has (§10.3)."""
        vocabulary, tokens = self.config.vocabulary, self.config.geometry.motion_tokens
        rules = Rules(
            allowed=(range(vocabulary.first_motion, vocabulary.size),),
            end=vocabulary.motion_end,
            least=tokens,
            most=tokens,
            guidance=settings.motion_guidance,
            sampling=_sampling(settings) if settings.sampled_motion else None,
        )
        return self.write([*prompt, vocabulary.motion_start], rules, noise)

    def write(self, prompt: list[int], rules: Rules, noise: Noise) -> list[int]:
        """New ids after the ids `prompt`."""
        ids = torch.tensor([prompt], device=self._device)  # [1, L]
        return write(self.module("language_model"), ids, rules, noise)

    @torch.inference_mode()
    def motion_ids(self, motion: np.ndarray) -> list[int]:
        """Motion ids of a macroblock grid [T, 2, rows, columns] in the tokenizer's scale (§11.3, §4)."""
        grid = self.motion_input(motion, self.config.geometry.motion_grid)
        codes = self.module("motion_tokenizer").encode(grid)[0]
        return (codes + self.config.vocabulary.first_motion).tolist()

    def motion_input(self, motion: np.ndarray, size: tuple[int, int]) -> Tensor:
        """Macroblock grid [T, 2, rows, columns] -> model input [1, 2, T, h, w] of `size` (h, w) (§11.3)."""
        return self.tensor(model_motion(motion, size))[None]

    # Stages: understanding

    @torch.inference_mode()
    def question(self, settings: Resolved, noise: Noise) -> Tensor:
        """Embeddings [1, L, D] of the whole prompt, pictures and motion in their place (§13.1, §13.2)."""
        if not settings.pictures:
            return self.embed(question_ids(self.tokenizer, settings.question)[0])[None]
        head, tail = question_ids(self.tokenizer, settings.question, "image" if settings.motions is None else "video")
        motions: Sequence[np.ndarray | None] = settings.motions or [None] * len(settings.pictures)
        vocabulary = self.config.vocabulary
        parts = [self.embed(head)]
        for picture, motion in zip(self.see(settings.pictures, noise), motions, strict=True):
            parts += [self.embed([vocabulary.image_start]), picture, self.embed([vocabulary.image_end])]
            if motion is not None:
                parts.append(self.embed([vocabulary.motion_start, *self.motion_ids(motion), vocabulary.motion_end]))
        return torch.cat([*parts, self.embed(tail)])[None]

    @torch.inference_mode()
    def see(self, pictures: Sequence[np.ndarray], noise: Noise) -> list[Tensor]:
        """Embeddings [n, D] of the kept tokens of each picture; nothing is quantised (§6.5)."""
        features, keep = self.look(pictures, noise)
        if not keep.any(dim=1).all():
            raise MediaError(_EMPTY)
        tokenizer = self.module("visual_tokenizer")
        embeds = tokenizer.embeds(tokenizer.merge(features, keep))  # [B, N, D]
        return [row[kept] for row, kept in zip(embeds, keep > 0, strict=True)]

    def embed(self, ids: list[int]) -> Tensor:
        """Token embeddings [n, D]."""
        return self.module("language_model").get_input_embeddings()(torch.tensor(ids, device=self._device))

    # Stages: pixels

    @torch.inference_mode()
    def decode_keyframe(
        self,
        image_ids: list[int],
        size: tuple[int, int],
        settings: Resolved,
        noise: Noise,
        start: Tensor | None = None,
        level: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Latents [4, h, w] and picture [H, W, 3] uint8 of image ids (§7, §8.1).

        Raises UsageError when there is no visual code among the ids.
        """
        codes, counts = pad_codes(
            [self.config.vocabulary.visual_codes_of(image_ids).tolist()], self.config.geometry.patches
        )
        vectors = self.module("visual_tokenizer").quantize.lookup(codes.to(self._device))
        prompt, pooled = self.module("keyframe_decoder")(vectors, counts.to(self._device))
        for latents in keyframes.denoise(
            self.module("keyframe_unet"),
            self.config.keyframe_scheduler,
            prompt,
            pooled,
            keyframes.size_ids(size, prompt),
            size=size,
            steps=settings.keyframe_steps,
            guidance=settings.image_guidance,
            noise=noise,
            options=keyframe_schedule(settings),
            interval=settings.image_guidance_interval,
            start=start,
            level=level,
        ):
            last = latents
        picture = keyframes.decode(self.module("keyframe_vae"), last)
        return _array(last[0]), to_uint8(_array(picture[0]))

    @torch.inference_mode()
    def noise_last_frame(self, frame: np.ndarray, level: int, settings: Resolved, noise: Noise) -> Tensor:
        """Latents [1, 4, h, w] from which step `level` of the next key frame starts (§8.3)."""
        picture = self.tensor(to_signed(resize_image(frame, settings.keyframe_size)))[None]
        clean = keyframes.encode(self.module("keyframe_vae"), picture)
        steps, scheduler = settings.keyframe_steps, self.config.keyframe_scheduler
        options = keyframe_schedule(settings)
        return keyframes.noised(clean, scheduler, steps=steps, level=level, noise=noise, options=options)

    @torch.inference_mode()
    def motion_of(self, motion_ids: list[int], size: tuple[int, int]) -> Tensor:
        """Motion [1, 2, T, h, w] at the latent size of `size` (width, height), detokenizer's scale (§12.5, §4.5)."""
        codes = self.config.vocabulary.motion_codes_of(motion_ids, self.config.geometry.motion_tokens)
        ids = torch.from_numpy(codes)[None].to(self._device)
        return self.module("motion_tokenizer").reconstruct_from_codes(ids, *_latent_size(size))

    @torch.inference_mode()
    def decode_clip(
        self, keyframe: np.ndarray, motion: Tensor, settings: Resolved, noise: Noise
    ) -> tuple[np.ndarray, np.ndarray]:
        """Latents [T, 4, h, w] and frames [T, H, W, 3] uint8 of a key frame [H, W, 3] and its motion (§9.4)."""
        vae = self.module("video_vae")
        strength = settings.noise_augmentation
        picture = clips.augment(self.tensor(to_signed(keyframe))[None], strength, noise)
        time_ids = self.tensor(np.array([[self.config.geometry.fps, settings.motion_bucket, strength]], np.float32))
        for latents in clips.denoise(
            self.module("video_unet"),
            self.config.video_scheduler,
            clips.encode(vae, picture),
            motion,
            self.module("motion_encoder").encode(motion),
            time_ids,
            steps=settings.video_steps,
            guidance=settings.video_guidance,
            noise=noise,
            options=video_schedule(settings),
            interval=settings.video_guidance_interval,
            start=self._moved(keyframe, motion, settings) if settings.video_start == "motion" else None,
        ):
            last = latents
        frames = clips.decode(vae, last, self.config.defaults.decode_chunk)
        return _array(last[0]), to_uint8(_array(frames[0]))

    def _moved(self, keyframe: np.ndarray, motion: Tensor, settings: Resolved) -> Tensor:
        """Scaled latents [1, T, 4, h, w] of a key frame moved along its motion [1, 2, T, h, w]."""
        moved = compensated(keyframe, _array(motion[0]), tokenized=from_tokens(settings))
        pixels = self.tensor(np.stack([to_signed(frame) for frame in moved]))  # [T, 3, H, W]
        vae = self.module("video_vae")
        return clips.encode(vae, pixels)[None] * vae.config.scaling_factor

    # Help

    def for_task(self, task: str) -> Reference:
        """This object with the components that `task` has of its own in place of the common ones."""
        seen = copy.copy(self)
        seen._task = task
        return seen

    def settings(self, request: Request) -> Resolved:
        """`request` with the model's defaults filled in. Raises UsageError."""
        return resolve(request, self.config.geometry, self.config.defaults)

    def module(self, name: str) -> Any:
        """Component `name` where it computes."""
        held = self._components
        own = for_task(name, self._task) if self._task else name
        names = held.components if isinstance(held, Checkpoint) else held
        name = own if own in names else name
        component = held.component(name) if isinstance(held, Checkpoint) else held[name]
        first = next(component.parameters())
        if (first.device, first.dtype) != (
            self._device,
            self._dtype,
        ):  # diffusers warns about every cast, needed or not
            component.to(self._device, self._dtype)
        return component

    def tensor(self, array: np.ndarray) -> Tensor:
        """`array` where the modules compute."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, self._dtype)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def _latent_size(size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the latents of a (width, height) in pixels."""
    width, height = size
    return height // VAE_FACTOR, width // VAE_FACTOR


def _sampling(settings: Resolved) -> tuple[float, int, float] | None:
    return None if settings.greedy else (settings.temperature, settings.top_k, settings.top_p)


def _sources(count: int, noise: Noise) -> list[Noise]:
    """Noise for each of `count` tries; that of a single one is `noise` itself."""
    return [noise] if count == 1 else noise.spawn(count)


def _without_eos(ids: list[int]) -> list[int]:
    """The official pipeline cuts this id out wherever it stands, also from the prompt of the next call (Q10)."""
    return [i for i in ids if i != EOS]
