"""What a UNet sees while it denoises: ranges to quantise its activations with, and inputs to compare engines on.

Contract: the inputs are those of the torch pipeline's own denoising loops, over scenes drawn here from a seed: a key
frame from the visual tokens of the scene's picture, a clip from that picture and the scene's motion tokens. Both halves
of guidance and every level of noise are seen. The result depends on the checkpoint, the size and `Calibration` alone.
Memory holds the components that make the conditions first, and then the UNet alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from export.settings import EIGHT_BITS, EngineSettings
from runtime.geometry import MACROBLOCK
from runtime.images import resize_image, to_signed
from runtime.noise import Noise
from runtime.requests import ImageRequest, ReconstructionRequest
from runtime.tokenizers import TextTokenizer
from videolavit.checkpoints import Checkpoint
from videolavit.models.keyframe_decoder import pad_codes
from videolavit.reference import Reference, clips, keyframes

Arrays = dict[str, np.ndarray]
_STEPS_PER_OCTAVE = 16  # of the grid that clipping magnitudes are chosen from: at most 4 % of a range is lost to it
_LOWEST, _HIGHEST = -24, 24  # octaves of the grid
BOXES, PAN, MOTION = 4, 0.05, 0.2  # of a scene: standard deviations of the background's and a box's motion
_SAMPLE = 1 << 20  # elements of a tensor that are counted


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """What is denoised.

    Attributes:
        seeds: of the scenes, and of the noise that each is denoised from.
        steps: of a denoising loop.
    """

    seeds: tuple[int, ...] = (0, 1)
    steps: int = 6


CALIBRATION = Calibration()
HELD_OUT = Calibration(seeds=(2,), steps=3)
# Components the conditions are made from, beside the UNet itself.
CONDITIONS = {
    "keyframe_unet": ("visual_tokenizer", "keyframe_decoder"),
    "video_unet": ("motion_tokenizer", "motion_encoder", "video_vae"),
}


class Clip(msgspec.Struct, frozen=True):
    """Magnitudes that codes of a product's input, and of a convolution's result before its bias, reach up to.

    Attributes:
        inputs: of evenly spaced codes; what is larger is cut.
        largest: of the inputs, nothing cut.
        results: as `inputs`; None for matrix products.
    """

    inputs: float
    largest: float
    results: float | None


def calibrated_with(name: str, settings: EngineSettings) -> tuple[str, ...]:
    """Components on which the files of engine `name` depend although it is not made from them."""
    return CONDITIONS.get(name, ()) if settings.precision in EIGHT_BITS else ()


def calibrate(
    checkpoint: Checkpoint, name: str, settings: EngineSettings, calibration: Calibration = CALIBRATION
) -> dict[str, Clip]:
    """Where to clip the activations of UNet `name`, by the name of the weight they are multiplied with.

    Denoises at the first size of the settings' buckets, or at the model's own.
    """
    run = _loops(checkpoint, name, calibration, settings)
    unet = checkpoint.component(name)
    with _Watch(unet) as watch:
        for _ in run():
            pass
    checkpoint.release()
    results = {tensor: seen.clip() for tensor, seen in watch.results.items()}
    return {
        tensor: Clip(seen.clip(), seen.largest or 1.0, results.get(tensor)) for tensor, seen in watch.inputs.items()
    }


def denoised(checkpoint: Checkpoint, name: str, calibration: Calibration = HELD_OUT) -> Iterator[tuple[Arrays, Arrays]]:
    """Inputs of engine `name`, a UNet, at every step of the loops, and what torch makes of them.

    The default is a scene that `calibrate` does not see by itself.
    """
    run = _loops(checkpoint, name, calibration, EngineSettings())
    seen: list[tuple[Arrays, Arrays]] = []
    handle = checkpoint.component(name).register_forward_hook(
        lambda module, args, kwargs, result: seen.append(_engine_view(name, args, kwargs, result)), with_kwargs=True
    )
    try:
        for _ in run():
            yield seen.pop()
    finally:
        handle.remove()


def scene(seed: int, frames: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A soft background with hard-edged boxes on it, all of them moving.

    Returns: a picture [H, W, 3] uint8 of `size` (width, height), and motion [frames, 2, rows, columns] float32 on the
    grid of macroblocks, x1 scale.
    """
    generator = np.random.default_rng(seed)
    width, height = size
    picture = resize_image(generator.integers(0, 256, (5, 7, 3), dtype=np.uint8), size).copy()
    speed = 1 + 0.5 * np.sin(np.arange(frames) / 4 + seed)[:, None, None, None]  # changes over a clip
    grid = np.empty((frames, 2, -(-height // MACROBLOCK), -(-width // MACROBLOCK)), np.float32)
    grid[:] = speed * generator.normal(0, PAN, (2, 1, 1))
    for _ in range(BOXES):
        left, top = generator.uniform(0, 0.7, 2)
        right, bottom = left + generator.uniform(0.1, 0.4), top + generator.uniform(0.1, 0.4)
        picture[_span(top, bottom, height), _span(left, right, width)] = generator.integers(0, 256, 3)
        rows, columns = _span(top, bottom, grid.shape[2]), _span(left, right, grid.shape[3])
        grid[:, :, rows, columns] = speed * generator.normal(0, MOTION, (2, 1, 1))
    return picture, grid


def _span(start: float, end: float, size: int) -> slice:
    """At least one of `size` places, from and to a share of them."""
    return slice(int(start * size), int(end * size) + 1)


def _loops(
    checkpoint: Checkpoint, name: str, calibration: Calibration, settings: EngineSettings
) -> Callable[[], Iterator[Tensor]]:
    """The denoising loops of all scenes, one after the other, their conditions made and only the UNet to be loaded."""
    make, sizes, own = {
        "keyframe_unet": (_keyframe, settings.buckets.image_sizes, checkpoint.config.geometry.keyframe_size),
        "video_unet": (_clip, settings.buckets.video_sizes, checkpoint.config.geometry.video_size),
    }[name]
    size = sizes[0] if sizes else own
    reference = Reference(checkpoint, checkpoint.config, cast(TextTokenizer, None))  # no text is read
    with torch.inference_mode():
        loops = [make(reference, seed, size, calibration.steps) for seed in calibration.seeds]
    checkpoint.release()

    def run() -> Iterator[Tensor]:
        with torch.inference_mode():
            for loop in loops:
                yield from loop(checkpoint.component(name))

    return run


def _keyframe(
    reference: Reference, seed: int, size: tuple[int, int], steps: int
) -> Callable[[nn.Module], Iterator[Tensor]]:
    noise, config = Noise(seed), reference.config
    picture, _ = scene(seed, config.geometry.frames, size)
    settings = reference.settings(ImageRequest(image=picture, size=size, keyframe_steps=steps))
    codes = config.vocabulary.visual_codes_of(reference.picture_ids(picture, noise)).tolist()
    padded, counts = pad_codes([codes], config.geometry.patches)
    vectors = reference.module("visual_tokenizer").quantize.lookup(padded)
    prompt, pooled = reference.module("keyframe_decoder")(vectors, counts)
    return lambda unet: keyframes.denoise(
        unet,
        config.keyframe_scheduler,
        prompt,
        pooled,
        keyframes.size_ids(size, prompt),
        size=size,
        steps=steps,
        guidance=settings.image_guidance,
        noise=noise,
    )


def _clip(
    reference: Reference, seed: int, size: tuple[int, int], steps: int
) -> Callable[[nn.Module], Iterator[Tensor]]:
    noise, config = Noise(seed), reference.config
    picture, grid = scene(seed, config.geometry.frames, size)
    settings = reference.settings(ReconstructionRequest(keyframe=picture, motion=grid, size=size, video_steps=steps))
    motion = reference.motion_of(reference.motion_ids(grid * np.float32(10)), size)
    strength = settings.noise_augmentation
    signed = clips.augment(reference.tensor(to_signed(picture))[None], strength, noise)
    latents = clips.encode(reference.module("video_vae"), signed)
    states = reference.module("motion_encoder").encode(motion)
    time_ids = torch.tensor([[config.geometry.fps, settings.motion_bucket, strength]], dtype=torch.float32)
    return lambda unet: clips.denoise(
        unet,
        config.video_scheduler,
        latents,
        motion,
        states,
        time_ids,
        steps=steps,
        guidance=settings.video_guidance,
        noise=noise,
    )


def _engine_view(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[Arrays, Arrays]:
    """A call of the UNet as the inputs and outputs of its engine."""
    if name == "keyframe_unet":
        latents, timestep = args
        added = kwargs["added_cond_kwargs"]
        inputs = {
            "latents": latents,
            "timestep": timestep,
            "prompt_embeds": kwargs["encoder_hidden_states"],
            "pooled": added["text_embeds"],
            "time_ids": added["time_ids"],
        }
        outputs = {"noise": result.sample}
    else:
        inputs = dict(zip(("sample", "timestep", "states", "time_ids"), args, strict=True))
        outputs = {"v": result}
    inputs["timestep"] = inputs["timestep"].reshape(1)
    return {key: value.float().numpy() for key, value in inputs.items()}, {k: v.numpy() for k, v in outputs.items()}


class _Watch(TorchFunctionMode):
    """Counts the magnitudes of what each weight of a module is multiplied with, and of results of convolutions."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inputs: dict[str, _Magnitudes] = {}
        self.results: dict[str, _Magnitudes] = {}
        self._names = {tensor.data_ptr(): name for name, tensor in module.named_parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (F.linear, F.conv2d):
            values, weight, bias = args[:3]
            name = self._names.get(weight.data_ptr())  # by address: a weight may come as a view with an axis less
            if name is not None:
                self.inputs.setdefault(name, _Magnitudes()).add(values)
                if func is F.conv2d:
                    exact = result if bias is None else result - bias[:, None, None]
                    self.results.setdefault(name, _Magnitudes()).add(exact)
        return result


class _Magnitudes:
    """Histogram of magnitudes on a grid of equal ratios, which is the same for every tensor and machine."""

    def __init__(self) -> None:
        self.counts = np.zeros((_HIGHEST - _LOWEST) * _STEPS_PER_OCTAVE, np.int64)
        self.largest = 0.0

    def add(self, values: Tensor) -> None:
        flat = values.detach().reshape(-1)
        self.largest = max(self.largest, float(flat.abs().max()))
        sample = flat[:: flat.numel() // _SAMPLE | 1].abs()  # an odd stride: not always the same column
        places = _STEPS_PER_OCTAVE * (torch.log2(sample) - _LOWEST)
        found = torch.bincount(places.clamp(0, len(self.counts) - 1).long(), minlength=len(self.counts))
        self.counts += found.numpy()

    def clip(self) -> float:
        """The magnitude with the least squared error of 8-bit codes: steps of 1/127 of it, and what lies above cut."""
        edges = 2.0 ** (_LOWEST + np.arange(1, len(self.counts) + 1) / _STEPS_PER_OCTAVE)  # upper
        last = int(np.searchsorted(edges, self.largest))
        if self.largest == 0:
            return 1.0
        middles = edges * 2 ** (-0.5 / _STEPS_PER_OCTAVE)
        candidates = range(max(0, last - 4 * _STEPS_PER_OCTAVE), min(last, len(edges) - 1) + 1)
        errors = [
            self.counts[: i + 1].sum() * (edges[i] / 127) ** 2 / 12
            + (self.counts[i + 1 :] * (middles[i + 1 :] - edges[i]) ** 2).sum()
            for i in candidates
        ]
        return float(edges[candidates[int(np.argmin(errors))]])
