"""Golden call traces of whole tasks (m): which stage runs when, and with what (reference semantics §12).

Contract: a trace is a JSON file of runs of the reference with every heavy stage replaced by a stub. Ours run the same
requests with the same stubs, and both sides are brought to one form, a list of calls, whose entries are compared. Where
we depart from the reference on purpose it does not show here: motion is written to an exact number of codes, so the
clip of a trace is given as many as its stub writes, and bounds on their number are not compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from export.fidelity.backends import Engines
from export.fidelity.golden import Golden
from export.fidelity.language import TOKENIZER
from export.fidelity.measure import Measurement, equal
from runtime.decoder import DecodingOptions
from runtime.detokenizers import KeyframeSettings, Reinjection, VideoSettings
from runtime.errors import CheckpointError, UsageError
from runtime.geometry import Geometry
from runtime.noise import Noise
from runtime.pipeline import Pipeline
from runtime.progress import Stopwatch, ignore
from runtime.requests import ImageRequest, VideoRequest
from runtime.settings import LanguageModelShape
from runtime.token_writer import TokenWriter
from runtime.tokenizers import TextTokenizer
from runtime.vocabulary import Vocabulary
from videolavit.config import ModelConfig
from videolavit.reference import Reference
from videolavit.reference.tokens import Rules

COMPONENT = "call traces"
VOCABULARY = Vocabulary()
MODEL = ModelConfig(name="video-lavit-7b")
NEW_IMAGE_TOKENS = {"generate_image": 200, "multimodal_synthesis": 200}  # the reference's own bounds (§12.1); else 500
Call = dict[str, Any]


def read_meta(path: Path) -> dict[str, Any]:
    """What a trace file says about itself. Raises CheckpointError when it is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not a file of call traces ({error!r})") from error
    runs = content if isinstance(content, dict) else {}
    traces = {name: run for name, run in runs.items() if isinstance(run, dict) and "calls" in run}
    return {"component": COMPONENT if traces else "", "traces": traces}


def load(path: Path) -> Golden:
    """A file of traces as a case without arrays."""
    return Golden(path, read_meta(path), {}, {}, {})


def reference(golden: Golden, engines: Engines) -> Iterator[Measurement]:
    """The torch reference's tasks."""
    yield from _measure(golden, _Reference)


def runtime(golden: Golden) -> Iterator[Measurement]:
    """The runtime's tasks."""
    yield from _measure(golden, _Pipeline)


@dataclass
class _Trace:
    """A recorded run: what was asked, what its stubs gave, and what ours has called so far."""

    name: str
    run: dict[str, Any]
    tokenizer: TextTokenizer
    calls: list[Call] = field(default_factory=list)
    keyframes: int = 0
    clips: int = 0

    def __post_init__(self) -> None:
        self.written: Iterator[list[int]] = iter(
            [c["returned_pure"][0] for c in self.run["calls"] if "returned_pure" in c]
        )

    @property
    def geometry(self) -> Geometry:
        """Official sizes, with as many motion tokens as the stub of this run writes."""
        motion = [c["returned_pure"][0] for c in self.run["calls"] if c["call"] == "generate_motion_tokenids"]
        tokens = len(VOCABULARY.motion_codes_of(motion[0], len(motion[0]) - 1)) if motion else 1
        geometry = MODEL.geometry
        stride = (geometry.frames, *geometry.motion_stride[1:])
        return msgspec.structs.replace(
            geometry, motion_grid=(geometry.motion_stride[1], geometry.motion_stride[2] * tokens), motion_stride=stride
        )

    @property
    def picture_codes(self) -> np.ndarray:
        """Codes the stub of the visual tokenizer gave: those in the first prompt that has any."""
        prompts = [c["prompt_ids"][0] for c in self.run["calls"] if "prompt_ids" in c]
        return VOCABULARY.visual_codes_of(prompts[0])

    def keyframe(self, size: tuple[int, int]) -> np.ndarray:
        self.keyframes += 1
        return np.full((size[1], size[0], 3), (10 * self.keyframes, 0, 0), np.uint8)

    def frames(self) -> np.ndarray:
        self.clips += 1
        frames = np.zeros((MODEL.geometry.frames, 1, 1, 3), np.uint8)
        frames[:, 0, 0] = [(200, self.clips, index) for index in range(len(frames))]
        return frames

    def add(self, call: str, **values: Any) -> None:
        self.calls.append({"call": call, **values})


def _measure(golden: Golden, runner: Any) -> Iterator[Measurement]:
    tokenizer = TextTokenizer(golden.path.with_name(TOKENIZER))
    for name, run in golden.meta["traces"].items():
        trace = _Trace(name, run, tokenizer)
        request = _request(trace)
        tasks = runner(trace)
        if isinstance(request, ImageRequest):
            results = [tasks.generate_image(request, Noise(0))]
        else:
            results = list(tasks.generate_video(request, Noise(0)))
        expected = [_normal(call) for call in run["calls"]]
        yield equal("order of stages", [c["call"] for c in trace.calls], [c["call"] for c in expected])
        differing = [
            f"{ours} not {theirs}" for ours, theirs in zip(trace.calls, expected, strict=False) if ours != theirs
        ]
        yield Measurement("what every stage is given", len(differing), 0, unit="calls")
        if "frame_pixel0" in run:
            pixels = np.concatenate([result.frames[:, 0, 0] for result in results])
            yield equal("frames of the result", pixels, run["frame_pixel0"][0])


def _normal(call: Call) -> Call:
    """A recorded call in the form both sides are compared in."""
    kind = call["call"]
    if kind == "visual_tokenizer.tokenize_image":
        return {"call": "picture", "shape": tuple(call["shape"])}
    if kind in ("generate_image_tokenids", "generate_motion_tokenids"):
        sampling = (call["temperature"], call["top_k"], call["top_p"]) if call["use_nucleus_sampling"] else None
        values = {"prompt": list(call["prompt_ids"][0]), "guidance": call["guidance_scale"], "sampling": sampling}
        if kind == "generate_motion_tokenids":
            return {"call": "motion ids", **values}
        return {"call": "image ids", **values, "bounds": (call["min_new_tokens"], call["max_new_tokens"])}
    size = (call["width"], call["height"])
    if kind == "regenerate_noise":
        pixel = tuple(call["last_frame_pixel0"][0])
        return {"call": "noise", "pixel": pixel, "level": call["noise_level"], "size": size}
    if kind == "image_decoding":
        return {
            "call": "keyframe",
            "codes": VOCABULARY.visual_codes_of(call["image_tokens"][0]).tolist(),
            "size": size,
            "steps": call["num_inference_steps"],
            "guidance": call["guidance_scale_for_decoder"],
            "level": call["noise_level"],
        }
    ids = call["motion_tokens"][0]
    return {
        "call": "clip",
        "keyframe": (tuple(call["key_frame_sizes_wh"][0]), tuple(call["key_frame_pixel0"][0])),
        "codes": VOCABULARY.motion_codes_of(ids, len(ids) - 1).tolist(),
        "size": size,
        "noise": call["noise_aug_strength"],
    }


def _request(trace: _Trace) -> VideoRequest | ImageRequest:
    """The recorded call as one of our requests. Raises UsageError for one that cannot be put as such."""
    run, kwargs = trace.run, trace.run["kwargs"]
    prompt, image = _items(trace)
    shared: dict[str, Any] = {
        "prompt": prompt,
        "image": image,
        "keyframe_steps": kwargs.get("num_inference_steps"),
        "text_guidance": kwargs.get("guidance_scale_for_llm"),
        "image_guidance": kwargs.get("guidance_scale_for_decoder"),
        "top_k": kwargs.get("top_k"),
        "top_p": kwargs.get("top_p"),
        "temperature": kwargs.get("temperature"),
        "max_image_tokens": kwargs.get("max_new_tokens", NEW_IMAGE_TOKENS.get(run["method"])),
    }
    if run["method"] in NEW_IMAGE_TOKENS:
        return ImageRequest(**shared, size=(kwargs["width"], kwargs["height"]))
    return VideoRequest(
        **shared,
        size=(kwargs["video_width"], kwargs["video_height"]),
        keyframe_size=(kwargs.get("width", 1024), kwargs.get("height", 1024)),
        clips=kwargs.get("clip_num", 1),
        inverse_rate=kwargs.get("inverse_rate"),
    )


def _items(trace: _Trace) -> tuple[str | None, np.ndarray | None]:
    """Text and picture a run starts from; the picture's pixels are those its key frame is known by."""
    given = trace.run["args"][0]
    items = [(given, "text")] if isinstance(given, str) else [tuple(item) for item in given]
    kinds = [kind for _, kind in items]
    if kinds not in (["text"], ["image"], ["text", "image"]):
        raise UsageError(f"trace {trace.name}: items {kinds}; one text, one picture, or both in this order are known")
    prompt = next((item for item, kind in items if kind == "text"), None)
    if "image" not in kinds:
        return prompt, None
    width, height = re.search(r"(\d+)x(\d+)", items[-1][0]).groups()  # type: ignore[union-attr]
    clips = [call for call in trace.run["calls"] if call["call"] == "video_decoding"]
    pixel = clips[0]["key_frame_pixel0"][0] if clips else (0, 0, 0)
    return prompt, np.full((int(height), int(width), 3), pixel, np.uint8)


class _Reference(Reference):
    """The torch reference with every heavy stage replaced by what the recorded run's stage gave."""

    def __init__(self, trace: _Trace) -> None:
        super().__init__({}, replace(MODEL, geometry=trace.geometry), trace.tokenizer)
        self._trace = trace

    def picture_ids(self, picture: np.ndarray, noise: Noise) -> list[int]:
        self._trace.add("picture", shape=tuple(self.pixels([picture]).shape))
        return (self._trace.picture_codes + VOCABULARY.first_visual).tolist()

    def write(self, prompt: list[int], rules: Rules, noise: Noise) -> list[int]:
        values = {"prompt": prompt[:-1], "guidance": rules.guidance, "sampling": rules.sampling}
        ids = next(self._trace.written)
        if rules.end == VOCABULARY.motion_end:
            self._trace.add("motion ids", **values)
            return ids[:-1]  # ours appends the marker
        self._trace.add("image ids", **values, bounds=(rules.least, rules.most))
        return ids

    def motion_of(self, motion_ids: list[int], size: tuple[int, int]) -> Any:
        return motion_ids

    def noise_last_frame(self, frame: np.ndarray, level: int, settings: Any, noise: Noise) -> Any:
        self._trace.add("noise", pixel=tuple(frame[0, 0].tolist()), level=level, size=settings.keyframe_size)
        return None

    def decode_keyframe(
        self, image_ids: list[int], size: Any, settings: Any, noise: Noise, start: Any = None, level: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        codes = VOCABULARY.visual_codes_of(image_ids).tolist()
        _keyframe_call(self._trace, codes, size, settings.keyframe_steps, settings.image_guidance, level)
        return np.zeros(0), self._trace.keyframe(size)

    def decode_clip(
        self, keyframe: np.ndarray, motion: Any, settings: Any, noise: Noise
    ) -> tuple[np.ndarray, np.ndarray]:
        codes = VOCABULARY.motion_codes_of(motion, len(motion)).tolist()
        _clip_call(self._trace, keyframe, codes, settings.size, settings.noise_augmentation)
        return np.zeros(0), self._trace.frames()


class _Writer(TokenWriter):
    """Writes what the stubs of a recorded run gave. Embeddings are the ids themselves, so that they can be read."""

    def __init__(self, trace: _Trace, *given: Any) -> None:
        super().__init__(*given)
        self._trace = trace

    def embed(self, ids: Sequence[Sequence[int]] | np.ndarray, task: str = "") -> np.ndarray:
        return np.asarray(ids)[..., None]

    def steps(
        self, contexts: Sequence[np.ndarray], phase: Any, options: DecodingOptions, *rest: Any, **named: Any
    ) -> Any:
        sampling = None if options.greedy else (options.temperature, options.top_k, options.top_p)
        (context,) = contexts
        values = {"prompt": context[:, 0].tolist(), "guidance": options.guidance, "sampling": sampling}
        if phase.start == VOCABULARY.motion_start:
            self._trace.add("motion ids", **values)
        else:
            self._trace.add("image ids", **values, bounds=(options.min_new, options.max_new))
        for token in next(self._trace.written):
            yield SimpleNamespace(tokens=np.array([token]))


class _Pipeline(Pipeline):
    """The runtime's pipeline with its networks replaced by what the recorded run's stages gave."""

    def __init__(self, trace: _Trace) -> None:
        self._trace = trace
        manifest: Any = SimpleNamespace(
            language_model=LanguageModelShape(),
            geometry=trace.geometry,
            defaults=MODEL.defaults,
            keyframe_scheduler=MODEL.keyframe_scheduler,
            video_scheduler=MODEL.video_scheduler,
            vocabulary=VOCABULARY,
        )
        model = SimpleNamespace(most_rows=None)
        engines: Any = SimpleNamespace(get=self._engine, expect=lambda *stages: None, language_model=lambda task: model)
        self.manifest, self._engines = manifest, engines
        self._geometry, self._vocabulary, self._defaults = trace.geometry, VOCABULARY, MODEL.defaults
        self._observer, self._watch, self._text = ignore, Stopwatch(), trace.tokenizer
        self._writer = _Writer(trace, engines, manifest, ignore, self._watch)
        self._keyframes: Any = SimpleNamespace(decode_each=self._decode_keyframes)
        self._videos: Any = SimpleNamespace(decode=self._decode_clip)
        self._motion_codes: list[int] = []

    def _engine(self, name: str, task: str | None = None) -> Any:
        codes = self._trace.picture_codes

        def visual_encoder(pixels: np.ndarray) -> dict[str, np.ndarray]:
            self._trace.add("picture", shape=pixels.shape)
            keep = np.array([1e4, 0], np.float32)
            return {"features": np.zeros(0), "keep_logits": np.broadcast_to(keep, (1, len(codes), 2))}

        def visual_merger(features: np.ndarray, keep: np.ndarray) -> dict[str, np.ndarray]:
            return {"codes": codes[None], "embeds": np.zeros((1, len(codes), 1))}

        def motion_decoder(codes: np.ndarray) -> dict[str, np.ndarray]:
            self._motion_codes = codes[0].tolist()
            return {"motion": np.zeros((1, 2, self._geometry.frames, 4, 4), np.float32)}

        return {"visual_encoder": visual_encoder, "visual_merger": visual_merger, "motion_decoder": motion_decoder}[
            name
        ]

    def _decode_keyframes(
        self,
        codes: Sequence[np.ndarray],
        settings: KeyframeSettings,
        sources: Sequence[Noise],
        reinjection: Reinjection | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        (only,) = codes  # a recorded run has one candidate
        level = 0
        if reinjection is not None:
            level = int(reinjection.rate * settings.steps)
            pixel = tuple(reinjection.frame[0, 0].tolist())
            self._trace.add("noise", pixel=pixel, level=level, size=settings.size)
        _keyframe_call(self._trace, only.tolist(), settings.size, settings.steps, settings.guidance, level)
        return [(np.zeros(0), self._trace.keyframe(settings.size))]

    def _decode_clip(
        self, keyframe: np.ndarray, motion: np.ndarray, settings: VideoSettings, noise: Noise
    ) -> tuple[np.ndarray, np.ndarray]:
        _clip_call(self._trace, keyframe, self._motion_codes, settings.size, settings.noise_augmentation)
        return np.zeros(0), self._trace.frames()


def _keyframe_call(trace: _Trace, codes: list[int], size: Any, steps: int, guidance: float, level: int) -> None:
    trace.add("keyframe", codes=codes, size=tuple(size), steps=steps, guidance=guidance, level=level)


def _clip_call(trace: _Trace, keyframe: np.ndarray, codes: list[int], size: Any, noise: float) -> None:
    shown = (keyframe.shape[1::-1], tuple(keyframe[0, 0].tolist()))
    trace.add("clip", keyframe=shown, codes=codes, size=tuple(size), noise=noise)
