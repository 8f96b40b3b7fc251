"""Stage `video-vae`: the autoencoder of the video model (reference semantics §9.2). Its decoder convolves over time.

As in Stable Video Diffusion the encoder is that of an image autoencoder and stays as it is; the decoder starts as the
image decoder, with every temporal layer doing nothing, and is trained on short runs of consecutive frames. Objective:
absolute plus squared error, and the absolute error of the change from frame to frame, which is what flickers.

Contract: the image autoencoder's weights fit when `keyframe_vae` and `video_vae` agree in widths, layers and norm
groups. Latents times the video model's scaling factor are the image autoencoder's latents times the image model's.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, ClassVar, Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runtime.errors import UsageError
from videolavit.config import ModelConfig
from videolavit.models.components import build
from videolavit.training.data import open_source
from videolavit.training.settings import Count, CountOrNone, DataSettings, NotNegative, Share
from videolavit.training.stage import Stage, StageContext
from videolavit.training.stages.held_out import held_out
from videolavit.training.stages.keyframe_vae import rescale
from videolavit.training.stages.pictures import FrameRuns, psnr, signed, windows_or_whole

VALIDATION = 4  # runs of frames


class VideoVaeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the stage `video-vae`.

    Attributes:
        start: "keyframe-vae" takes the image autoencoder's weights, "checkpoint" goes on with the video VAE's own.
        frames: length of a run; the decoder is used on runs of `decode_chunk` frames.
        crop: side of the windows, pixels; 0: whole frames.
        whole: share of the steps that see whole frames, of as many runs as have the area of the batch's windows.
        squares: weight of the squared error; the absolute error has 1.
        change: weight of the error of the change from frame to frame.
        noise: deviation of noise on the latents, a share of their own: what the video model leaves in them.
    """

    start: Literal["keyframe-vae", "checkpoint"] = "keyframe-vae"
    frames: Count = 6
    crop: CountOrNone = 64
    whole: Share = 0.15
    squares: NotNegative = 1.0
    change: NotNegative = 0.5
    noise: NotNegative = 0.05


class VideoVaeModule(nn.Module):
    """The temporal decoder and its loss."""

    decoder: Any

    def __init__(self, decoder: Any, options: VideoVaeOptions) -> None:
        super().__init__()
        self.decoder = decoder
        self.options = options

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass; without the rest of its model the decoder cannot be asked."""
        self.decoder.gradient_checkpointing = True
        self.decoder._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def forward(self, batch: dict[str, Any], generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """Losses of what `VideoVaeStage.prepare` gives: frames [B, T, 3, H, W], latents [B, T, 4, H / 8, W / 8]."""
        frames, latents = batch["frames"], batch["latents"]
        error = decode(self.decoder, latents) - frames
        absolute, squared = error.abs().mean(), error.square().mean()
        loss = absolute + self.options.squares * squared
        parts = {"absolute": absolute.detach(), "squared": squared.detach()}
        if frames.shape[1] > 1:
            change = error.diff(dim=1).abs().mean()
            loss = loss + self.options.change * change
            parts["change"] = change.detach()
        return {"loss": loss, **parts}


def decode(decoder: Any, latents: Tensor) -> Tensor:
    """latents [B, T, 4, h, w] -> frames [B, T, 3, 8h, 8w]; the temporal decoder takes frames in its batch axis."""
    count, length = latents.shape[:2]
    indicator = torch.zeros(count, length, dtype=latents.dtype, device=latents.device)
    return decoder(latents.flatten(0, 1), indicator, num_frames=length).unflatten(0, (count, length))


class VideoVaeStage(Stage):
    """Trains the decoder of `video_vae`."""

    name = "video-vae"
    trains = ("video_vae",)
    Options: ClassVar[type[msgspec.Struct]] = VideoVaeOptions
    module: VideoVaeModule

    def __init__(self, context: StageContext, options: VideoVaeOptions) -> None:
        super().__init__(context, options)
        source = context.checkpoint
        config = source.config
        self.geometry = config.geometry
        if not 1 <= options.frames <= self.geometry.frames:
            raise UsageError(f"options.frames {options.frames}: a clip has {self.geometry.frames} frames")
        self.scaling = config.video_vae.scaling_factor
        vae: Any = build(config, "video_vae")
        if options.start == "keyframe-vae":
            start(vae, source.component("keyframe_vae"), config)
        else:
            vae.load_state_dict(source.component("video_vae").state_dict())
        self.frozen = vae.eval().requires_grad_(False).to(context.device)  # its decoder is not used
        self.module = VideoVaeModule(copy.deepcopy(vae.decoder).requires_grad_(True).train(), options)

    def dataset(self) -> FrameRuns:
        """Runs of consecutive frames, each with the corner of a window."""
        return self._runs(self.context.data, self.options.crop)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Windows (or whole frames) and the latents of each frame."""
        frames = signed(windows_or_whole(batch, self.options.crop, self.options.whole, generator))  # [B, T, 3, h, w]
        latents = self._encode(frames)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        return {"frames": frames, "latents": latents + self.options.noise / self.scaling * noise}

    def validate(self, generator: torch.Generator) -> dict[str, float]:
        """PSNR of whole frames of runs that are as long as a decoding chunk; `change`: error of their change, 0..2.

        The runs are held out where the source has a split for that, else the source's first.
        """
        length = min(self.context.checkpoint.config.defaults.decode_chunk, self.geometry.frames)
        runs = self._runs(held_out(self.context.data), 0, length)
        figures, changes = [], []
        for index in range(min(VALIDATION, len(runs))):
            frames = signed(runs[index]["frames"][None]).to(self.context.device)  # [1, T, 3, H, W]
            decoded = decode(self.module.decoder, self._encode(frames))
            figures.append(psnr(decoded[0], frames[0]))
            changes.append((decoded - frames).diff(dim=1).abs().mean())
        every = torch.cat(figures)
        return {
            "psnr": every.mean().item(),
            "psnr_worst": every.min().item(),
            "change": torch.stack(changes).mean().item(),
        }

    def components(self) -> dict[str, dict[str, Tensor]]:
        """The frozen encoder with the trained decoder."""
        trained = {f"decoder.{name}": tensor for name, tensor in self.module.decoder.state_dict().items()}
        return {"video_vae": {**self.frozen.state_dict(), **trained}}

    def _encode(self, frames: Tensor) -> Tensor:
        """frames [B, T, 3, H, W] in [-1, 1] -> latents [B, T, 4, h, w], not scaled."""
        return self.frozen.encode(frames.flatten(0, 1)).latent_dist.mode().unflatten(0, frames.shape[:2])

    def _runs(self, data: DataSettings, crop: int, frames: int | None = None) -> FrameRuns:
        source = open_source(data, self.geometry, seed=self.context.seed)
        size = self.geometry.video_size
        return FrameRuns(source, size, self.context.seed, frames=frames or self.options.frames, crop=crop)


@torch.no_grad()
def start(vae: Any, image: Any, config: ModelConfig) -> None:
    """Make the video autoencoder `vae` one that treats every frame as the image autoencoder `image` does.

    Exact but for the border of the latents, where the image decoder's `post_quant_conv` adds its bias before padding.

    Raises:
        UsageError: the two differ in widths, layers or norm groups.
    """
    if config.keyframe_vae.norm_groups != config.video_vae.norm_groups:
        raise UsageError(
            f"options.start keyframe-vae: it has {config.keyframe_vae.norm_groups} norm groups, the video VAE "
            f'{config.video_vae.norm_groups}; make them equal, or use start = "checkpoint"'
        )
    state = vae.state_dict()
    taken = {video_name(name, state): tensor.clone() for name, tensor in image.state_dict().items()}
    misfits = [name for name, tensor in taken.items() if name not in state or state[name].shape != tensor.shape]
    misfits = [name for name in misfits if not name.startswith("post_quant_conv.")]
    if misfits:
        raise UsageError(
            f"options.start keyframe-vae: {len(misfits)} of its tensors do not fit the video VAE, {misfits[0]} is the "
            'first; give both the same block_out_channels and layers_per_block, or use start = "checkpoint"'
        )
    _still(state)
    before = image.post_quant_conv
    weight = taken["decoder.conv_in.weight"]  # [C, 4, 3, 3]
    taken["decoder.conv_in.bias"] += weight.sum((2, 3)) @ before.bias
    taken["decoder.conv_in.weight"] = torch.einsum("oiyx,ij->ojyx", weight, before.weight[..., 0, 0])
    vae.load_state_dict({**state, **{name: tensor for name, tensor in taken.items() if name in state}})
    # The same latents in the units of the other scaling factor.
    gain = torch.full(
        (vae.config.latent_channels,), config.keyframe_vae.scaling_factor / config.video_vae.scaling_factor
    )
    rescale(vae.quant_conv, torch.zeros_like(gain), gain)
    vae.decoder.conv_in.weight /= gain[None, :, None, None]


def video_name(name: str, state: dict[str, Tensor]) -> str:
    """Where the image autoencoder's tensor `name` is in the video autoencoder."""
    parts = name.split(".")
    if name not in state and "resnets" in parts:
        parts.insert(parts.index("resnets") + 2, "spatial_res_block")
    return ".".join(parts)


def _still(state: dict[str, Tensor]) -> None:
    """Let the temporal layers of a decoder pass on what they get: the residual ones add nothing."""
    for name, tensor in state.items():
        if ".temporal_res_block.conv2." in name or name.startswith("decoder.time_conv_out."):
            tensor.zero_()
    kernel = state["decoder.time_conv_out.weight"]  # [3, 3, 3, 1, 1]
    for channel in range(len(kernel)):
        kernel[channel, channel, kernel.shape[2] // 2] = 1.0
