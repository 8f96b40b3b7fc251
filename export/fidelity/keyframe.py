"""Golden cases of the key-frame detokenizer (i): from visual ids to a picture, fresh or after an earlier clip.

Every block of a file is one run: with Euler-ancestral or DDIM, from fresh noise or from the last frame of a clip. The
reference reads the initial noise scale before it sets the schedule (§14, quirk 5), so a first Euler-ancestral run
starts from the scale of the training schedule; such a run is started from the scale it used. It also scales re-injected
Euler latents twice (quirk 6); ours are compared with the stored ones divided by that scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from export.fidelity import configs
from export.fidelity.backends import TORCH, Engines
from export.fidelity.golden import Golden
from export.fidelity.measure import Measurement, close, pictures, relative
from export.fidelity.taps import RecordedEngine, RecordedModule, RecordingSchedule, Replay
from export.fidelity.visual import CONDITIONS, padded_codes
from runtime import diffusion
from runtime.images import resize_image, to_signed, to_uint8
from runtime.schedulers import Schedule, make_schedule
from runtime.settings import SchedulerSettings
from runtime.vocabulary import Vocabulary
from videolavit.checkpoints import Checkpoint
from videolavit.config import ModelConfig
from videolavit.reference import keyframes

LATENTS, PIXELS, ENCODED, SCHEDULE = 5e-4, 1e-4, 3e-5, 1e-6
PREFIXES = {
    "visual_tokenizer": "visual_tokenizer.",
    "keyframe_decoder": "tokenizer_decoder.",
    "keyframe_unet": "unet.",
    "keyframe_vae": "vae.",
}


class Run:
    """One block of a file: what was called and with which draws."""

    def __init__(self, golden: Golden, name: str) -> None:
        self.golden = golden
        self.name = name
        self.call: dict[str, Any] = golden.meta["calls"][name]
        ancestral = f"{name}/sigma_at_level" in golden.outputs
        kind = self.call.get("scheduler", "EulerAncestralDiscreteScheduler" if ancestral else "DDIMScheduler")
        self.settings: SchedulerSettings = configs.scheduler(kind, self.call["scheduler_config"])
        self.schedule: Schedule = make_schedule(self.settings, self.call["num_inference_steps"])
        self.level: int = self.call.get("noise_level", 0)
        self.denoises = "guidance" in self.call

    @property
    def size(self) -> tuple[int, int]:
        return self.call["width"], self.call["height"]

    @property
    def time_ids(self) -> np.ndarray:
        """[B, 6]."""
        ids = [*self.call["original_size"], *self.call["crops_coords_top_left"], *self.call["target_size"]]
        return np.array([ids] * len(self.golden.listed(self.golden.inputs, "token_ids")), np.float32)

    @property
    def step_noise(self) -> list[np.ndarray]:
        return self.golden.listed(self.golden.inputs, f"{self.name}/step_noise")

    @property
    def init_noise_sigma(self) -> np.float32:
        """The scale the run should start from: the schedule's own, or the training schedule's (quirk 5)."""
        stored, own = self.output("init_noise_sigma_used"), self.schedule.init_noise_sigma
        if not self.schedule.needs_noise:
            return own  # the same for every DDIM schedule
        training = make_schedule(self.settings, self.settings.train_steps).init_noise_sigma
        return min(own, training, key=lambda sigma: abs(float(sigma) - float(stored)))

    def stored(self, name: str) -> bool:
        return f"{self.name}/{name}" in self.golden.outputs

    def output(self, name: str) -> np.ndarray:
        return self.golden.outputs[f"{self.name}/{name}"]

    def shared_input(self, name: str) -> np.ndarray:
        """An input of this block, or of the one other block that has it."""
        own = f"{self.name}/{name}"
        inputs = self.golden.inputs
        return inputs[own if own in inputs else next(key for key in inputs if key.endswith(f"/{name}"))]

    def last_frames(self) -> np.ndarray:
        """Last frames of the clip before as [B, 3, H, W] in [-1, 1], resized as pictures (§8.3)."""
        frames = self.shared_input("last_frames_u8")
        size = self.size if "width" in self.call else _any_size(self.golden)
        return np.stack([to_signed(resize_image(frame, size)) for frame in frames])


def keyframe(golden: Golden, engines: Engines) -> Iterator[Measurement]:
    """Conditions, denoising and decoding of every run of the file."""
    checkpoint = _checkpoint(golden)
    codes, counts = padded_codes(golden, checkpoint.config.vocabulary)
    conditions = engines.engine(checkpoint, "keyframe_conditioner")(codes=codes, counts=counts)
    encoder = engines.engine(checkpoint, "keyframe_vae_encoder")
    decoder = engines.engine(checkpoint, "keyframe_vae_decoder")
    unet = engines.engine(checkpoint, "keyframe_unet")
    scaling = np.float32(checkpoint.config.keyframe_vae.scaling_factor)
    for name in golden.meta["calls"]:
        run = Run(golden, name)
        yield from _conditions(run, conditions)
        if f"{name}/initial_noise" in golden.inputs:
            start = golden.inputs[f"{name}/initial_noise"] * run.init_noise_sigma
        else:
            clean = encoder(image=run.last_frames())["latents"] * scaling
            if run.stored("image_latents"):
                yield close("latents of the last frame", clean, run.output("image_latents"), ENCODED)
            start = _noised(run, clean, torch_side=engines.name == TORCH)
            yield _re_injected(run, start)
        if not run.denoises:
            continue
        if engines.name == TORCH:
            first, predicted, steps = _denoise_torch(run, checkpoint, conditions, start)
        else:
            first, predicted, steps = _denoise_runtime(run, unet, conditions, start)
        if run.stored("unet_input_step0"):
            yield close("first UNet input", first, run.output("unet_input_step0"), ENCODED)
            yield _latents("first guided prediction", predicted, run.output("noise_pred_guided_step_0"))
        for index, latents in enumerate(steps):
            if run.stored(f"latents_after_step_{index}"):
                yield _latents("latents", latents, run.output(f"latents_after_step_{index}"))
        image = decoder(latents=steps[-1] / scaling)["image"]
        if run.stored("vae_output"):
            yield close("picture", image, run.output("vae_output"), PIXELS)
        yield pictures("picture in uint8", to_uint8(image), run.output("images_u8"))


def keyframe_host(golden: Golden) -> Iterator[Measurement]:
    """Schedules, re-injection and one step on stored predictions (§8.2, §8.3), time ids and pixels (§8.1)."""
    for name in golden.meta["calls"]:
        run = Run(golden, name)
        schedule: Any = run.schedule
        if run.stored("all_timesteps"):
            yield relative("timesteps", schedule.timesteps, run.output("all_timesteps"), SCHEDULE)
        if run.stored("timesteps_used"):
            yield relative("timesteps", schedule.timesteps[run.level :], run.output("timesteps_used"), SCHEDULE)
        if run.stored("sigmas"):
            yield relative("sigmas", schedule.sigmas, run.output("sigmas"), SCHEDULE)
        if run.stored("init_noise_sigma_used"):
            yield relative("initial noise scale", run.init_noise_sigma, run.output("init_noise_sigma_used"), SCHEDULE)
        if f"{name}/initial_noise" not in golden.inputs:
            key = next(key for key in golden.outputs if key.endswith("/image_latents"))
            yield _re_injected(run, _noised(run, golden.outputs[key], torch_side=False))
        elif run.stored("noise_pred_guided_step_0"):
            x = golden.inputs[f"{name}/initial_noise"] * run.init_noise_sigma
            noise = run.step_noise[0] if schedule.needs_noise else None
            after = schedule.step(run.output("noise_pred_guided_step_0"), 0, x, noise)
            yield _latents("latents", after, run.output("latents_after_step_0"))
        if run.stored("add_time_ids_cfg") and _uncropped(run):
            expected = run.output("add_time_ids_cfg")
            ids = np.repeat(diffusion.keyframe_time_ids(run.size), len(expected), axis=0)
            yield close("time ids", ids, expected, SCHEDULE)
        if run.stored("vae_output"):
            yield pictures("picture in uint8", to_uint8(run.output("vae_output")), run.output("images_u8"))


def _conditions(run: Run, conditions: dict[str, np.ndarray]) -> Iterator[Measurement]:
    """Both halves of the conditions: zeros, then ours."""
    for stored, ours in (("prompt_embeds_cfg", "prompt_embeds"), ("pooled_cfg", "pooled")):
        if run.stored(stored):
            both = np.concatenate([np.zeros_like(conditions[ours]), conditions[ours]])
            what = "prompt embeddings" if ours == "prompt_embeds" else "pooled embedding"
            yield close(what, both, run.output(stored), CONDITIONS)


def _noised(run: Run, clean: np.ndarray, *, torch_side: bool) -> np.ndarray:
    """Clean latents at the noise of the run's level."""
    noise = run.shared_input("noise")
    if not torch_side:
        return run.schedule.add_noise(clean, noise, run.level)
    replay: Any = Replay([noise])
    steps = run.call["num_inference_steps"]
    return keyframes.noised(torch.from_numpy(clean), run.settings, steps=steps, level=run.level, noise=replay).numpy()


def _re_injected(run: Run, start: np.ndarray) -> Measurement:
    expected = run.output("noised_latents")
    if run.stored("init_noise_sigma"):
        expected = expected / run.output("init_noise_sigma")
    return close("re-injected latents", start, expected, ENCODED)


_Denoised = tuple[np.ndarray, np.ndarray, list[np.ndarray]]  # first input, first guided prediction, latents per step


def _denoise_runtime(run: Run, unet: Any, conditions: dict[str, np.ndarray], start: np.ndarray) -> _Denoised:
    network: Any = RecordedEngine(unet)
    schedule: Any = RecordingSchedule(run.schedule)
    noise: Any = Replay(run.step_noise)
    diffusion.denoise_keyframe(
        network,
        schedule,
        prompt_embeds=conditions["prompt_embeds"],
        pooled=conditions["pooled"],
        time_ids=run.time_ids,
        latents=start,
        guidance=run.call["guidance"],
        noise=noise,
        start=run.level,
    )
    return network.first["latents"], schedule.predictions[0], schedule.latents


@torch.inference_mode()
def _denoise_torch(run: Run, checkpoint: Checkpoint, conditions: dict[str, np.ndarray], start: np.ndarray) -> _Denoised:
    unet: Any = checkpoint.component("keyframe_unet")
    noise: Any = Replay(run.step_noise)
    guidance = run.call["guidance"]
    with RecordedModule(unet) as recorded:
        steps = list(
            keyframes.denoise(
                unet,
                run.settings,
                torch.from_numpy(conditions["prompt_embeds"]),
                torch.from_numpy(conditions["pooled"]),
                torch.from_numpy(run.time_ids),
                size=run.size,
                steps=run.call["num_inference_steps"],
                guidance=guidance,
                noise=noise,
                start=torch.from_numpy(start),
                level=run.level,
            )
        )
    without, given = recorded.outputs[0].sample.chunk(2)
    guided = without + guidance * (given - without)
    return recorded.inputs[0][0].numpy(), guided.numpy(), [latents.numpy() for latents in steps]


def _latents(what: str, actual: np.ndarray, expected: np.ndarray) -> Measurement:
    return close(what, actual, expected, LATENTS * max(1.0, float(np.abs(expected).max()) / 4))


def _uncropped(run: Run) -> bool:
    return run.call["original_size"] == run.call["target_size"] and not any(run.call["crops_coords_top_left"])


def _any_size(golden: Golden) -> tuple[int, int]:
    return next((call["width"], call["height"]) for call in golden.meta["calls"].values() if "width" in call)


def _checkpoint(golden: Golden) -> Checkpoint:
    c = golden.config
    decoder = configs.keyframe_decoder(c["decoder"])
    model = ModelConfig(
        name="golden",
        vocabulary=Vocabulary(visual_codes=c["n_code"]),
        visual_tokenizer=configs.codebook_only(c["n_code"], decoder.code_dim),
        keyframe_decoder=decoder,
        keyframe_unet=configs.keyframe_unet(c["unet"]),
        keyframe_vae=configs.keyframe_vae(c["vae"]),
    )
    return configs.checkpoint(golden, model, PREFIXES, partial=("visual_tokenizer",))
