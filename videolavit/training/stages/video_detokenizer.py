"""Stage `video-detokenizer`: motion condition encoder and video UNet together (reference semantics §5, §9).

Objective: denoising in the form of EDM (Karras and others, 2022) with v-prediction, as Stable Video Diffusion was
trained. With noise of deviation sigma on clean latents x (times the VAE's scaling factor), the network reads
(x + sigma n) / sqrt(sigma^2 + 1) and time 0.25 ln sigma, and says v = (n - sigma x) / sqrt(sigma^2 + 1). Plain squared
error of v is EDM's weighting of the error of x. ln sigma is normal; its mean 1 and deviation 1.6 are Stable Video
Diffusion's for image-to-video; what the official model took is not known.

Conditions are what the sampler feeds: latents of the key frame with noise on its pixels, not scaled, and motion at
latent size join the noisy latents as channels, and the motion states are attended to. A clip loses all three at once,
at random, for the sampler's unconditional branch is zeros in all of them. Motion is the raw field for some clips and
what the motion tokenizer makes of it for the others, since generation only ever has the latter.

The key frame, too, is the true one for some clips and for the others what the key-frame detokenizer makes of its ids
(`rebuilt`), whose faults generation starts with.

Contract: data is a tokenised folder with the fields of `FIELDS`, and `REBUILT` where it is asked for. The VAE's encoder
and the motion tokenizer are frozen.
`moving_weight` depends on the conditions only, so it moves effort, not the optimum.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.errors import UsageError
from runtime.images import resize_image
from runtime.noise import Noise
from videolavit.models.motion_resize import resize_motion
from videolavit.models.motion_tokenizer import MOTION_SCALE
from videolavit.reference import clips as reference
from videolavit.training.data.encoding import Encoder
from videolavit.training.data.encoding import Item as Example
from videolavit.training.data.tokenized import TokenizedDataset
from videolavit.training.settings import CountOrNone, NotNegative, Positive, Share
from videolavit.training.stage import Stage, StageContext
from videolavit.training.stages.clips import Mixed, More, TokenizedClips, check_shares, tokenized_folder
from videolavit.training.stages.held_out import held_out_scenes
from videolavit.training.stages.pictures import psnr, signed
from videolavit.training.stages.starting import OUTER_ENDS, silence_branches, trainable

FIELDS = ("latents", "keyframe", "motion_latent", "motion_ids")
REBUILT = "rebuilt_keyframe"
MOVES = 0.015  # length of a vector, detokenizer's scale, below which a cell stands still


class VideoDetokenizerOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Objective of the stage.

    Attributes:
        noise_mean, noise_deviation: of ln sigma.
        drop: share of clips that are denoised without conditions.
        tokenized_motion: share of clips whose motion comes from tokens.
        rebuilt: share of clips whose key frame is a `rebuilt_keyframe`, such as generation starts from; the others, and
            those of further folders without that field, have the true one.
        augmentation_mean, augmentation_deviation: of the natural logarithm of the deviation of the noise on the key
            frame, whose pixels are in [-1, 1].
        moving_weight: weight of latents near which something has moved since the key frame, against the others; 1:
            plain mean squared error.
        frames: first frames of each clip that are trained on; 0: all.
        scattered: how many of those are drawn by lot and kept in their order, for every clip anew; 0: all. With a few
            moments each, a step sees many more scenes: the network learns what is shown before how it moves, as an
            image model would that is made a video model later.
        more: other tokenised folders and their shares of the clips; the rest are of `data.path`.
        probes: held-out clips that `validate` samples.
        probe_steps: denoising steps of each.
        probe_guidance: of their last frame; the first frame's is 1.
    """

    noise_mean: float = 1.0
    noise_deviation: Positive = 1.6
    drop: Share = 0.1
    tokenized_motion: Share = 0.5
    rebuilt: Share = 0.0
    augmentation_mean: float = -3.0
    augmentation_deviation: NotNegative = 0.5
    moving_weight: Annotated[float, msgspec.Meta(ge=1.0)] = 1.0
    frames: CountOrNone = 0
    scattered: CountOrNone = 0
    more: list[More] = msgspec.field(default_factory=list)
    probes: CountOrNone = 4
    probe_steps: Annotated[int, msgspec.Meta(ge=2)] = 8
    probe_guidance: float = 1.0


class VideoDetokenizer(nn.Module):
    """The two networks and the loss."""

    def __init__(self, motion_encoder: Any, unet: Any, options: VideoDetokenizerOptions) -> None:
        super().__init__()
        self.motion_encoder = motion_encoder
        self.unet = unet
        self.options = options

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """Loss of what `VideoDetokenizerStage.prepare` gives.

        Args:
            batch: latents [B, T, 4, h, w], scaled; pictures [B, 4, h, w], not scaled; motion [B, 2, T, h, w]; weight
                [B, T, h, w]; time_ids [B, 3].
        """
        options, clean, motion = self.options, batch["latents"], batch["motion"]
        count = len(clean)
        draw: dict[str, Any] = {"generator": generator, "device": clean.device}
        sigma = (spread_normal(count, generator, clean.device) * options.noise_deviation + options.noise_mean).exp()
        noisy, target = noised(clean, torch.randn(clean.shape, **draw), sigma)
        given = (torch.rand(count, 1, 1, 1, **draw) >= options.drop).to(clean.dtype)  # [B, 1, 1, 1]
        states = self.motion_encoder(resize_motion(motion, *self.motion_encoder.grid)) * given
        pictures = (batch["pictures"] * given)[:, None].expand(clean.shape)
        vectors = motion.permute(0, 2, 1, 3, 4) * given[:, None]  # [B, T, 2, h, w]
        said = self.unet(torch.cat([noisy, pictures, vectors], dim=2), 0.25 * sigma.log(), states, batch["time_ids"])
        error = (said.float() - target).square().mean(2)  # [B, T, h, w]
        weight = batch["weight"]
        return {"loss": (error * weight).sum() / weight.sum(), "error": error.mean().detach()}


@torch.no_grad()
def begin(unet: Any, scaling: float) -> None:
    """Prepare a new UNet for training.

    The first answer is zero, which is nearly right, and residual branches add nothing yet. The three inputs are brought
    to one size: noisy latents have it, the key frame's are not scaled, and motion is so small that a network started
    evenly does not notice it.
    """
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    silence_branches(unet, OUTER_ENDS)
    latents = unet.conv_out.out_channels
    unet.conv_in.weight[:, latents : 2 * latents] *= scaling
    unet.conv_in.weight[:, 2 * latents :] *= MOTION_SCALE


class VideoDetokenizerStage(Stage):
    """Trains `motion_encoder` and `video_unet`."""

    name = "video-detokenizer"
    trains = ("motion_encoder", "video_unet")
    Options: ClassVar[type[msgspec.Struct]] = VideoDetokenizerOptions
    module: VideoDetokenizer

    def __init__(self, context: StageContext, options: VideoDetokenizerOptions) -> None:
        super().__init__(context, options)
        source, config = context.checkpoint, context.checkpoint.config
        self.geometry = config.geometry
        if options.frames > self.geometry.frames:
            raise UsageError(f"options.frames {options.frames}: a clip has {self.geometry.frames} frames")
        self.fields = (*FIELDS, REBUILT) if options.rebuilt else FIELDS
        self.frames = options.frames or self.geometry.frames
        if options.scattered > self.frames:
            raise UsageError(f"options.scattered {options.scattered}: they are drawn from {self.frames} frames")
        untrained = [name for name in ("video_vae", "motion_tokenizer") if name in source.untrained]
        if options.tokenized_motion == 0 and "motion_tokenizer" in untrained:
            untrained.remove("motion_tokenizer")
        if untrained:
            raise UsageError(
                f"{self.name}: {' and '.join(untrained)} of the checkpoint must be trained first (only with "
                "options.tokenized_motion = 0 the motion tokenizer need not)"
            )
        self.scaling = config.video_vae.scaling_factor
        self.vae: Any = source.component("video_vae").to(context.device)
        self.tokenizer: Any = source.component("motion_tokenizer").to(context.device)
        unet, motion_encoder = (trainable(context, name) for name in ("video_unet", "motion_encoder"))
        if "video_unet" in source.untrained:
            begin(unet, self.scaling)
        if "motion_encoder" in source.untrained:
            motion_encoder.in_proj.weight.data *= MOTION_SCALE
        self.module = VideoDetokenizer(motion_encoder, unet, options)

    def dataset(self) -> Mixed:
        """One clip per item of tokenised folders."""
        options, folder = self.options, tokenized_folder(self.context.data, self.fields, self.name)
        check_shares(options.more)
        more = [(self._clips(other.path, further=True), other.share) for other in options.more]
        return Mixed(self._clips(folder), more, self.context.seed)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """The module's input: see `VideoDetokenizer.forward`."""
        options = self.options
        device = batch["latents"].device
        count = len(batch["latents"])
        draw: dict[str, Any] = {"generator": generator, "device": device}
        strength = torch.randn(count, **draw) * options.augmentation_deviation + options.augmentation_mean
        strength = strength.exp()[:, None, None, None]
        picture = signed(self._pictures(batch, generator)).permute(0, 3, 1, 2)  # [B, 3, H, W]
        picture = picture + strength * torch.randn(picture.shape, **draw)
        motion = batch["motion_latent"]
        spoken = torch.rand(count, **draw) < options.tokenized_motion
        if spoken.any():
            codes = batch["motion_ids"][spoken] - self.context.checkpoint.config.vocabulary.first_motion
            motion = motion.clone()
            motion[spoken] = self.tokenizer.reconstruct_from_codes(codes, *motion.shape[3:])
        weight = moved(motion) * (options.moving_weight - 1) + 1
        chosen = self._chosen(count, generator, device)
        rows = torch.arange(count, device=device)[:, None]
        return {
            "latents": batch["latents"][rows, chosen] * self.scaling,
            "pictures": reference.encode(self.vae, picture),
            "motion": motion.transpose(1, 2)[rows, chosen].transpose(1, 2),
            "weight": weight[rows, chosen],
            "time_ids": self._time_ids(strength.flatten()),
        }

    def _pictures(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Key frames [B, H, W, 3] uint8, a share of them rebuilt."""
        true = batch["keyframe"]
        if not self.options.rebuilt:
            return true
        rebuilt = torch.rand(len(true), generator=generator, device=true.device) < self.options.rebuilt
        return torch.where(rebuilt[:, None, None, None], batch[REBUILT], true)

    def validate(self, generator: torch.Generator) -> dict[str, float]:
        """Clips sampled from key frame and tokens of held-out scenes of the world of shapes.

        Returns:
            psnr, dB, over the frames after the first; `gain`: how much better that is than repeating the key frame as
            the VAE has it; `motion_gain`: how much better than the same sampler under no motion. Scenes in which
            nothing moves are left out.
        """
        config, options = self.context.checkpoint.config, self.options
        if not options.probes:
            return {}
        noise = Noise(0)
        strength = torch.full((1,), config.defaults.noise_augmentation, device=self.context.device)
        figures: dict[str, list[Tensor]] = {"psnr": [], "gain": [], "motion_gain": []}
        for codes, frames in self._probes(options.probes):
            picture = reference.augment(signed(frames[:1]).permute(0, 3, 1, 2), float(strength), noise)
            pictures = reference.encode(self.vae, picture)
            spoken = self.tokenizer.reconstruct_from_codes(codes, *pictures.shape[2:])
            shown = {}
            for name, motion in (("true", spoken), ("none", torch.zeros_like(spoken))):
                *_, latents = reference.denoise(
                    self.module.unet,
                    config.video_scheduler,
                    pictures,
                    motion,
                    self.module.motion_encoder.encode(motion),
                    self._time_ids(strength),
                    steps=options.probe_steps,
                    guidance=(1.0, options.probe_guidance),
                    noise=Noise(1),
                )
                shown[name] = self._decode(latents)
            shown["still"] = self._decode((pictures * self.scaling)[:, None].expand(latents.shape))
            target = signed(frames[1:]).permute(0, 3, 1, 2)  # [T - 1, 3, H, W]
            quality = {name: psnr(pixels[1:], target).mean() for name, pixels in shown.items()}
            figures["psnr"].append(quality["true"])
            figures["gain"].append(quality["true"] - quality["still"])
            figures["motion_gain"].append(quality["true"] - quality["none"])
        return {name: float(torch.stack(values).mean()) for name, values in figures.items()}

    def components(self) -> dict[str, dict[str, Tensor]]:
        """Both networks."""
        module = self.module
        return {"motion_encoder": module.motion_encoder.state_dict(), "video_unet": module.unet.state_dict()}

    def _clips(self, folder: Path | str, *, further: bool = False) -> TokenizedClips:
        """The clips of `folder`; if it is a `further` one without rebuilt key frames, true ones stand for them."""
        lacking = further and REBUILT in self.fields and REBUILT not in TokenizedDataset(folder).fields
        fields = FIELDS if lacking else self.fields
        items = TokenizedDataset(folder, fields)
        items.require(self.context.checkpoint)
        return TokenizedClips(items, fields, self.context.seed, {REBUILT: "keyframe"} if lacking else None)

    def _chosen(self, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """[count, T] numbers of the frames that are trained on, in order."""
        if not self.options.scattered:
            return torch.arange(self.frames, device=device).expand(count, -1)
        lots = torch.rand(count, self.frames, generator=generator, device=device)
        return lots.topk(self.options.scattered).indices.sort(dim=1).values

    def _time_ids(self, strength: Tensor) -> Tensor:
        """[B, 3] frames per second, motion bucket, and the noise on the key frame, `strength` [B]."""
        config = self.context.checkpoint.config
        fixed = strength.new_tensor([config.geometry.fps, config.defaults.motion_bucket]).expand(len(strength), 2)
        return torch.cat([fixed, strength[:, None]], dim=1)

    def _probes(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Codes [1, tokens] and frames [T, H, W, 3] uint8 of the first `count` held-out scenes that move."""
        checkpoint = self.context.checkpoint
        source = held_out_scenes(self.geometry)
        encoder = Encoder(checkpoint, ("motion_ids",), self.geometry.video_size, seed=0, device=self.context.device)
        found: list[tuple[Tensor, Tensor]] = []
        index = 0
        while len(found) < count:
            scene, _ = source.scene(index)
            if any(shape.motion.deed != "still" for shape in scene.shapes):
                clip = source.clip(index)
                rows = encoder.encode([Example(index=index, pictures=[clip.frames[0]], grid=clip.grid[None])])
                codes = torch.from_numpy(rows["motion_ids"]).long() - checkpoint.config.vocabulary.first_motion
                frames = np.stack([resize_image(frame, self.geometry.video_size) for frame in clip.frames])
                found.append((codes.to(self.context.device), torch.from_numpy(frames).to(self.context.device)))
            index += 1
        return found

    def _decode(self, latents: Tensor) -> Tensor:
        """latents [1, T, 4, h, w], scaled -> frames [T, 3, H, W]."""
        return reference.decode(self.vae, latents, self.context.checkpoint.config.defaults.decode_chunk)[0]


def spread_normal(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """[count] normal numbers, one from each of `count` equal parts of the distribution, in random order.

    Batches of few clips differ less in how noisy they are, and so does their loss.
    """
    places = torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)
    normal = torch.special.ndtri((places / count).clamp(1e-6, 1 - 1e-6))
    return normal[torch.randperm(count, generator=generator, device=device)]


def noised(clean: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """What the network reads and what it is to say.

    Args:
        clean, noise: [B, ...], noise standard normal.
        sigma: [B].

    Returns:
        (x + sigma n) / sqrt(sigma^2 + 1) and v = (n - sigma x) / sqrt(sigma^2 + 1).
    """
    sigma = sigma.reshape(-1, *[1] * (clean.ndim - 1))
    scale = (sigma.square() + 1).rsqrt()
    return (clean + sigma * noise) * scale, (noise - sigma * clean) * scale


def moved(motion: Tensor) -> Tensor:
    """motion [B, 2, T, h, w] -> [B, T, h, w] of 0 and 1: whether a cell or its neighbour has moved up to each frame."""
    here = (motion.square().sum(1) > MOVES**2).to(motion.dtype)  # [B, T, h, w]
    near = F.max_pool2d(here, 3, stride=1, padding=1)
    return near.cummax(dim=1).values
