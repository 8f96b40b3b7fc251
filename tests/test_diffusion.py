"""The denoising loops against the reference's runs, with torch modules as engines."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from golden import Golden, assert_close, load
from PIL import Image
from torch_engines import TorchEngine

from runtime import diffusion
from runtime.schedulers import Schedule, ScheduleOptions, make_schedule
from runtime.settings import KEYFRAME_SCHEDULER, VIDEO_SCHEDULER, SchedulerSettings
from videolavit.config import (
    KeyframeUNetConfig,
    KeyframeVaeConfig,
    MotionConditionConfig,
    MotionTokenizerConfig,
    VideoUNetConfig,
    VideoVaeConfig,
)
from videolavit.models.diffusers_models import build_keyframe_unet, build_keyframe_vae, build_video_vae
from videolavit.models.motion_encoder import MotionConditionEncoder
from videolavit.models.motion_tokenizer import MotionTokenizer
from videolavit.models.video_unet import VideoUNet

VIDEO_CASES = ("h_detokenizer_raw_motion", "h_detokenizer_from_tokens")
KEYFRAME_CASES = ("ea_first", "ea_second", "ddim", "reinject")


class RecordingSchedule:
    """A schedule that remembers what came in and out of its steps."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.predictions: list[np.ndarray] = []
        self.latents: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.schedule, name)

    def step(self, model_output: np.ndarray, i: int, x: np.ndarray, *rest: Any, **named: Any) -> np.ndarray:
        self.predictions.append(model_output)
        self.latents.append(self.schedule.step(model_output, i, x, *rest, **named))
        return self.latents[-1]


class StoredNoise:
    """Hands out stored draws instead of random ones."""

    def __init__(self, draws: list[np.ndarray]) -> None:
        self.draws = list(draws)

    def normal(self, *shape: int) -> np.ndarray:
        draw = self.draws.pop(0)
        assert draw.shape == shape
        return draw


def loaded(module: torch.nn.Module, weights: dict[str, np.ndarray], prefix: str) -> Any:
    state = {name.removeprefix(prefix): torch.from_numpy(w) for name, w in weights.items() if name.startswith(prefix)}
    module.load_state_dict(state, strict=True)
    return module.eval()


def encoder_engine(vae: Any) -> TorchEngine:
    return TorchEngine(lambda image: {"latents": vae.encode(image).latent_dist.mode()})


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """[..., 3, H, W] in [-1, 1] -> [..., H, W, 3]."""
    return np.round((pixels / 2 + 0.5).clip(0, 1) * 255).astype(np.uint8).swapaxes(-3, -1).swapaxes(-3, -2)


def assert_pictures(actual: np.ndarray, expected: np.ndarray) -> None:
    difference = np.abs(actual.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.005


# --- video ---------------------------------------------------------------------------------------------------


@cache
def video_modules() -> dict[str, Any]:
    weights = load("h_detokenizer_from_tokens").weights
    return {
        "unet": loaded(
            VideoUNet(
                VideoUNetConfig(
                    block_out_channels=(32, 32), heads=(2, 4), layers_per_block=1, cross_attention_dim=16, time_id_dim=8
                )
            ),
            weights,
            "unet.",
        ),
        "vae": loaded(build_video_vae(VideoVaeConfig(block_out_channels=(32,) * 4, sample_size=64)), weights, "vae."),
        "motion_encoder": loaded(
            MotionConditionEncoder(MotionConditionConfig(dim=16, heads=2, depth=2, out_dim=16)),
            weights,
            "motion_encoder.",
        ),
        "motion_tokenizer": loaded(
            MotionTokenizer(MotionTokenizerConfig(dim=8, heads=2, codes=32, code_dim=6)), weights, "motion_tokenizer."
        ),
    }


@cache
def denoised_video(name: str) -> tuple[Golden, RecordingSchedule, list[dict[str, np.ndarray]], list[int], np.ndarray]:
    """Runs a case's loop once: case, schedule, inputs of every network call, progress, final latents."""
    golden, modules = load(name), video_modules()
    call, inputs = golden.meta["call"], golden.inputs
    motion = golden.outputs["motion_at_latent_size"]
    with torch.inference_mode():
        states = modules["motion_encoder"].encode(torch.from_numpy(motion)).numpy()
    calls: list[dict[str, np.ndarray]] = []

    def unet(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append({key: value.numpy().copy() for key, value in tensors.items()})
        return {"v": modules["unet"](**tensors)}

    image = inputs["image"] + np.float32(call["noise_aug_strength"]) * inputs["image_noise"]
    schedule = RecordingSchedule(make_schedule(VIDEO_SCHEDULER, call["num_inference_steps"]))
    progress: list[int] = []
    latents = diffusion.denoise_video(
        TorchEngine(unet),
        schedule,  # type: ignore[arg-type]
        image_latents=encoder_engine(modules["vae"])(image=image)["latents"],
        motion=motion,
        states=states,
        guidance=(call.get("min_guidance_scale", 1.0), call.get("max_guidance_scale", 4.0)),
        fps=call.get("fps", 6),
        motion_bucket=call.get("motion_bucket_id", 127),
        noise_augmentation=call["noise_aug_strength"],
        initial=inputs["initial_noise"],
        on_step=progress.append,
    )
    return golden, schedule, calls, progress, latents


@pytest.mark.parametrize("name", VIDEO_CASES)
def test_video_loop_equals_the_reference(name: str) -> None:
    golden, schedule, calls, progress, latents = denoised_video(name)
    out = golden.outputs
    rows = len(golden.inputs["image"])
    assert_close(calls[0]["time_ids"], out["added_time_ids"], 0)
    assert_close(calls[0]["sample"][:, :1], out["unet_input_step0_frame0"], 3e-5)
    assert_close(calls[0]["states"][rows:, :2], out["motion_conditions_frames01"], 3e-5)
    assert not calls[0]["states"][:rows].any()
    assert_close(schedule.predictions[0], out["noise_pred_guided_step_0"], 3e-4)
    assert_close(schedule.latents[0], out["latents_after_step_0"], 2e-3)
    for i in (1, 2):
        assert_close(schedule.latents[i], out[f"latents_after_step_{i}"], 2e-3)
    assert_close(latents, out["latents_after_step_3"], 5e-4)
    assert progress == [1, 2, 3, 4]


@pytest.mark.parametrize("name", VIDEO_CASES)
def test_decoded_frames_equal_the_reference(name: str) -> None:
    golden, _, _, _, latents = denoised_video(name)
    vae = video_modules()["vae"]
    decoder = TorchEngine(lambda latents: {"frames": vae.decode(latents, num_frames=len(latents)).sample})
    frames = diffusion.decode_video(decoder, latents, 0.18215, golden.meta["decode_chunk_size_effective"])
    shown = frames.swapaxes(1, 2)[:, :, golden.outputs["frames_float_indices"]]
    assert_close(shown, golden.outputs["frames_float"], 5e-4)
    assert_pictures(to_uint8(frames)[:, [0, -1]], golden.outputs["frames_u8_first_last"])


def test_motion_tokens_give_the_reference_motion() -> None:
    golden = load("h_detokenizer_from_tokens")
    codes = torch.from_numpy(golden.inputs["motion"])
    with torch.inference_mode():
        motion = video_modules()["motion_tokenizer"].reconstruct_from_codes(codes, 4, 6)
    assert_close(motion.numpy(), golden.outputs["motion_at_latent_size"], 3e-5)


@pytest.mark.parametrize("chunk", [2, 4, 5, 8])
def test_a_chunk_never_spans_two_videos(chunk: int) -> None:
    seen: list[np.ndarray] = []

    def decoder(latents: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(latents[:, 0, 0, 0].numpy())
        return {"frames": latents[:, :3].repeat(1, 1, 8, 8)}

    latents = np.arange(10, dtype=np.float32).reshape(2, 5, 1, 1, 1) * np.ones((1, 1, 4, 1, 1), np.float32)
    frames = diffusion.decode_video(TorchEngine(decoder), latents, 0.5, chunk)
    assert frames.shape == (2, 5, 3, 8, 8)
    assert_close(frames[..., 0, 0, 0], np.arange(10).reshape(2, 5) * 2, 0)
    assert all(len(c) <= chunk and (c.max() < 10) == (c.min() < 10) for c in seen)


def test_constant_guidance_is_a_range_with_equal_ends() -> None:
    class FirstBranch:
        """Predicts 1 for the conditional rows and 0 for the others."""

        def hold(self, **_: np.ndarray) -> None: ...

        def __call__(self, *, sample: np.ndarray, timestep: np.ndarray) -> dict[str, np.ndarray]:
            v = np.zeros_like(sample[:, :, :4])
            v[len(v) // 2 :] = 1
            return {"v": v}

    shape = (1, 3, 4, 2, 2)
    for guidance, expected in (((2.0, 2.0), [2, 2, 2]), ((1.0, 4.0), [1, 2.5, 4])):
        schedule = RecordingSchedule(make_schedule(VIDEO_SCHEDULER, 2))
        diffusion.denoise_video(
            FirstBranch(),  # type: ignore[arg-type]
            schedule,  # type: ignore[arg-type]
            image_latents=np.zeros((1, 4, 2, 2), np.float32),
            motion=np.zeros((1, 2, 3, 2, 2), np.float32),
            states=np.zeros((1, 3, 256, 8), np.float32),
            guidance=guidance,
            fps=6,
            motion_bucket=127,
            noise_augmentation=0.02,
            initial=np.zeros(shape, np.float32),
        )
        assert_close(schedule.predictions[0][0, :, 0, 0, 0], expected, 1e-6)


# --- key frame -----------------------------------------------------------------------------------------------


@cache
def keyframe_modules() -> tuple[Golden, Any, Any]:
    golden = load("i_keyframe")
    unet = build_keyframe_unet(
        KeyframeUNetConfig(
            block_out_channels=(16, 32),
            transformer_layers=(None, 2),
            heads=(2, 4),
            layers_per_block=1,
            cross_attention_dim=20,
            pooled_dim=12,
            time_id_dim=8,
            norm_groups=8,
            sample_size=16,
        )
    )
    vae = build_keyframe_vae(
        KeyframeVaeConfig(block_out_channels=(16,) * 4, layers_per_block=1, norm_groups=8, sample_size=64)
    )
    return golden, loaded(unet, golden.weights, "unet."), loaded(vae, golden.weights, "vae.")


def reinjected(schedule: Schedule, case: str) -> np.ndarray:
    """The last frames of the previous clip as noised latents."""
    golden, _, vae = keyframe_modules()
    last = [Image.fromarray(frame) for frame in golden.inputs["reinject/last_frames_u8"]]
    pixels = (
        np.stack([np.asarray(frame.resize((48, 32), Image.Resampling.BICUBIC)) for frame in last])
        .transpose(0, 3, 1, 2)
        .astype(np.float32)
        / 127.5
        - 1
    )
    clean = encoder_engine(vae)(image=pixels)["latents"] * np.float32(0.13025)
    assert_close(clean, golden.outputs["reinject/image_latents"], 3e-5)
    return schedule.add_noise(clean, golden.inputs["reinject/noise"], golden.meta["calls"][case]["noise_level"])


@pytest.mark.parametrize("case", KEYFRAME_CASES)
def test_keyframe_loop_equals_the_reference(case: str) -> None:
    golden, unet, vae = keyframe_modules()
    out, inputs, call = golden.outputs, golden.inputs, golden.meta["calls"][case]
    settings = SchedulerSettings(kind="ddim") if call["scheduler"].startswith("DDIM") else KEYFRAME_SCHEDULER
    schedule = RecordingSchedule(make_schedule(settings, 4))
    start = call.get("start_timestep_index", 0)
    if case == "reinject":
        latents = reinjected(schedule.schedule, case)
        assert_close(latents, out["reinject/noised_latents"], 3e-5)
    else:
        latents = inputs[f"{case}/initial_noise"] * out[f"{case}/init_noise_sigma_used"]
    conditions = "ea_first" if case.startswith("ea") else "ddim"
    calls: list[dict[str, np.ndarray]] = []

    def engine(
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        calls.append(
            {
                "latents": latents.numpy(),
                "timestep": timestep.numpy(),
                "prompt_embeds": prompt_embeds.numpy(),
                "pooled": pooled.numpy(),
                "time_ids": time_ids.numpy(),
            }
        )
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return {"noise": unet(latents, timestep, prompt_embeds, added_cond_kwargs=added).sample}

    progress: list[int] = []
    final = diffusion.denoise_keyframe(
        TorchEngine(engine),
        schedule,  # type: ignore[arg-type]
        prompt_embeds=out[f"{conditions}/prompt_embeds_cfg"][2:],
        pooled=out[f"{conditions}/pooled_cfg"][2:],
        time_ids=out[f"{conditions}/add_time_ids_cfg"][2:],
        latents=latents,
        guidance=call["guidance"],
        noise=StoredNoise([inputs[f"{case}/step_noise_{i}"] for i in range(4)] if conditions == "ea_first" else []),  # type: ignore[arg-type]
        start=start,
        on_step=progress.append,
    )

    for name, stored in (("prompt_embeds", "prompt_embeds"), ("pooled", "pooled"), ("time_ids", "add_time_ids")):
        assert_close(calls[-1][name], out[f"{conditions}/{stored}_cfg"], 0)
    if f"{case}/unet_input_step0" in out:
        assert_close(calls[0]["latents"], out[f"{case}/unet_input_step0"], 3e-5)
        assert_close(schedule.predictions[0], out[f"{case}/noise_pred_guided_step_0"], 5e-4)
    if f"{case}/timesteps_used" in out:
        assert_close(np.concatenate([c["timestep"] for c in calls]), out[f"{case}/timesteps_used"], 0)
    for i, after in enumerate(schedule.latents):
        key = f"{case}/latents_after_step_{i}"
        if key in out:
            assert_close(after, out[key], 5e-4 * max(1.0, float(np.abs(out[key]).max()) / 4))
    assert progress == list(range(1, 5 - start))
    with torch.inference_mode():
        image = vae.decode(torch.from_numpy(final / np.float32(0.13025))).sample.numpy()
    if f"{case}/vae_output" in out:
        assert_close(image, out[f"{case}/vae_output"], 1e-4)
    assert_pictures(to_uint8(image), out[f"{case}/images_u8"])


def test_reinjected_noise_is_not_scaled_twice() -> None:
    """The reference multiplies correctly noised Euler latents by the initial noise level once more."""
    out = keyframe_modules()[0].outputs
    latents = reinjected(make_schedule(KEYFRAME_SCHEDULER, 4), "reinject_ea")
    assert_close(latents, out["reinject_ea/noised_latents"] / out["reinject_ea/init_noise_sigma"], 3e-5)


def test_time_ids_of_an_uncropped_picture() -> None:
    expected = keyframe_modules()[0].outputs["ddim/add_time_ids_cfg"][:1]
    assert_close(diffusion.keyframe_time_ids((48, 32)), expected, 0)


# --- guidance interval -----------------------------------------------------------------------------------------


class Branches:
    """A network whose prediction is a number of each branch; remembers rows, what it held and how often it was told."""

    def __init__(self, output: str) -> None:
        self.output = output
        self.held: dict[str, np.ndarray] = {}
        self.rows: list[int] = []
        self.uploads = 0

    def hold(self, **inputs: np.ndarray) -> None:
        self.held = inputs
        self.uploads += 1

    def __call__(self, *, timestep: np.ndarray, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        [noisy] = inputs.values()
        assert {len(value) for value in self.held.values()} == {len(noisy)}
        self.rows.append(len(noisy))
        condition = next(value for name, value in self.held.items() if name in ("states", "pooled"))
        given = condition.reshape(len(noisy), -1).any(axis=1)
        channels = noisy[:, :, :4] if self.output == "v" else noisy
        return {self.output: np.ones_like(channels) * np.where(given, 3, 1).reshape(-1, *[1] * (channels.ndim - 1))}


def video_with(network: Branches, schedule: Any, **changes: Any) -> np.ndarray:
    given: dict[str, Any] = {
        "image_latents": np.ones((1, 4, 2, 2), np.float32),
        "motion": np.ones((1, 2, 3, 2, 2), np.float32),
        "states": np.ones((1, 3, 256, 8), np.float32),
        "guidance": (1.0, 4.0),
        "fps": 6,
        "motion_bucket": 127,
        "noise_augmentation": 0.02,
        "initial": np.ones((1, 3, 4, 2, 2), np.float32),
    }
    return diffusion.denoise_video(network, schedule, **(given | changes))  # type: ignore[arg-type]


def keyframe_with(network: Branches, schedule: Any, **changes: Any) -> np.ndarray:
    given: dict[str, Any] = {
        "prompt_embeds": np.ones((1, 5, 3), np.float32),
        "pooled": np.ones((1, 3), np.float32),
        "time_ids": np.ones((1, 6), np.float32),
        "latents": np.ones((1, 4, 2, 2), np.float32),
        "guidance": 5.0,
        "noise": StoredNoise([]),
    }
    return diffusion.denoise_keyframe(network, schedule, **(given | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp-2m"])
def test_video_is_guided_inside_the_interval_alone(sampler: str) -> None:
    schedule = RecordingSchedule(make_schedule(VIDEO_SCHEDULER, 8, ScheduleOptions(sampler=sampler)))
    network = Branches("v")
    video_with(network, schedule, interval=(0.5, 60.0))
    inside = [0.5 <= level <= 60 for level in schedule.levels]
    assert any(inside) and not all(inside)
    assert network.rows == [2 if guided else 1 for guided in inside]
    assert network.uploads == 3, "conditions are uploaded when branches change, not at every step"
    for guided, prediction in zip(inside, schedule.predictions, strict=True):
        assert_close(prediction[0, :, 0, 0, 0], [3, 6, 9] if guided else [3, 3, 3], 1e-5)


@pytest.mark.parametrize("settings", [SchedulerSettings(kind="ddim"), SchedulerSettings(kind="euler")])
def test_keyframe_is_guided_inside_the_interval_alone(settings: SchedulerSettings) -> None:
    schedule = RecordingSchedule(make_schedule(settings, 10))
    network = Branches("noise")
    keyframe_with(network, schedule, interval=(0.3, 5.0), start=2)
    inside = [0.3 <= level <= 5 for level in schedule.levels[2:]]
    assert any(inside) and not all(inside)
    assert network.rows == [2 if guided else 1 for guided in inside]
    assert [float(p[0, 0, 0, 0]) for p in schedule.predictions] == [11.0 if guided else 3.0 for guided in inside]


def test_all_levels_are_guided_without_an_interval_and_none_at_scale_one() -> None:
    for guidance, rows in (((1.0, 4.0), [2] * 3), ((1.0, 1.0), [1] * 3)):
        network = Branches("v")
        video_with(network, make_schedule(VIDEO_SCHEDULER, 3), guidance=guidance)
        assert network.rows == rows and network.uploads == 1
    network = Branches("noise")
    keyframe_with(network, make_schedule(SchedulerSettings(kind="ddim"), 3), guidance=1.0)
    assert network.rows == [1] * 3


def test_chunks_decoded_apart_are_the_whole() -> None:
    """Frame for frame what decoding each chunk by itself gives, the short last one too."""
    vae = video_modules()["vae"]
    decoder = TorchEngine(lambda latents: {"frames": vae.decode(latents, num_frames=len(latents)).sample})
    latents = np.random.default_rng(0).standard_normal((1, 5, 4, 8, 8), dtype=np.float32)
    whole = diffusion.decode_video(decoder, latents, 0.18215, 2)
    apart = [decoder(latents=latents[0, i : i + 2] / np.float32(0.18215))["frames"] for i in (0, 2, 4)]
    assert (whole[0] == np.concatenate(apart)).all()
