"""The torch reference's denoising loops and token writer against runs of the original model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from golden import Golden, assert_close, load
from PIL import Image
from torch import Tensor, nn
from torch_engines import golden_llama

from runtime.images import to_signed, to_uint8
from runtime.settings import KEYFRAME_SCHEDULER, VIDEO_SCHEDULER, SchedulerSettings
from runtime.vocabulary import EOS, Vocabulary
from videolavit.config import (
    KeyframeDecoderConfig,
    KeyframeUNetConfig,
    KeyframeVaeConfig,
    ModelConfig,
    MotionConditionConfig,
    MotionTokenizerConfig,
    VideoUNetConfig,
    VideoVaeConfig,
)
from videolavit.models.components import build
from videolavit.models.keyframe_decoder import pad_codes
from videolavit.reference import Reference, clips, keyframes
from videolavit.reference.schedulers import build_scheduler
from videolavit.reference.tokens import Rules, write

VOCABULARY = Vocabulary()
VIDEO_CONFIG = ModelConfig(
    name="golden",
    motion_tokenizer=MotionTokenizerConfig(dim=8, heads=2, codes=32, code_dim=6),
    motion_encoder=MotionConditionConfig(dim=16, heads=2, depth=2, out_dim=16),
    video_unet=VideoUNetConfig(
        block_out_channels=(32, 32), heads=(2, 4), layers_per_block=1, cross_attention_dim=16, time_id_dim=8
    ),
    video_vae=VideoVaeConfig(block_out_channels=(32,) * 4, sample_size=64),
)
KEYFRAME_CONFIG = ModelConfig(
    name="golden",
    keyframe_decoder=KeyframeDecoderConfig(
        patches=16, code_dim=8, width=24, depth=1, heads=4, out_dim=24, projections=(8, 12), pooled_dim=12
    ),
    keyframe_unet=KeyframeUNetConfig(
        block_out_channels=(16, 32),
        transformer_layers=(None, 2),
        heads=(2, 4),
        layers_per_block=1,
        cross_attention_dim=20,
        pooled_dim=12,
        time_id_dim=8,
        norm_groups=8,
        sample_size=16,
    ),
    keyframe_vae=KeyframeVaeConfig(block_out_channels=(16,) * 4, layers_per_block=1, norm_groups=8, sample_size=64),
)


class Replay:
    """Noise that hands out recorded draws, and must be asked for them in their order and shape."""

    def __init__(self, *draws: np.ndarray) -> None:
        self.draws = list(draws)

    def normal(self, *shape: int) -> np.ndarray:
        draw = self.draws.pop(0)
        assert draw.shape == shape
        return draw


class Recorded(nn.Module):
    """Remembers what the first call of a network was given."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.first: tuple[Tensor, ...] | None = None

    def forward(self, *inputs: Tensor, **named: Any) -> Any:
        self.first = inputs if self.first is None else self.first
        return self.network(*inputs, **named)


def _module(config: ModelConfig, golden: Golden, component: str, prefix: str) -> Any:
    module = build(config, component)
    names = [name for name in golden.weights if name.startswith(prefix)]
    module.load_state_dict({name.removeprefix(prefix): torch.from_numpy(golden.weights[name]) for name in names})
    return module.eval().requires_grad_(False)


@cache
def _video_modules() -> dict[str, Any]:
    golden = load("h_detokenizer_from_tokens")
    prefixes = {"motion_tokenizer": "motion_tokenizer.", "motion_encoder": "motion_encoder."}
    prefixes |= {"video_unet": "unet.", "video_vae": "vae."}
    return {name: _module(VIDEO_CONFIG, golden, name, prefix) for name, prefix in prefixes.items()}


@cache
def _keyframe_modules() -> dict[str, Any]:
    golden = load("i_keyframe")
    prefixes = {"keyframe_decoder": "tokenizer_decoder.", "keyframe_unet": "unet.", "keyframe_vae": "vae."}
    return {name: _module(KEYFRAME_CONFIG, golden, name, prefix) for name, prefix in prefixes.items()}


def _assert_pictures(actual: np.ndarray, expected: np.ndarray) -> None:
    off = np.abs(actual.astype(int) - expected.astype(int))
    assert off.max() <= 1
    assert np.mean(off > 0) <= 0.005


@pytest.mark.parametrize("case", ["h_detokenizer_from_tokens", "h_detokenizer_raw_motion"])
@torch.inference_mode()
def test_clip_denoising(case: str) -> None:
    golden, modules = load(case), _video_modules()
    call, inputs, outputs = golden.meta["call"], golden.inputs, golden.outputs
    if call["decode_from_token"]:
        ids = (inputs["motion"][0] + VOCABULARY.first_motion).tolist()
        size = (call["width"], call["height"])
        motion = Reference(modules, VIDEO_CONFIG, None).motion_of(ids, size)  # type: ignore[arg-type]
    else:
        motion = torch.from_numpy(inputs["motion"])
    assert_close(motion, outputs["motion_at_latent_size"], 5e-6)
    states = modules["motion_encoder"].encode(motion)
    assert_close(states[:, :2], outputs["motion_conditions_frames01"], 3e-5)

    noise: Any = Replay(inputs["image_noise"], inputs["initial_noise"])
    pictures = clips.augment(torch.from_numpy(inputs["image"]), call["noise_aug_strength"], noise)
    image_latents = clips.encode(modules["video_vae"], pictures)
    assert_close(image_latents, outputs["image_latents"], 2e-5)
    ids_row = [call.get("fps", 6), call.get("motion_bucket_id", 127), call["noise_aug_strength"]]
    unet = Recorded(modules["video_unet"])
    steps = list(
        clips.denoise(
            unet,
            VIDEO_SCHEDULER,
            image_latents,
            motion,
            states,
            torch.tensor([ids_row] * len(pictures)),
            steps=call["num_inference_steps"],
            guidance=(call.get("min_guidance_scale", 1.0), call.get("max_guidance_scale", 4.0)),
            noise=noise,
        )
    )
    assert not noise.draws
    assert unet.first is not None
    assert_close(unet.first[0][:, :1], outputs["unet_input_step0_frame0"], 3e-5)
    assert_close(unet.first[3], outputs["added_time_ids"], 0)
    for index, latents in enumerate(steps):
        assert_close(latents, outputs[f"latents_after_step_{index}"], 2e-3 if index == 0 else 5e-4)
    frames = clips.decode(modules["video_vae"], steps[-1], golden.meta["decode_chunk_size_effective"])
    shown = frames.transpose(1, 2)[:, :, outputs["frames_float_indices"]]  # [B, 3, n, H, W]
    assert_close(shown, outputs["frames_float"], 5e-4)
    _assert_pictures(to_uint8(frames[:, [0, -1]].numpy()), outputs["frames_u8_first_last"])


def test_video_schedule() -> None:
    outputs = load("h_detokenizer_from_tokens").outputs
    scheduler = build_scheduler(VIDEO_SCHEDULER, 4, torch.device("cpu"))
    np.testing.assert_allclose(scheduler.sigmas, outputs["sigmas"], rtol=1e-6)
    np.testing.assert_allclose(scheduler.timesteps, outputs["timesteps"], rtol=1e-6)
    np.testing.assert_allclose(scheduler.init_noise_sigma, outputs["init_noise_sigma"], rtol=1e-6)


def test_no_chunk_spans_two_videos() -> None:
    vae = _video_modules()["video_vae"]
    latents = torch.from_numpy(load("h_detokenizer_raw_motion").inputs["initial_noise"])[:, :3]  # [2, 3, 4, h, w]
    with torch.inference_mode():
        together = clips.decode(vae, latents, 2)
        alone = torch.cat([clips.decode(vae, video[None], 2) for video in latents])
    assert_close(together, alone, 1e-5)


def _conditions() -> tuple[Tensor, Tensor]:
    golden = load("i_keyframe")
    codes, counts = pad_codes(
        [VOCABULARY.visual_codes_of(golden.inputs[f"token_ids_{i}"]).tolist() for i in range(2)],
        KEYFRAME_CONFIG.keyframe_decoder.patches,
    )
    codebook = torch.from_numpy(golden.weights["visual_tokenizer.quantize.embedding.weight"])
    return _keyframe_modules()["keyframe_decoder"](codebook[codes], counts)


def _denoise(case: str, noise: Any, **options: Any) -> tuple[list[Tensor], Recorded]:
    call = load("i_keyframe").meta["calls"][case]
    sizes = (*call["original_size"], *call["crops_coords_top_left"], *call["target_size"])
    prompt, pooled = _conditions()
    unet = Recorded(_keyframe_modules()["keyframe_unet"])
    latents = keyframes.denoise(
        unet,
        KEYFRAME_SCHEDULER if case.startswith("ea") else SchedulerSettings(kind="ddim"),
        prompt,
        pooled,
        torch.tensor([sizes] * 2, dtype=torch.float32),
        size=(call["width"], call["height"]),
        steps=call["num_inference_steps"],
        guidance=call["guidance"],
        noise=noise,
        **options,
    )
    return list(latents), unet


def _assert_latents(case: str, steps: Sequence[Tensor]) -> None:
    outputs = load("i_keyframe").outputs
    checked = 0
    for index, latents in enumerate(steps):
        expected = outputs.get(f"{case}/latents_after_step_{index}")
        if expected is not None:
            assert_close(latents, expected, 5e-4 * max(1, np.abs(expected).max() / 4))
            checked += 1
    assert checked >= 2
    with torch.inference_mode():
        picture = keyframes.decode(_keyframe_modules()["keyframe_vae"], steps[-1])
    if f"{case}/vae_output" in outputs:
        assert_close(picture, outputs[f"{case}/vae_output"], 1e-4)
    _assert_pictures(to_uint8(picture.numpy()), outputs[f"{case}/images_u8"])


@pytest.mark.parametrize("case", ["ea_first", "ea_second", "ddim"])
@torch.inference_mode()
def test_keyframe_denoising(case: str) -> None:
    golden = load("i_keyframe")
    settings = KEYFRAME_SCHEDULER if case.startswith("ea") else SchedulerSettings(kind="ddim")
    own_sigma = float(build_scheduler(settings, 4, torch.device("cpu")).init_noise_sigma)
    # The recorded first call started from a sigma of the wrong schedule: scale the draw so that it starts there too.
    factor = np.float32(golden.outputs[f"{case}/init_noise_sigma_used"] / own_sigma)
    assert case == "ea_first" or factor == pytest.approx(1, abs=1e-6)
    draws = [golden.inputs[f"{case}/initial_noise"] * factor]
    draws += [golden.inputs[f"{case}/step_noise_{i}"] for i in range(4) if case.startswith("ea")]
    noise = Replay(*draws)
    steps, unet = _denoise(case, noise)
    assert not noise.draws
    if case != "ea_second":
        assert unet.first is not None
        assert_close(unet.first[0], golden.outputs[f"{case}/unet_input_step0"], 1e-5)
    _assert_latents(case, steps)


@torch.inference_mode()
def test_keyframe_from_the_last_frame() -> None:
    golden = load("i_keyframe")
    noise: Any = Replay(golden.inputs["reinject/noise"])
    pictures = [np.asarray(Image.fromarray(f).resize((48, 32), 3)) for f in golden.inputs["reinject/last_frames_u8"]]
    clean = keyframes.encode(
        _keyframe_modules()["keyframe_vae"], torch.from_numpy(np.stack([to_signed(p) for p in pictures]))
    )
    assert_close(clean, golden.outputs["reinject/image_latents"], 2e-5)
    start = keyframes.noised(clean, SchedulerSettings(kind="ddim"), steps=4, level=2, noise=noise)
    assert_close(start, golden.outputs["reinject/noised_latents"], 2e-5)
    steps, _ = _denoise("reinject", noise, start=start, level=2)
    assert len(steps) == 2
    _assert_latents("reinject", steps)

    ancestral: Any = Replay(golden.inputs["reinject/noise"])
    start = keyframes.noised(clean, KEYFRAME_SCHEDULER, steps=4, level=2, noise=ancestral)
    unscaled = golden.outputs["reinject_ea/noised_latents"] / golden.outputs["reinject_ea/init_noise_sigma"]
    assert_close(start, unscaled, 2e-5)


def test_size_ids_put_height_first() -> None:
    assert keyframes.size_ids((1024, 576), torch.zeros(1)).tolist() == [[576, 1024, 0, 0, 576, 1024]]


@cache
def _llama() -> tuple[Golden, Any]:
    golden = load("j_llm_generation")
    return golden, golden_llama(golden)


@pytest.mark.parametrize("case", ["img_text", "img_text_noguid", "mot_chain", "mot_noguid"])
def test_written_ids(case: str) -> None:
    golden, llama = _llama()
    arguments = golden.meta["calls"][case]["generate_kwargs"]
    ranges = VOCABULARY.image_ranges if case.startswith("img") else VOCABULARY.motion_ranges
    rules = Rules(
        allowed=ranges,
        end=arguments["eos_token_id"],
        least=arguments["min_new_tokens"],
        most=arguments["max_new_tokens"],
        guidance=arguments["guidance_scale"],
    )
    rows = zip(golden.inputs[f"{case}/input_ids"], golden.inputs[f"{case}/attention_mask"], strict=True)
    for index, (ids, mask) in enumerate(rows):
        prompt = torch.from_numpy(ids[mask > 0])[None]
        no_noise: Any = Replay()
        written = [i for i in write(llama, prompt, rules, no_noise) if i != EOS]
        assert written == golden.outputs[f"{case}/pure_list_{index}"].tolist()


def test_sampled_ids_are_drawn_from_the_surviving_candidates() -> None:
    golden, llama = _llama()
    call, arguments = golden.meta["calls"]["sample"], golden.meta["calls"]["img_text"]["generate_kwargs"]
    rules = Rules(
        allowed=VOCABULARY.image_ranges,
        end=VOCABULARY.image_end,
        least=arguments["min_new_tokens"],
        most=2,
        guidance=arguments["guidance_scale"],
        sampling=(call["temperature"], call["top_k"], call["top_p"]),
    )
    allowed = np.array([0, 1, 2, *range(VOCABULARY.image_start, VOCABULARY.motion_start)])
    splits = np.cumsum(golden.outputs["sample/kept_counts"])[:-1]
    kept_ids = np.split(golden.outputs["sample/kept_ids_concat"], splits)
    kept_probabilities = np.split(golden.outputs["sample/kept_probs_concat"], splits)
    for row in range(2):
        seen: list[np.ndarray] = []

        class Least:
            """Draws the least likely candidate, which is never the arg-max."""

            def choice(self, probabilities: np.ndarray, seen: list[np.ndarray] = seen) -> np.ndarray:
                seen.append(probabilities)
                return np.where(probabilities > 0, probabilities, np.inf).argmin(axis=-1)

        mask = golden.inputs["img_text/attention_mask"][row] > 0
        prompt = torch.from_numpy(golden.inputs["img_text/input_ids"][row][mask])[None]
        least: Any = Least()
        written = write(llama, prompt, rules, least)
        survivors = np.flatnonzero(seen[0][0])
        assert allowed[survivors].tolist() == kept_ids[row].tolist()
        assert_close(seen[0][0][survivors], kept_probabilities[row], 1e-5)
        assert len(seen) == len(written) == 2
        assert written[0] == kept_ids[row][kept_probabilities[row].argmin()]


@pytest.mark.parametrize(("sampling", "expected"), [((1.0, 3, 1.0), 3), ((1.0, 0, 1.0), 3 + 2 + 16384)])
def test_top_k_alone(sampling: tuple[float, int, float], expected: int) -> None:
    golden, llama = _llama()
    seen: list[np.ndarray] = []

    class First:
        def choice(self, probabilities: np.ndarray) -> np.ndarray:
            seen.append(probabilities)
            return probabilities.argmax(axis=-1)

    first: Any = First()
    rules = Rules(allowed=VOCABULARY.image_ranges, end=VOCABULARY.image_end, least=0, most=1, sampling=sampling)
    write(llama, torch.from_numpy(golden.inputs["token_prompt_0"])[None], rules, first)
    assert np.count_nonzero(seen[0]) == expected
