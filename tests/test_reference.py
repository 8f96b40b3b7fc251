"""The torch reference's tasks: answers of the original model, order of draws, whole runs of a small model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from golden import FOLDER, Golden, assert_close, load
from torch import Tensor
from torch_engines import golden_llama

from runtime.errors import MediaError, UsageError
from runtime.noise import Noise
from runtime.requests import AnswerRequest, ClipResult, ImageRequest, ReconstructionRequest, VideoRequest
from runtime.settings import SchedulerSettings
from runtime.tokenizers import TextTokenizer
from runtime.vocabulary import Vocabulary
from videolavit.checkpoints import Checkpoint, RandomWeights
from videolavit.config import PRESETS, EvaConfig, ModelConfig, MotionTokenizerConfig, VisualTokenizerConfig
from videolavit.models.components import build
from videolavit.reference import Reference

VOCABULARY = Vocabulary()
NO_NOISE: Any = None


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(FOLDER / "tiny_sp.model")


# --- Answers of the original model ----------------------------------------------------------------------------


class Understanding(Reference):
    """Takes pictures and motion as the recorded run does, already prepared."""

    def pixels(self, pictures: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(pictures))

    def motion_input(self, motion: np.ndarray, size: tuple[int, int]) -> Tensor:
        return torch.from_numpy(motion)[None]


class Decided:
    """Gumbel noise that leaves no choice."""

    def __init__(self, keep: np.ndarray) -> None:
        self.keep = keep  # [B, N]

    def gumbel(self, *shape: int) -> np.ndarray:
        noise = np.where(self.keep[..., None] > 0, (1e4, 0), (0, 1e4)).astype(np.float32)
        assert noise.shape == shape
        return noise


@pytest.fixture(scope="module")
def understanding(tokenizer: TextTokenizer) -> tuple[Golden, Reference]:
    golden = load("j_understanding")
    eva = EvaConfig(image_size=56, patch_size=14, width=24, layers=2, heads=4, classes=6)
    config = ModelConfig(
        name="golden",
        visual_tokenizer=VisualTokenizerConfig(eva=eva, layers=1, heads=4, codes=16, code_dim=4, llm_dim=32),
        motion_tokenizer=MotionTokenizerConfig(dim=8, heads=2, codes=64, code_dim=6),
    )
    components: dict[str, Any] = {"language_model": golden_llama(golden)}
    for name in ("visual_tokenizer", "motion_tokenizer"):
        prefix = f"model.{name}."
        names = [key for key in golden.weights if key.startswith(prefix)]
        components[name] = build(config, name).eval()
        components[name].load_state_dict({k.removeprefix(prefix): torch.from_numpy(golden.weights[k]) for k in names})
    return golden, Understanding(components, config, tokenizer)


@pytest.mark.parametrize("case", ["image_row0", "image_row1", "video", "text"])
def test_answers(case: str, understanding: tuple[Golden, Reference]) -> None:
    golden, reference = understanding
    call = golden.meta["calls"][case]
    media: dict[str, Any] = {}
    if case == "video":
        media = {"pictures": tuple(golden.inputs["video/visual"]), "motions": tuple(golden.inputs["video/motion"])}
    elif case != "text":
        media = {"pictures": (golden.inputs["image/pixels"][int(case[-1])],)}
    request = AnswerRequest(question=call["texts"][0], max_answer_tokens=10, min_answer_tokens=4, **media)
    noise: Any = Decided(golden.inputs[f"{case}/hard_keep_decision"])
    if f"{case}/inputs_embeds" in golden.outputs:
        assert_close(reference.question(request, noise), golden.outputs[f"{case}/inputs_embeds"], 3e-5)
    if case == "video":
        first_motion = VOCABULARY.first_motion
        for motion, expected in zip(golden.inputs["video/motion"], golden.outputs["video/motion_tokens"], strict=True):
            assert [i - first_motion for i in reference.motion_ids(motion)] == (expected % first_motion).tolist()
    result = reference.answer(request, noise)
    assert list(result.ids) == golden.outputs[f"{case}/generated_ids"][0].tolist()
    assert result.text == call["output_text"][0]


def test_an_answer_ends_at_the_stop_string(understanding: tuple[Golden, Reference], monkeypatch: Any) -> None:
    golden, reference = understanding
    monkeypatch.setattr(reference, "tokenizer", _Stopping(reference.tokenizer, after=6))
    result = reference.answer(AnswerRequest(question=golden.meta["calls"]["text"]["texts"][0]), NO_NOISE)
    assert len(result.ids) == 6
    assert result.text == "yes"


class _Stopping:
    """Reads `after` ids as an answer with the stop string behind it."""

    def __init__(self, tokenizer: TextTokenizer, after: int) -> None:
        self._tokenizer = tokenizer
        self._after = after

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return self._tokenizer.encode(text, bos=bos)

    def decode(self, ids: Sequence[int]) -> str:
        return "yes \\n more" if len(ids) >= self._after else "yes"


def test_a_picture_that_keeps_nothing_is_an_error(understanding: tuple[Golden, Reference]) -> None:
    golden, reference = understanding
    noise: Any = Decided(np.zeros((1, 16)))
    request = AnswerRequest(question="what?", pictures=tuple(golden.inputs["image/pixels"][:1]))
    with pytest.raises(MediaError, match="token"):
        reference.answer(request, noise)


# --- Whole runs of a small model with random weights ----------------------------------------------------------


class Counted(Noise):
    """Writes down what is drawn."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.drawn: list[tuple[Any, ...]] = []

    def normal(self, *shape: int) -> np.ndarray:
        self.drawn.append(("normal", *shape))
        return super().normal(*shape)

    def gumbel(self, *shape: int) -> np.ndarray:
        self.drawn.append(("gumbel", *shape))
        return super().gumbel(*shape)

    def choice(self, probabilities: np.ndarray) -> np.ndarray:
        self.drawn.append(("choice", *probabilities.shape))
        assert probabilities.sum() == pytest.approx(1, abs=1e-5)
        return super().choice(probabilities)


@pytest.fixture(scope="module")
def checkpoint(tokenizer: TextTokenizer) -> Checkpoint:
    shapes = PRESETS["tiny"]
    config = replace(shapes, vocabulary=Vocabulary(text_size=tokenizer.size, visual_codes=512, motion_codes=256))
    return Checkpoint(config, tokenizer=b"", weights=RandomWeights(config, 0))


@pytest.fixture(scope="module")
def small(checkpoint: Checkpoint, tokenizer: TextTokenizer) -> Reference:
    return Reference(checkpoint, checkpoint.config, tokenizer)


SMALL: dict[str, Any] = {"size": (48, 32), "keyframe_steps": 4, "min_image_tokens": 5, "max_image_tokens": 5}
SMALL_VIDEO: dict[str, Any] = SMALL | {"keyframe_size": (32, 32), "video_steps": 2}
WRITTEN = [("choice", 1, 3 + 2 + 512)] * 5
MOTION = [("choice", 1, 256)] * 48
DENOISED = [("normal", 1, 3, 32, 48), ("normal", 1, 24, 4, 4, 6)]
GUMBEL = ("gumbel", 1, 64, 2)
BALL = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3)


def _shapes(clip: ClipResult) -> None:
    assert clip.frames.shape == (24, 32, 48, 3)
    assert clip.keyframe.shape == (32, 48, 3)
    assert clip.latents.shape == (24, 4, 4, 6)
    assert np.isfinite(clip.latents).all()


def test_draws_of_text_to_video(small: Reference) -> None:
    noise = Counted(1)
    clips = list(small.generate_video(VideoRequest(prompt="a red ball", clips=2, **SMALL_VIDEO), noise))
    assert noise.drawn == [*WRITTEN, ("normal", 1, 4, 4, 4), *DENOISED] * 2
    for clip in clips:
        _shapes(clip)
        assert len(clip.motion_ids) == 48
    again = next(small.generate_video(VideoRequest(prompt="a red ball", **SMALL_VIDEO), Noise(1)))
    np.testing.assert_array_equal(again.frames, clips[0].frames)
    other = next(small.generate_video(VideoRequest(prompt="a red ball", **SMALL_VIDEO), Noise(2)))
    assert (other.frames != again.frames).any()


def test_draws_of_picture_to_video(small: Reference) -> None:
    noise = Counted(1)
    [clip] = small.generate_video(VideoRequest(image=BALL, **SMALL_VIDEO), noise)
    assert noise.drawn == [GUMBEL, *MOTION, *DENOISED]
    _shapes(clip)
    assert len(clip.image_ids) > 1


def test_draws_of_images_with_both_schedulers(small: Reference, checkpoint: Checkpoint) -> None:
    request = ImageRequest(prompt="a red ball", image=BALL, **SMALL)
    start = ("normal", 1, 4, 4, 6)
    noise = Counted(1)
    result = small.generate_image(request, noise)
    assert noise.drawn == [GUMBEL, *WRITTEN, start]
    assert result.image.shape == (32, 48, 3)
    assert result.latents.shape == (4, 4, 6)
    ancestral = replace(small.config, keyframe_scheduler=SchedulerSettings(kind="euler-ancestral"))
    noise = Counted(1)
    Reference(checkpoint, ancestral, small.tokenizer).generate_image(request, noise)
    assert noise.drawn == [GUMBEL, *WRITTEN, start, *[start] * 4]
    noise = Counted(1)
    small.generate_image(replace(request, image=None, greedy=True), noise)
    assert noise.drawn == [start]


@pytest.mark.parametrize("through_tokens", [False, True])
def test_reconstruction(small: Reference, through_tokens: bool) -> None:
    motion = np.random.default_rng(0).normal(size=(24, 2, 5, 7)).astype(np.float32)
    request = ReconstructionRequest(
        keyframe=BALL, motion=motion, through_tokens=through_tokens, size=(48, 32), video_steps=2
    )
    noise = Counted(1)
    clip = small.reconstruct(request, noise)
    assert noise.drawn == DENOISED
    _shapes(clip)
    assert len(clip.motion_ids) == (48 if through_tokens else 0)
    if through_tokens:
        scaled = small.motion_ids(motion * 10)
        assert list(clip.motion_ids) == scaled


def test_no_visual_token_at_all_is_an_error(small: Reference) -> None:
    settings = small.settings(ImageRequest(prompt="x", **SMALL))
    with pytest.raises(UsageError, match="token"):
        small.decode_keyframe([small.config.vocabulary.image_end], (32, 32), settings, Noise(0))
