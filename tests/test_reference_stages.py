"""The torch reference's tasks: which stage runs when, and with what, against traces of the original orchestration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from golden import FOLDER, assert_close, load

from runtime.images import to_signed
from runtime.noise import Noise
from runtime.requests import ImageRequest, VideoRequest
from runtime.tokenizers import TextTokenizer
from videolavit.config import PRESETS
from videolavit.reference import Reference
from videolavit.reference.tokens import Rules

OFFICIAL = PRESETS["video-lavit-7b"]
VOCABULARY = OFFICIAL.vocabulary
TRACES = json.loads((FOLDER / "m_orchestration.json").read_text())
NO_NOISE: Any = None


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(FOLDER / "tiny_sp.model")


class Traced(Reference):
    """Every heavy stage replaced by what the recorded run's stage gave, and its arguments written down."""

    def __init__(self, trace: dict[str, Any], tokenizer: TextTokenizer) -> None:
        super().__init__({}, OFFICIAL, tokenizer)
        self.calls: list[dict[str, Any]] = []
        self.written: Iterator[list[int]] = iter(
            [call["returned_pure"][0] for call in trace["calls"] if "returned_pure" in call]
        )
        motion_calls = [call for call in trace["calls"] if call["call"] == "generate_motion_tokenids"]
        self.first_motion_prompt: list[int] = motion_calls[0]["prompt_ids"][0] if motion_calls else []
        self.keyframes = self.clips = 0

    def picture_ids(self, picture: np.ndarray, noise: Noise) -> list[int]:
        self.calls.append({"call": "picture", "shape": list(self.pixels([picture]).shape)})
        start = self.first_motion_prompt.index(VOCABULARY.image_start)
        return self.first_motion_prompt[start + 1 : -1]

    def write(self, prompt: list[int], rules: Rules, noise: Noise) -> list[int]:
        self.calls.append({"call": "write", "prompt": prompt, "rules": rules})
        ids = next(self.written)
        return ids[:-1] if rules.end == VOCABULARY.motion_end else ids

    def motion_of(self, motion_ids: list[int], size: tuple[int, int]) -> Any:
        return motion_ids

    def noise_last_frame(self, frame: np.ndarray, level: int, settings: Any, noise: Noise) -> Any:
        self.calls.append({"call": "noise", "pixel": frame[0, 0].tolist(), "level": level, "settings": settings})
        return "renoised"

    def decode_keyframe(
        self, image_ids: list[int], size: Any, settings: Any, noise: Noise, start: Any = None, level: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append(
            {"call": "keyframe", "ids": image_ids, "size": size, "settings": settings, "start": start, "level": level}
        )
        self.keyframes += 1
        return np.zeros(0), np.full((size[1], size[0], 3), (10 * self.keyframes, 0, 0), np.uint8)

    def decode_clip(
        self, keyframe: np.ndarray, motion: Any, settings: Any, noise: Noise
    ) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append({"call": "clip", "keyframe": keyframe, "motion": motion, "settings": settings})
        self.clips += 1
        frames = np.zeros((24, 1, 1, 3), np.uint8)
        frames[:, 0, 0] = [(200, self.clips, index) for index in range(24)]
        return np.zeros(0), frames


def _assert_written(own: dict[str, Any], theirs: dict[str, Any]) -> None:
    motion = theirs["call"] == "generate_motion_tokenids"
    rules: Rules = own["rules"]
    assert own["prompt"] == [*theirs["prompt_ids"][0], VOCABULARY.motion_start if motion else VOCABULARY.image_start]
    assert rules.guidance == theirs["guidance_scale"]
    sampling = (theirs["temperature"], theirs["top_k"], theirs["top_p"])
    assert rules.sampling == (sampling if theirs["use_nucleus_sampling"] else None)
    if motion:  # exactly the codes of a clip, where the recorded run lets the model decide
        assert (rules.least, rules.most, rules.end) == (135, 135, VOCABULARY.motion_end)
        assert rules.allowed == (range(48388, 49412),)
    else:
        assert (rules.least, rules.most) == (theirs["min_new_tokens"], theirs["max_new_tokens"])
        assert (rules.allowed, rules.end) == (VOCABULARY.image_ranges, VOCABULARY.image_end)


def _assert_calls(calls: list[dict[str, Any]], trace: dict[str, Any]) -> None:
    kinds = {
        "visual_tokenizer.tokenize_image": "picture",
        "generate_image_tokenids": "write",
        "generate_motion_tokenids": "write",
        "regenerate_noise": "noise",
        "image_decoding": "keyframe",
        "video_decoding": "clip",
    }
    assert [call["call"] for call in calls] == [kinds[call["call"]] for call in trace["calls"]]
    for own, theirs in zip(calls, trace["calls"], strict=True):
        settings = own.get("settings")
        if own["call"] == "picture":
            assert own["shape"] == theirs["shape"]
        elif own["call"] == "write":
            _assert_written(own, theirs)
        elif own["call"] == "noise":
            assert [own["pixel"]] == theirs["last_frame_pixel0"]
            assert own["level"] == theirs["noise_level"]
            assert settings.keyframe_size == (theirs["width"], theirs["height"])
            assert settings.keyframe_steps == theirs["num_inference_steps"]
        elif own["call"] == "keyframe":
            assert own["ids"] == theirs["image_tokens"][0]
            assert list(own["size"]) == [theirs["width"], theirs["height"]]
            assert own["level"] == theirs["noise_level"]
            assert (own["start"] is None) == (theirs["noise_used"] is None)
            assert settings.keyframe_steps == theirs["num_inference_steps"]
            assert settings.image_guidance == theirs["guidance_scale_for_decoder"]
        else:
            assert list(own["keyframe"].shape[1::-1]) == theirs["key_frame_sizes_wh"][0]
            assert own["keyframe"][0, 0].tolist() == theirs["key_frame_pixel0"][0]
            assert own["motion"] == theirs["motion_tokens"][0][:-1]  # the marker at the end is no motion
            assert list(settings.size) == [theirs["width"], theirs["height"]]
            assert settings.noise_augmentation == theirs["noise_aug_strength"]


def _video_request(kwargs: dict[str, Any], **inputs: Any) -> VideoRequest:
    return VideoRequest(
        **inputs,
        size=(kwargs["video_width"], kwargs["video_height"]),
        keyframe_size=(kwargs.get("width", 1024), kwargs.get("height", 1024)),
        keyframe_steps=kwargs.get("num_inference_steps"),
        text_guidance=kwargs["guidance_scale_for_llm"],
        image_guidance=kwargs.get("guidance_scale_for_decoder"),
        top_k=kwargs["top_k"],
        clips=kwargs.get("clip_num", 1),
        inverse_rate=kwargs.get("inverse_rate"),
    )


PICTURE = np.full((60, 80, 3), (9, 8, 7), np.uint8)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("t2v_one_clip", {"prompt": "a red ball"}),
        ("t2v_three_clips", {"prompt": "two cats run"}),
        ("i2v", {"image": PICTURE}),
        ("text_plus_keyframe", {"prompt": "a dog in the park", "image": PICTURE}),
    ],
)
def test_video_stages(name: str, inputs: dict[str, Any], tokenizer: TextTokenizer) -> None:
    trace = TRACES[name]
    reference = Traced(trace, tokenizer)
    results = list(reference.generate_video(_video_request(trace["kwargs"], **inputs), NO_NOISE))
    _assert_calls(reference.calls, trace)
    assert [result.index for result in results] == list(range(trace["keyframes_per_video"][0]))
    pixels = np.concatenate([result.frames[:, 0, 0] for result in results])
    assert pixels.tolist() == trace["frame_pixel0"][0]
    for result, call in zip(results, [c for c in reference.calls if c["call"] == "clip"], strict=True):
        assert result.keyframe is call["keyframe"]
        assert list(result.motion_ids) == call["motion"]
        assert result.image_ids[-1] == VOCABULARY.image_end


def test_image_stages(tokenizer: TextTokenizer) -> None:
    trace = TRACES["t2i"]
    reference = Traced(trace, tokenizer)
    request = ImageRequest(prompt="birds fly south", size=(1152, 896), max_image_tokens=200)
    result = reference.generate_image(request, NO_NOISE)
    _assert_calls(reference.calls, trace)
    assert list(result.ids) == trace["calls"][0]["returned_pure"][0]


def test_an_image_prompt_has_no_markers_before_an_image(tokenizer: TextTokenizer) -> None:
    trace = {"calls": [{"call": "generate_motion_tokenids", "prompt_ids": [[32000, 32010, 32020, 32001]]}]}
    reference = Traced(trace, tokenizer)
    reference.written = iter([[32005, 32001]])
    reference.generate_image(ImageRequest(prompt="a red ball", image=PICTURE), NO_NOISE)
    assert reference.calls[1]["prompt"] == [259, 344, 455, 32010, 32020, 32000]


def test_id_2_vanishes_from_image_ids_and_later_prompts(tokenizer: TextTokenizer) -> None:
    reference = Traced({"calls": []}, tokenizer)
    reference.written = iter([[2, 32005, 2, 32001], [48390, 48387]])
    [clip] = reference.generate_video(VideoRequest(prompt="a red</s> ball"), NO_NOISE)
    first, second = [call["prompt"] for call in reference.calls if call["call"] == "write"]
    assert 2 in first
    assert 2 not in second
    assert clip.image_ids == (32005, 32001)


@pytest.mark.parametrize(("greedy", "sampled", "expected"), [(True, True, 0), (False, True, 2), (False, False, 1)])
def test_what_is_sampled(greedy: bool, sampled: bool, expected: int, tokenizer: TextTokenizer) -> None:
    reference = Traced(TRACES["t2v_one_clip"], tokenizer)
    list(reference.generate_video(VideoRequest(prompt="x", greedy=greedy, sampled_motion=sampled), NO_NOISE))
    assert sum(c["call"] == "write" and c["rules"].sampling is not None for c in reference.calls) == expected


def test_motion_tokens_are_cut_and_filled_and_key_frames_are_signed() -> None:
    golden = load("m_motion_token_pruning")
    for index, expected in enumerate(golden.outputs["motion_codes"]):
        ids = golden.inputs[f"motion_tokens_{index}"]
        assert VOCABULARY.motion_codes_of(ids, 135).tolist() == expected.tolist()
    signed = [to_signed(frame) for frame in golden.inputs["key_frames_u8"]]
    assert_close(np.stack(signed), golden.outputs["key_frame_tensor"], 1e-6)
