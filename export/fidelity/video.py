"""Golden cases of the video detokenizer (g, h): its UNet, and the way from key frame and motion to frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from export.fidelity import configs
from export.fidelity.backends import Engines
from export.fidelity.golden import Golden
from export.fidelity.measure import Measurement, close, equal, pictures, relative
from export.fidelity.motion import CONTEXT, RECONSTRUCTION
from export.fidelity.taps import RecordedEngine, RecordedModule, RecordingSchedule, Replay
from runtime import diffusion
from runtime.geometry import CONTEXT_GRID, VAE_FACTOR, Geometry
from runtime.images import to_uint8
from runtime.motion.grid import TOKENIZER_SCALE
from runtime.resize import bicubic
from runtime.schedulers import make_schedule
from runtime.settings import SchedulerSettings
from runtime.vocabulary import Vocabulary
from videolavit.checkpoints import Checkpoint
from videolavit.config import ModelConfig, MotionConditionConfig
from videolavit.reference import clips

UNET, LATENTS, FIRST_LATENTS, PREDICTION, SCHEDULE = 2e-5, 5e-4, 2e-3, 3e-4, 1e-6
TAPS = {
    "tap_down0_res0": "down_blocks.0.resnets.0",
    "tap_down0_attn0": "down_blocks.0.attentions.0",
    "tap_mid": "mid_block",
}
PREFIXES = {
    "motion_tokenizer": "motion_tokenizer.",
    "motion_encoder": "motion_encoder.",
    "video_unet": "unet.",
    "video_vae": "vae.",
}


def unet(golden: Golden, engines: Engines) -> Iterator[Measurement]:
    """Video UNet (reference semantics §9.1) at every stored size, through one engine."""
    inputs = golden.inputs
    checkpoint = _unet_checkpoint(golden)
    engine = engines.engine(checkpoint, "video_unet")
    engine.hold(states=inputs["encoder_hidden_states"], time_ids=inputs["added_time_ids"])
    for size in _sizes(golden):
        found = engine(sample=inputs[f"{size}/sample"], timestep=inputs[f"{size}/timestep"].reshape(1))
        rows, columns = inputs[f"{size}/sample"].shape[-2:]
        yield close(f"prediction at {rows}x{columns}", found["v"], golden.outputs[f"{size}/out"], UNET)


def unet_torch(golden: Golden, engines: Engines) -> Iterator[Measurement]:
    """`unet`, and what its inner modules give."""
    yield from unet(golden, engines)
    module = _unet_checkpoint(golden).component("video_unet")
    inputs = golden.inputs
    shared = [torch.from_numpy(inputs[name]) for name in ("encoder_hidden_states", "added_time_ids")]
    for size in _sizes(golden):
        for tap, place in TAPS.items():
            recorded = RecordedModule(module.get_submodule(place))
            with recorded, torch.inference_mode():
                module(*(torch.from_numpy(inputs[f"{size}/{name}"]) for name in ("sample", "timestep")), *shared)
            name = f"{size}/{tap}_frame0"
            if name in golden.outputs:
                yield close(f"output of {place}", recorded.outputs[0][:1], golden.outputs[name], UNET)


def detokenizer_torch(golden: Golden, engines: Engines) -> Iterator[Measurement]:
    """The torch reference's loop with diffusers' scheduler (§9.2 to §9.4)."""
    call, inputs = golden.meta["call"], golden.inputs
    checkpoint, settings = _checkpoint(golden), _scheduler(golden)
    module: Any = checkpoint.component
    noise: Any = Replay([inputs["image_noise"], inputs["initial_noise"]])
    with torch.inference_mode():
        motion = _motion(golden, checkpoint, engines)
        yield close("motion", motion, golden.outputs["motion_at_latent_size"], RECONSTRUCTION)
        field = torch.from_numpy(motion)
        states = module("motion_encoder").encode(field)
        yield close("motion states", states[:, :2], golden.outputs["motion_conditions_frames01"], CONTEXT)
        image = clips.augment(torch.from_numpy(inputs["image"]), call["noise_aug_strength"], noise)
        image_latents = clips.encode(module("video_vae"), image)
        yield close("image latents", image_latents, golden.outputs["image_latents"], CONTEXT)
        time_ids = torch.tensor([[*_micro_conditions(call)]] * len(image), dtype=torch.float32)
        with RecordedModule(module("video_unet")) as recorded:
            steps = list(
                clips.denoise(
                    module("video_unet"),
                    settings,
                    image_latents,
                    field,
                    states,
                    time_ids,
                    steps=call["num_inference_steps"],
                    guidance=_guidance(call),
                    noise=noise,
                )
            )
        yield close("time ids", recorded.inputs[0][3], golden.outputs["added_time_ids"], SCHEDULE)
        yield close(
            "first UNet input", recorded.inputs[0][0][:, :1], golden.outputs["unet_input_step0_frame0"], CONTEXT
        )
        without, given = recorded.outputs[0].chunk(2)
        guided = without + torch.from_numpy(golden.outputs["guidance_scale"]) * (given - without)
        yield close("first guided prediction", guided, golden.outputs["noise_pred_guided_step_0"], PREDICTION)
        yield from _latents(golden, [latents.numpy() for latents in steps])
        frames = clips.decode(module("video_vae"), steps[-1], golden.meta["decode_chunk_size_effective"])
    yield from _frames(golden, frames.numpy())


def detokenizer_engines(golden: Golden, engines: Engines) -> Iterator[Measurement]:
    """The runtime's loop over engines."""
    call, inputs, outputs = golden.meta["call"], golden.inputs, golden.outputs
    checkpoint = _checkpoint(golden)
    motion = _motion(golden, checkpoint, engines)
    yield close("motion", motion, outputs["motion_at_latent_size"], RECONSTRUCTION)
    context = bicubic(motion, (CONTEXT_GRID, CONTEXT_GRID))
    states = engines.engine(checkpoint, "motion_conditioner")(motion=context)["states"]
    yield close("motion states", states[:, :2], outputs["motion_conditions_frames01"], CONTEXT)
    image = inputs["image"] + np.float32(call["noise_aug_strength"]) * inputs["image_noise"]
    image_latents = engines.engine(checkpoint, "video_vae_encoder")(image=image)["latents"]
    yield close("image latents", image_latents, outputs["image_latents"], CONTEXT)
    network: Any = RecordedEngine(engines.engine(checkpoint, "video_unet"))
    schedule: Any = RecordingSchedule(make_schedule(_scheduler(golden), call["num_inference_steps"]))
    fps, bucket, strength = _micro_conditions(call)
    latents = diffusion.denoise_video(
        network,
        schedule,
        image_latents=image_latents,
        motion=motion,
        states=states,
        guidance=_guidance(call),
        fps=fps,
        motion_bucket=bucket,
        noise_augmentation=strength,
        initial=inputs["initial_noise"],
    )
    yield close("time ids", network.first["time_ids"], outputs["added_time_ids"], SCHEDULE)
    yield close("first UNet input", network.first["sample"][:, :1], outputs["unet_input_step0_frame0"], CONTEXT)
    yield close("first guided prediction", schedule.predictions[0], outputs["noise_pred_guided_step_0"], PREDICTION)
    yield from _latents(golden, schedule.latents)
    decoder = engines.engine(checkpoint, "video_vae_decoder")
    chunk, scaling = golden.meta["decode_chunk_size_effective"], checkpoint.config.video_vae.scaling_factor
    yield from _frames(golden, diffusion.decode_video(decoder, latents, scaling, chunk))


def detokenizer_host(golden: Golden) -> Iterator[Measurement]:
    """Schedule, one step on the stored prediction, guidance ramp, and pixels (§9.3, §9.4)."""
    call, outputs = golden.meta["call"], golden.outputs
    schedule: Any = make_schedule(_scheduler(golden), call["num_inference_steps"])
    yield relative("sigmas", schedule.sigmas, outputs["sigmas"], SCHEDULE)
    yield relative("timesteps", schedule.timesteps, outputs["timesteps"], SCHEDULE)
    yield relative("initial noise scale", schedule.init_noise_sigma, outputs["init_noise_sigma"], SCHEDULE)
    x = golden.inputs["initial_noise"] * schedule.init_noise_sigma
    after = schedule.step(outputs["noise_pred_guided_step_0"], 0, x)
    yield close("latents after step 0", after, outputs["latents_after_step_0"], FIRST_LATENTS)
    shown = to_uint8(outputs["frames_float"].swapaxes(1, 2))  # [B, n, H, W, 3]
    ends = [0, golden.inputs["initial_noise"].shape[1] - 1]
    indices = outputs["frames_float_indices"].tolist()
    both = shown[:, [indices.index(frame) for frame in ends if frame in indices]]
    stored = outputs["frames_u8_first_last"][:, [i for i, frame in enumerate(ends) if frame in indices]]
    yield pictures("frames in uint8", both, stored)


def _latents(golden: Golden, steps: list[np.ndarray]) -> Iterator[Measurement]:
    stored = [name for name in golden.outputs if name.startswith("latents_after_step_")]
    yield equal("denoising steps", [len(steps)], [golden.meta["call"]["num_inference_steps"]])
    for index, latents in enumerate(steps):
        name = f"latents_after_step_{index}"
        last = index == len(steps) - 1
        if name in stored:
            what = "final latents" if last else "latents after a step"
            yield close(what, latents, golden.outputs[name], LATENTS if last else FIRST_LATENTS)


def _frames(golden: Golden, frames: np.ndarray) -> Iterator[Measurement]:
    """Frames [B, T, 3, H, W] in about [-1, 1]."""
    shown = frames.swapaxes(1, 2)[:, :, golden.outputs["frames_float_indices"]]  # [B, 3, n, H, W]
    yield close("frames", shown, golden.outputs["frames_float"], LATENTS)
    yield pictures("frames in uint8", to_uint8(frames[:, [0, -1]]), golden.outputs["frames_u8_first_last"])


def _motion(golden: Golden, checkpoint: Checkpoint, engines: Engines) -> np.ndarray:
    """Motion [B, 2, T, h, w] at latent size: the input itself, or decoded from tokens, given or its own (§9.4)."""
    call, motion = golden.meta["call"], golden.inputs["motion"]
    through_tokens = call.get("quantize_motion", False)
    if not call["decode_from_token"] and not through_tokens:
        return motion
    codes = engines.engine(checkpoint, "motion_encoder")(motion=motion)["codes"] if through_tokens else motion
    decoded = engines.engine(checkpoint, "motion_decoder")(codes=codes)["motion"]
    size = call["height"] // VAE_FACTOR, call["width"] // VAE_FACTOR
    return engines.resize(decoded, size) / np.float32(TOKENIZER_SCALE)


def _guidance(call: dict[str, Any]) -> tuple[float, float]:
    """Guidance of the first and the last frame; what a call leaves out is the official default (§9.4)."""
    return call.get("min_guidance_scale", 1.0), call.get("max_guidance_scale", 4.0)


def _micro_conditions(call: dict[str, Any]) -> tuple[int, int, float]:
    return call.get("fps", 6), call.get("motion_bucket_id", 127), call["noise_aug_strength"]


def _scheduler(golden: Golden) -> SchedulerSettings:
    return configs.scheduler("EulerDiscreteScheduler", golden.config["scheduler"])


def _checkpoint(golden: Golden) -> Checkpoint:
    c = golden.config
    tokenizer = configs.motion_tokenizer(c["motion_tokenizer"])
    frames = golden.inputs["initial_noise"].shape[1]
    model = ModelConfig(
        name="golden",
        vocabulary=Vocabulary(motion_codes=tokenizer.codes),
        geometry=Geometry(frames=frames, motion_grid=tokenizer.grid),
        motion_tokenizer=tokenizer,
        motion_encoder=configs.motion_encoder(c["motion_encoder"]),
        video_unet=configs.video_unet(c["unet"]),
        video_vae=configs.video_vae(c["vae"]),
    )
    return configs.checkpoint(golden, model, PREFIXES)


def _unet_checkpoint(golden: Golden) -> Checkpoint:
    config = configs.video_unet(golden.config)
    frames, context, width = golden.inputs["encoder_hidden_states"].shape[1:]
    side = round(context**0.5)
    model = ModelConfig(
        name="golden",
        video_unet=config,
        motion_encoder=MotionConditionConfig(grid=(side, side), out_dim=width),
    )
    return configs.checkpoint(golden, configs.with_frames(model, frames), {"video_unet": ""})


def _sizes(golden: Golden) -> list[str]:
    return [name.partition("/")[0] for name in golden.inputs if name.endswith("/sample")]
