"""Stage `keyframe-detokenizer`: pictures from visual codes (reference semantics §7, §8).

The key-frame decoder and the key-frame UNet are trained together on codes and latents of the same pictures; the visual
tokenizer and the image autoencoder are frozen. Objective: the denoising loss in the parametrisation of the model's
scheduler, with timesteps spread evenly and weights by the smaller of the signal-to-noise ratio and a bound (Hang et
al., arXiv 2303.09556); both conditions are zeros for a share of the samples, because that is the sampler's
unconditional branch. The decoder goes on reconstructing the tokenizer's features, which is how it was trained before
(LaVIT, arXiv 2309.04669).

Contract: a picture's codes are drawn as the runtime does it: kept tokens by a fresh keep decision, in raster order. To
tokenise and encode a picture costs as much as to denoise it, so every picture is used for several draws of noise.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, ClassVar

import msgspec
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from torch import Tensor, nn

from runtime.diffusion import keyframe_time_ids
from runtime.noise import Noise
from runtime.settings import SchedulerSettings
from videolavit.reference import keyframes
from videolavit.training.data import open_source
from videolavit.training.settings import Count, DataSettings, NotNegative, Share
from videolavit.training.stage import Stage, StageContext
from videolavit.training.stages.clips import stacked
from videolavit.training.stages.held_out import held_out
from videolavit.training.stages.pictures import FrameRuns, psnr, signed
from videolavit.training.stages.starting import OUTER_ENDS, silence_branches
from videolavit.training.stages.visual_tokenizer import keep_as_in_use, kept_in_order

VALIDATION = 16  # pictures
STEPS = 8  # of the sampler in validation


class KeyframeDetokenizerOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the stage `keyframe-detokenizer`.

    Attributes:
        repeats: draws of timestep and noise per picture; a batch has `batch_size * repeats` samples.
        drop: share of the samples whose conditions are zeros.
        snr: bound on the signal-to-noise ratio in the weights of the loss; 0: no weights.
        features: weight of 1 - cos(feature, reconstructed feature).
        guidance: of the pictures that validation samples.
    """

    repeats: Count = 4
    drop: Share = 0.1
    snr: NotNegative = 5.0
    features: NotNegative = 0.1
    guidance: Annotated[float, msgspec.Meta(ge=1)] = 2.0


class KeyframeDetokenizerModule(nn.Module):
    """Decoder, UNet and the loss."""

    decoder: Any
    unet: Any
    time_ids: Tensor  # [1, 6]
    signal: Tensor  # [train_steps] the cumulative product of 1 - beta

    def __init__(
        self,
        decoder: Any,
        unet: Any,
        scheduler: SchedulerSettings,
        size: tuple[int, int],
        options: KeyframeDetokenizerOptions,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.unet = unet
        self.options = options
        self.prediction = scheduler.prediction
        self.register_buffer("signal", signal_shares(scheduler), persistent=False)
        self.register_buffer("time_ids", torch.from_numpy(keyframe_time_ids(size)), persistent=False)

    def forward(self, batch: dict[str, Any], generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """Losses of what `KeyframeDetokenizerStage.prepare` gives."""
        prompt, pooled, rebuilt = self.conditions(batch)
        distance = 1 - F.cosine_similarity(rebuilt, batch["features"], dim=-1).mean()
        repeats = self.options.repeats
        clean = batch["latents"].repeat_interleave(repeats, 0)  # [N, 4, h, w]
        prompt, pooled = prompt.repeat_interleave(repeats, 0), pooled.repeat_interleave(repeats, 0)
        count, device = len(clean), clean.device
        given = (torch.rand(count, generator=generator, device=device) >= self.options.drop).to(prompt.dtype)  # [N]
        prompt, pooled = prompt * given[:, None, None], pooled * given[:, None]
        timesteps = self._timesteps(count, generator)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        signal = self.signal[timesteps][:, None, None, None]  # [N, 1, 1, 1]
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        output = self.unet(
            noisy,
            timesteps,
            encoder_hidden_states=prompt,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": self.time_ids.expand(count, -1)},
        ).sample
        velocity = self.prediction == "v_prediction"
        target = signal.sqrt() * noise - (1 - signal).sqrt() * clean if velocity else noise
        errors = (output.float() - target).square().mean((1, 2, 3))  # [N]
        loss = (errors * self._weights(self.signal[timesteps])).mean()
        return {
            "loss": loss + self.options.features * distance,
            "error": errors.mean().detach(),
            "distance": distance.detach(),
        }

    def conditions(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt embeddings [B, P, D], pooled embedding [B, E], and the features [B, P, W] they are made of."""
        decoder = self.decoder
        features = decoder.reconstruct(batch["vectors"], batch["counts"])
        prompt = torch.cat([decoder.unet_proj_1(features), decoder.unet_proj_2(features)], dim=-1)
        return prompt, decoder.unet_attnpool(features), features

    def _timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """[N] int64, one from each of N equal parts of the schedule, in random order: the loss varies less."""
        device = self.signal.device
        places = torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)
        steps = (places / count * len(self.signal)).long().clamp_max(len(self.signal) - 1)
        return steps[torch.randperm(count, generator=generator, device=device)]

    def _weights(self, signal: Tensor) -> Tensor:
        """Weight of every sample from its share of signal [N]."""
        if self.options.snr == 0:
            return torch.ones_like(signal)
        ratio = signal / (1 - signal)
        return ratio.clamp_max(self.options.snr) / (ratio + 1 if self.prediction == "v_prediction" else ratio)


def signal_shares(settings: SchedulerSettings) -> Tensor:
    """Share of signal in the variance of a noised latent, by timestep: [train_steps] (§8.2)."""
    betas = torch.linspace(settings.beta_start**0.5, settings.beta_end**0.5, settings.train_steps).square()
    return (1 - betas).cumprod(0)


class KeyframeDetokenizerStage(Stage):
    """Trains `keyframe_decoder` and `keyframe_unet`."""

    name = "keyframe-detokenizer"
    trains = ("keyframe_decoder", "keyframe_unet")
    Options: ClassVar[type[msgspec.Struct]] = KeyframeDetokenizerOptions
    module: KeyframeDetokenizerModule

    def __init__(self, context: StageContext, options: KeyframeDetokenizerOptions) -> None:
        super().__init__(context, options)
        checkpoint = context.checkpoint
        self.config = checkpoint.config
        self.tokenizer: Any = copy.deepcopy(checkpoint.component("visual_tokenizer")).to(context.device)
        self.vae: Any = copy.deepcopy(checkpoint.component("keyframe_vae")).to(context.device)
        decoder = copy.deepcopy(checkpoint.component("keyframe_decoder")).requires_grad_(True)
        unet = copy.deepcopy(checkpoint.component("keyframe_unet")).requires_grad_(True)
        if "keyframe_unet" in checkpoint.untrained:
            silence_branches(unet, OUTER_ENDS)
        size = self.config.geometry.keyframe_size
        scheduler = self.config.keyframe_scheduler
        self.module = KeyframeDetokenizerModule(decoder, unet, scheduler, size, options).train()

    def dataset(self) -> FrameRuns:
        """Single frames with the pixels of the visual tokenizer."""
        return self._runs(self.context.data)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Features [B, N, W], code vectors [B, L, d] with their counts [B], and scaled latents [B, 4, h, w]."""
        features = self.tokenizer.features(batch["pixels"])
        logits = self.tokenizer.keep_logits(features)  # [B, N, 2]
        keep = keep_as_in_use(logits, generator)
        codes = self.tokenizer.codes(self.tokenizer.merge(features, keep))  # [B, N]
        order, counts = kept_in_order(keep)  # [B, L], [B]
        vectors = self.tokenizer.quantize.lookup(codes.gather(1, order))
        latents = keyframes.encode(self.vae, signed(batch["frames"][:, 0]))
        return {"features": features, "vectors": vectors, "counts": counts, "latents": latents}

    def validate(self, generator: torch.Generator) -> dict[str, float]:
        """The error of fixed draws, and PSNR of pictures sampled from codes, to the original.

        The pictures are held out where the source has a split for that, else the source's first.
        """
        batch = send_to_device(stacked(self._runs(held_out(self.context.data)), VALIDATION), self.context.device)
        prepared = self.prepare(batch, generator)
        losses = self.module(prepared, generator, 0)
        pictures = self.sample(prepared, seed=0)
        originals = signed(batch["frames"][:, 0])
        return {
            "error": losses["error"].item(),
            "distance": losses["distance"].item(),
            "psnr": psnr(pictures, originals).mean().item(),
            "psnr_vae": psnr(keyframes.decode(self.vae, prepared["latents"]), originals).mean().item(),
            "tokens": prepared["counts"].float().mean().item(),
        }

    def sample(self, prepared: dict[str, Any], seed: int) -> Tensor:
        """Pictures [B, 3, H, W], about [-1, 1], from the codes in `prepared`."""
        prompt, pooled, _ = self.module.conditions(prepared)
        *_, latents = keyframes.denoise(
            self.module.unet,
            self.config.keyframe_scheduler,
            prompt,
            pooled,
            self.module.time_ids.expand(len(prompt), -1),
            size=self.config.geometry.keyframe_size,
            steps=STEPS,
            guidance=self.options.guidance,
            noise=Noise(seed),
        )
        return keyframes.decode(self.vae, latents)

    def components(self) -> dict[str, dict[str, Tensor]]:
        """Both as they are."""
        return {
            "keyframe_decoder": self.module.decoder.state_dict(),
            "keyframe_unet": self.module.unet.state_dict(),
        }

    def _runs(self, data: DataSettings) -> FrameRuns:
        geometry = self.config.geometry
        source = open_source(data, geometry, seed=self.context.seed)
        return FrameRuns(source, geometry.keyframe_size, self.context.seed, tokenizer=geometry.image_size)
