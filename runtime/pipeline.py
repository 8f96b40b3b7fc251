"""The tasks: generate a video or a picture, animate, extend, reconstruct, answer.

Contract: a `Pipeline` turns a request (`runtime.requests`) and a `Noise` into a result, the same one the torch
reference gives for the same request and noise. Generation is an iterator: a clip is yielded when it is ready.
Engines load when a stage first needs them; `seconds`, `reached` and `peak_rss` tell what a run cost. The language
model goes on from what it read last: from phase to phase, clip to clip, question to question and sample to sample.

Where it departs from the reference (numbers: reference semantics §14): motion is written as exactly the number of
codes the geometry asks for; quirks 4, 5, 6, 7, 9, 16 and 19 are fixed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from runtime import positions, prompts
from runtime.bundle import Bundle
from runtime.candidates import batched
from runtime.decoder import DecodingOptions, collect, text_phase
from runtime.detokenizers import (
    KeyframeDetokenizer,
    KeyframeSettings,
    Reinjection,
    VideoDetokenizer,
    VideoSettings,
    check_schedules,
)
from runtime.engines import EngineSet
from runtime.errors import UsageError
from runtime.geometry import VAE_FACTOR
from runtime.images import resize_image
from runtime.media_tokens import MotionTokenizer, VisualTokenizer
from runtime.memory import peak_rss
from runtime.motion.grid import TOKENIZER_SCALE, model_motion
from runtime.noise import Noise
from runtime.progress import Observer, Stopwatch, ignore
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
    resolve,
)
from runtime.residency import MemoryPlan
from runtime.stages import stages_of
from runtime.token_writer import GENERATE, TokenWriter, Written
from runtime.tokenizers import TextTokenizer

UNDERSTAND = "understanding"
QUESTION_ROOM = 128  # positions left free for questions longer than the first about the same media


class Pipeline:
    """All tasks over one bundle.

    Args:
        bundle: an opened bundle, or the folder or name of one.
        memory_budget: bytes of engines to keep loaded at once; None keeps all.
        threads: CPU threads; None takes all cores.
        provider: ONNX Runtime provider, `cpu` or `cuda`.
        observer: called with `Progress`.

    Raises:
        BundleError: the bundle is damaged or does not fit this machine.
        EnvironmentProblem: the backend or provider is not installed.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str,
        *,
        memory_budget: int | None = None,
        threads: int | None = None,
        provider: str = "cpu",
        observer: Observer = ignore,
    ) -> None:
        if not isinstance(bundle, Bundle):
            from runtime.bundle import find

            bundle = Bundle.open(find(str(bundle)))
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._geometry = bundle.manifest.geometry
        self._vocabulary = bundle.manifest.vocabulary
        self._defaults = bundle.manifest.defaults
        self._observer = observer
        self._watch = Stopwatch()
        self._engines = EngineSet(bundle, memory_budget=memory_budget, threads=threads, provider=provider)
        self._text = TextTokenizer(bundle.file(bundle.manifest.tokenizer))
        self._writer = TokenWriter(self._engines, self.manifest, observer, self._watch)
        self._keyframes = KeyframeDetokenizer(self._engines, self.manifest, observer, self._watch)
        self._videos = VideoDetokenizer(self._engines, self.manifest, observer, self._watch)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free every engine."""
        self._engines.close()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent per stage since the pipeline was opened."""
        return dict(self._watch.seconds)

    @property
    def reached(self) -> dict[str, float]:
        """Seconds from the beginning of the last task to its `first token` and, of a video, its `first frame`."""
        return dict(self._watch.reached)

    @property
    def peak_rss(self) -> int:
        """Largest resident memory of this process so far, bytes."""
        return peak_rss()

    @property
    def stage_peaks(self) -> dict[str, int]:
        """Largest resident memory of this process during each stage, bytes."""
        return dict(self._watch.peaks)

    @property
    def engine_bytes(self) -> dict[str, int]:
        """Memory of every engine loaded so far, as measured or estimated, bytes; the unit of the memory budget."""
        sizes = self._engines.sizes
        return {load.name: sizes[load.name] for load in self._engines.loads}

    def memory_plan(self, request: Request) -> MemoryPlan:
        """What running a request will load and release. Raises UsageError."""
        return self._expect(resolve(request, self._geometry, self._defaults))

    # --- tasks -----------------------------------------------------------------------------------------------

    def generate_image(self, request: ImageRequest, noise: Noise) -> ImageResult:
        """Text, a picture, or both -> one picture (reference semantics §12.1, §12.6)."""
        self._watch.begin()
        settings = resolve(request, self._geometry, self._defaults)
        self._begin(settings)
        sequence = self._prompt_ids(settings.prompt)
        if settings.image is not None:
            # Here, and only here, a picture stands in the prompt without its markers (§12.6).
            sequence += self._picture_ids(settings.image, noise)[1:-1]
        candidates = [(ids, None) for ids in self._writer.images(sequence, settings, noise)]
        (ids, _), latents, image = self._best_drawn(candidates, settings, settings.size, noise)
        return ImageResult(ids=tuple(ids), latents=latents, image=image)

    def generate_video(self, request: VideoRequest, noise: Noise) -> Iterator[ClipResult]:
        """Text, a picture, or both -> clips, each yielded when ready (§12.2 to §12.4).

        Every clip has all its frames; of later clips the first frame repeats the previous clip's last one.
        """
        self._watch.begin()
        settings = resolve(request, self._geometry, self._defaults)
        self._begin(settings)
        size = settings.size
        prompt = sequence = self._prompt_ids(settings.prompt)
        positions.check_room(self.manifest, len(sequence), settings.clips)
        reserve = positions.reserve(self.manifest, len(sequence), settings)
        last_frame: np.ndarray | None = None
        for index in range(settings.clips):
            picture_given = index == 0 and settings.image is not None
            given = self._picture_ids(settings.image, noise)[1:] if picture_given else None
            candidates = self._writer.clips(prompt, sequence, given, settings, noise, reserve)
            if picture_given:
                (image_ids, motion_codes), keyframe = self._writer.likeliest(prompt, candidates, 1)[0], settings.image
            else:
                before = None if last_frame is None else Reinjection(frame=last_frame, rate=settings.inverse_rate)
                (image_ids, motion_codes), _, keyframe = self._best_drawn(
                    candidates, settings, settings.keyframe_size, noise, before
                )
            motion_span = self._vocabulary.motion_span(motion_codes)
            sequence = [*self._writer.with_image(sequence, image_ids), *motion_span]
            keyframe = resize_image(keyframe, size)
            motion = MotionTokenizer(self._engines, self._geometry, GENERATE).decode(
                motion_codes[None], _latent_size(size)
            )[0]
            latents, frames = self._videos.decode(keyframe, motion, VideoSettings.of(settings, self.manifest), noise)
            last_frame = frames[-1]
            self._watch.reach("first frame")
            yield ClipResult(
                index=index,
                image_ids=tuple(image_ids),
                motion_ids=tuple(motion_span[1:-1]),
                keyframe=keyframe,
                latents=latents,
                frames=frames,
            )

    def reconstruct(self, request: ReconstructionRequest, noise: Noise) -> ClipResult:
        """A key frame and the motion that followed it -> the clip again (§12.7), raw or through tokens (§9.4)."""
        settings = resolve(request, self._geometry, self._defaults)
        self._expect(settings)
        size = settings.size
        motion_ids: tuple[int, ...] = ()
        if settings.through_tokens:
            tokenizer = MotionTokenizer(self._engines, self._geometry, GENERATE)
            with self._watch.stage("motion tokens"):
                codes = tokenizer.encode([settings.motion * np.float32(TOKENIZER_SCALE)])
                motion = tokenizer.decode(codes, _latent_size(size))[0]
            motion_ids = tuple(self._vocabulary.motion_span(codes[0])[1:-1])
        else:
            motion = model_motion(settings.motion, _latent_size(size))
        keyframe = resize_image(settings.keyframe, size)
        latents, frames = self._videos.decode(keyframe, motion, VideoSettings.of(settings, self.manifest), noise)
        return ClipResult(
            index=0, image_ids=(), motion_ids=motion_ids, keyframe=keyframe, latents=latents, frames=frames
        )

    def answer(self, request: AnswerRequest, noise: Noise) -> AnswerResult:
        """A question about a picture, a video, or nothing -> text (§13)."""
        self._watch.begin()
        settings = resolve(request, self._geometry, self._defaults)
        self._expect(settings)
        return self._answer(settings, self._media_embeds(settings, noise), noise)

    def answers(
        self, request: AnswerRequest, questions: Iterable[str], noise: Noise
    ) -> Iterator[tuple[str, AnswerResult]]:
        """Each of `questions` with its answer, given when it is asked: the one `answer` would give it by itself.

        Pictures and motion of `request` are tokenised and read once; its own question is not asked. `noise` is left
        as it is.
        """
        media: np.ndarray | None = None
        for question in questions:
            self._watch.begin()
            settings = resolve(replace(request, question=question), self._geometry, self._defaults)
            if media is None:
                self._expect(settings)
                noise = copy.deepcopy(noise)
                media = self._media_embeds(settings, noise)
            yield question, self._answer(settings, media, copy.deepcopy(noise))

    def _answer(self, settings: Resolved, media: np.ndarray, noise: Noise) -> AnswerResult:
        """One answer about `media` [n, D], empty when there is none."""
        kind: Literal["image", "video"] | None = None
        if settings.pictures:
            kind = "image" if settings.motions is None else "video"
        before, after = prompts.question_ids(self._text, settings.question, kind)
        parts = [self._writer.embed([before], UNDERSTAND)[0], media]
        if after:
            parts.append(self._writer.embed([after], UNDERSTAND)[0])
        options = DecodingOptions(
            max_new=settings.max_answer_tokens,
            min_new=min(settings.min_answer_tokens, settings.max_answer_tokens),
            guidance=1.0,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            greedy=settings.greedy,
        )
        with self._watch.stage("answer"):
            phase = text_phase(self._vocabulary)
            context = np.concatenate(parts)
            reserve = len(context) + options.max_new + QUESTION_ROOM
            steps = self._writer.steps([context], phase, options, noise, "answer", UNDERSTAND, self._answered, reserve)
            ids = collect(steps)[0].tolist()
        return AnswerResult(ids=tuple(ids), text=prompts.answer_text(self._text.decode(ids)))

    # --- language model --------------------------------------------------------------------------------------

    def _prompt_ids(self, prompt: str | None) -> list[int]:
        return [] if prompt is None else self._text.encode(prompt)

    def _answered(self, ids: np.ndarray) -> bool:
        """Whether the literal separator that ends an answer was written (§13.3)."""
        return prompts.STOP in self._text.decode(ids.tolist())

    def _picture_ids(self, picture: np.ndarray, noise: Noise) -> list[int]:
        """A picture as it stands in a prompt: image_start, visual ids, image_end."""
        with self._watch.stage("visual tokens"):
            tokens = VisualTokenizer(self._engines, self._geometry, GENERATE).encode([picture], noise)[0]
        return self._vocabulary.image_span(tokens.codes)

    def _media_embeds(self, settings: Resolved, noise: Noise) -> np.ndarray:
        """Pictures and motion of a question as embeddings [n, D] (§13.2); n is 0 when there are none."""
        if not settings.pictures:
            return np.zeros((0, self.manifest.language_model.hidden_size), np.float32)
        with self._watch.stage("visual tokens"):
            pictures = VisualTokenizer(self._engines, self._geometry, UNDERSTAND).encode(settings.pictures, noise)
        vocabulary = self._vocabulary
        parts: list[np.ndarray] = []
        motion_codes: np.ndarray | None = None
        if settings.motions is not None:
            with self._watch.stage("motion tokens"):
                motion_codes = MotionTokenizer(self._engines, self._geometry, UNDERSTAND).encode(settings.motions)
        markers = self._writer.embed([[vocabulary.image_start, vocabulary.image_end]], UNDERSTAND)[0]
        for index, picture in enumerate(pictures):
            parts += [markers[:1], picture.embeds, markers[1:]]
            if motion_codes is not None:
                parts.append(self._writer.embed([vocabulary.motion_span(motion_codes[index])], UNDERSTAND)[0])
        return np.concatenate(parts)

    # --- choosing --------------------------------------------------------------------------------------------

    def _best_drawn(
        self,
        candidates: Sequence[Written],
        settings: Resolved,
        size: tuple[int, int],
        noise: Noise,
        before: Reinjection | None = None,
    ) -> tuple[Written, np.ndarray, np.ndarray]:
        """The candidate that is kept, and latents [4, h, w] and picture [H, W, 3] of its key frame.

        What is drawn may not be what its tokens were read as, so of several finalists the drawn pictures decide.
        """
        prompt = self._prompt_ids(settings.prompt)
        finalists = self._writer.likeliest(prompt, candidates, settings.finalists)
        *sources, reading = [noise, noise] if len(finalists) == 1 else noise.spawn(len(finalists) + 1)
        codes = [self._codes(ids) for ids, _ in finalists]
        drawn = self._keyframes.decode_each(codes, KeyframeSettings.of(settings, size), sources, before)
        best = 0
        if len(finalists) > 1:
            seen = self._drawn_ids([picture for _, picture in drawn], reading)
            read = [(ids[1:], motion) for ids, (_, motion) in zip(seen, finalists, strict=True)]
            best = int(np.argmax(self._writer.likelihoods(prompt, read)))
        return finalists[best], *drawn[best]

    def _drawn_ids(self, pictures: Sequence[np.ndarray], noise: Noise) -> list[list[int]]:
        """Pictures [H, W, 3] as they stand in a prompt, without a visual id where nothing of one was kept."""
        tokenizer = VisualTokenizer(self._engines, self._geometry, GENERATE)
        with self._watch.stage("visual tokens"):
            parts = batched(pictures, self._defaults.max_clips)
            return [self._vocabulary.image_span(one.codes) for part in parts for one in tokenizer.kept(part, noise)]

    # --- settings --------------------------------------------------------------------------------------------

    def _codes(self, image_ids: list[int]) -> np.ndarray:
        codes = self._vocabulary.visual_codes_of(image_ids)
        if not len(codes):
            raise UsageError("the language model wrote an image without a single visual token; try another --seed")
        return codes

    def _begin(self, settings: Resolved) -> None:
        """A resolved request for pictures is about to run. Raises UsageError for a schedule that does not fit."""
        check_schedules(self.manifest, settings)
        self._expect(settings)

    def _expect(self, settings: Resolved) -> MemoryPlan:
        """Tell the engines which of them a resolved request needs, and when."""
        task = UNDERSTAND if isinstance(settings, AnswerRequest) else GENERATE
        return self._engines.expect(stages_of(settings), task)


def _latent_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in pixels -> (h, w) in latent cells."""
    return size[1] // VAE_FACTOR, size[0] // VAE_FACTOR
