"""Stage `keyframe-vae`: the image autoencoder of the key-frame model, from nothing (reference semantics §8.1).

Objective: absolute plus squared error of the reconstruction from sampled latents, and a small Kullback-Leibler term.
There is no perceptual or adversarial loss: both need networks trained elsewhere.

Most steps see windows of a picture, at the same cost many more of them; the others see whole pictures, so that the
attention in the middle meets the sizes it will be used at.

Contract: during training latents have about unit size. What is published is the same autoencoder with an affine map of
every latent channel folded into `quant_conv` and undone in `post_quant_conv` (both are 1x1, so this is exact): on a
fixed sample of training pictures, latents times the configured scaling factor have mean 0 and deviation 1.
"""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor, nn

from videolavit.models.components import build
from videolavit.training.data import open_source
from videolavit.training.settings import CountOrNone, DataSettings, NotNegative, Positive, Share
from videolavit.training.stage import Stage, StageContext
from videolavit.training.stages.clips import stacked
from videolavit.training.stages.held_out import held_out
from videolavit.training.stages.pictures import FrameRuns, psnr, signed, windows_or_whole
from videolavit.training.stages.starting import silence_branches

SAMPLE = 32  # pictures on which the size of the latents is measured
VALIDATION = 24  # pictures
AT_ONCE = 4  # pictures measured together


class KeyframeVaeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the stage `keyframe-vae`.

    Attributes:
        crop: side of the windows, pixels; 0: whole pictures only.
        whole: share of the steps that see whole pictures, as many as have the area of the batch's windows.
        squares: weight of the squared error; the absolute error has 1.
        kl: weight of the Kullback-Leibler term, a mean over latent values.
        posterior: deviation of the posterior at the start, when the weights are not trained yet.
    """

    crop: CountOrNone = 64
    whole: Share = 0.15
    squares: NotNegative = 1.0
    kl: NotNegative = 1e-3
    posterior: Positive = 0.1


class KeyframeVaeModule(nn.Module):
    """The autoencoder and its loss."""

    vae: Any

    def __init__(self, vae: Any, options: KeyframeVaeOptions) -> None:
        super().__init__()
        self.vae = vae
        self.options = options

    def forward(self, batch: dict[str, Any], generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """Losses of a batch of `FrameRuns` of one frame."""
        chosen = windows_or_whole(batch, self.options.crop, self.options.whole, generator)
        pictures = signed(chosen[:, 0])  # [B, 3, h, w]
        posterior = self.vae.encode(pictures).latent_dist
        decoded = self.vae.decode(posterior.sample(generator)).sample
        error = decoded - pictures
        absolute, squared = error.abs().mean(), error.square().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return {
            "loss": absolute + self.options.squares * squared + self.options.kl * kl,
            "absolute": absolute.detach(),
            "squared": squared.detach(),
            "kl": kl.detach(),
            "posterior": posterior.std.mean().detach(),
        }


class KeyframeVaeStage(Stage):
    """Trains `keyframe_vae`."""

    name = "keyframe-vae"
    trains = ("keyframe_vae",)
    Options: ClassVar[type[msgspec.Struct]] = KeyframeVaeOptions
    module: KeyframeVaeModule

    def __init__(self, context: StageContext, options: KeyframeVaeOptions) -> None:
        super().__init__(context, options)
        checkpoint = context.checkpoint
        self.geometry = checkpoint.config.geometry
        self.scaling = checkpoint.config.keyframe_vae.scaling_factor
        vae = build(checkpoint.config, "keyframe_vae")
        vae.load_state_dict(checkpoint.component("keyframe_vae").state_dict())
        self._sample = self._pictures(context.data, SAMPLE)
        vae.eval()
        fresh = "keyframe_vae" in checkpoint.untrained
        if fresh:
            silence_branches(vae)
        standardise(vae, self._sample, 1.0)
        if fresh:
            quiet(vae, options.posterior)
        self.module = KeyframeVaeModule(vae.train(), options)

    def dataset(self) -> FrameRuns:
        """Single frames, each with the corner of a window."""
        return self._runs(self.context.data, self.options.crop)

    def validate(self, generator: torch.Generator) -> dict[str, float]:
        """PSNR of whole pictures, from latents as they are used and from latents with a tenth of their size in noise.

        The pictures are held out where the source has a split for that, else the source's first.
        """
        vae = self.module.vae
        device = next(vae.parameters()).device
        pictures = self._pictures(held_out(self.context.data), VALIDATION)
        clean, noisy, latents = [], [], []
        for picture in pictures.split(AT_ONCE):
            target = signed(picture).to(device)
            mode = vae.encode(target).latent_dist.mode()
            noise = torch.randn(mode.shape, generator=generator, device=device) * mode.std()
            clean.append(psnr(vae.decode(mode).sample, target))
            noisy.append(psnr(vae.decode(mode + 0.1 * noise).sample, target))
            latents.append(mode)
        return {
            "psnr": torch.cat(clean).mean().item(),
            "psnr_worst": torch.cat(clean).min().item(),
            "psnr_noisy": torch.cat(noisy).mean().item(),
            "latent_std": torch.cat(latents).std().item(),
        }

    def components(self) -> dict[str, dict[str, Tensor]]:
        """The autoencoder whose latents fit the configured scaling factor."""
        vae = copy.deepcopy(self.module.vae).eval()
        standardise(vae, self._sample, 1 / self.scaling)
        return {"keyframe_vae": vae.state_dict()}

    def _runs(self, data: DataSettings, crop: int) -> FrameRuns:
        source = open_source(data, self.geometry, seed=self.context.seed)
        return FrameRuns(source, self.geometry.keyframe_size, self.context.seed, crop=crop)

    def _pictures(self, data: DataSettings, count: int) -> Tensor:
        """The first `count` pictures of `data`: [N, 3, H, W] uint8."""
        return stacked(self._runs(data, 0), count)["frames"][:, 0]


@torch.no_grad()
def quiet(vae: Any, deviation: float) -> None:
    """Let the posterior have `deviation` everywhere, until it learns otherwise.

    Random weights give about 1, as much as the latents themselves: the decoder would first learn to ignore them.
    """
    channels = vae.config.latent_channels
    vae.quant_conv.weight[channels:].zero_()
    vae.quant_conv.bias[channels:].fill_(2 * math.log(deviation))


@torch.no_grad()
def standardise(vae: Any, pictures: Tensor, deviation: float) -> None:
    """Change what latents are called, not what they decode to.

    Latent channels get mean 0 and `deviation` over `pictures` [N, 3, H, W] uint8; the posterior's deviation follows.
    """
    device = next(vae.parameters()).device
    latents = torch.cat([vae.encode(signed(one).to(device)).latent_dist.mode() for one in pictures.split(AT_ONCE)])
    flat = latents.transpose(0, 1).flatten(1)  # [C, N * h * w]
    mean, gain = flat.mean(1), deviation / flat.std(1).clamp_min(1e-4)
    rescale(vae.quant_conv, mean, gain)
    before = vae.post_quant_conv  # it reads z / gain + mean from now on
    before.bias += before.weight[..., 0, 0] @ mean
    before.weight /= gain[None, :, None, None]


@torch.no_grad()
def rescale(quant_conv: Any, mean: Tensor, gain: Tensor) -> None:
    """Let an encoder that gave z with deviation s give gain * (z - mean) with deviation gain * s; mean, gain [C]."""
    channels = len(gain)
    quant_conv.bias[:channels] = (quant_conv.bias[:channels] - mean) * gain
    quant_conv.bias[channels:] += 2 * gain.log()
    quant_conv.weight[:channels] *= gain[:, None, None, None]
