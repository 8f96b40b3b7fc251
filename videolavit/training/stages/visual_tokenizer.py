"""Stage `visual-tokenizer`: pictures as as many codes as they need, and features from codes.

The eye is frozen. Trained are the token predictor, the merger, the projection to codes and the codebook, together with
the first part of the key-frame decoder, which makes features of codes again:

    features ─predictor─► keep or drop ─merger─► kept tokens ─codebook─► codes ─decoder─► features'

Objective: the mean over patches of 1 - cos(feature, feature') plus lambda * (rho - share of kept patches)^2 (LaVIT,
arXiv 2309.04669, Eq. 4 and 5; rho = 1/3 and lambda = 2 as there), the commitment to codes, and a penalty on doubt: in
use the decision is drawn by lot (reference semantics §6.3), so a probability far from 0 and 1 would give a picture
other codes every time. Decisions are Gumbel-softmax, hard with straight-through gradients.

At first a fixed share of the patches is kept, because an untrained predictor tends to learn to drop everything; and
for the first steps tokens are not quantised, so that k-means starts the codebook from encodings that mean something.
Doubt costs nothing at first and more and more while the temperature falls, or the first guess would stay for ever.

A small model trained for minutes learns no decisions that way: a dropped token weighs as much as exp of its attention
score in the merger's gradient, which swamps everything else, and the predictor ends at the same probability everywhere
or at nothing kept. `guide` is the way out: decisions are then learned from the pictures alone, by cross-entropy to
"keep the patches unlike the rest" (`unlike_the_rest`), and the objective above trains all but the predictor.

Contract: `vit_proj` of the tokenizer, the heads of the key-frame decoder that feed the UNet, and the eye keep their
weights. Kept tokens carry no place into the decoder, only their order (§7).
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, cast

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videolavit.models.keyframe_decoder import KeyframeDecoder
from videolavit.models.visual_tokenizer import DynamicVisualTokenizer, keep_decision
from videolavit.training.codebook import Codebook, Quantised, crowding
from videolavit.training.patches import FITTED, HELD_OUT, Reader, labelled_batch, normalise, pictures
from videolavit.training.settings import CountOrNone, Decay, NotNegative, Positive, Share
from videolavit.training.stage import Stage, StageContext


class VisualTokenizerOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the stage `visual-tokenizer`.

    Attributes:
        rho: share of patches that is to be kept.
        rate: lambda, the weight of the squared distance to `rho`.
        doubt: weight of the mean of 4 p (1 - p) over patches, p being the probability of keeping; it rises from 0 to
            this while the temperature falls.
        commitment: weight of the squared distance of encodings to their codes.
        crowding: weight of the penalty on tokens of one picture that say the same.
        guide: weight of the cross-entropy of decisions to the patches unlike the rest; they then learn from nothing
            else but `doubt`, `rho` and `rate` are not read, and `fixed_share_steps` are those in which exactly these
            patches are kept. 0: the objective above.
        contrast: how unlike the rest a patch is to be kept by the guide, a share of full brightness.
        hot, cold: temperature of the Gumbel-softmax before and after cooling; decisions are hard, gradients are as
            soft as it says.
        cooling_steps: steps over which the temperature falls, from the end of `fixed_share_steps` on.
        fixed_share_steps: first steps, in which the best `rho` of every picture's patches are kept.
        plain_steps: first steps, in which tokens are not quantised.
        decay: of the codebook's running means.
        dead_share: codes chosen less often than this share of an even distribution are put elsewhere.
        revive_until: last step at which they are.
    """

    rho: Share = 1 / 3
    rate: NotNegative = 2.0
    doubt: NotNegative = 0.2
    commitment: NotNegative = 0.25
    crowding: NotNegative = 0.3
    guide: NotNegative = 0.0
    contrast: Positive = 0.07
    hot: Positive = 2.0
    cold: Positive = 0.5
    cooling_steps: CountOrNone = 1000
    fixed_share_steps: CountOrNone = 300
    plain_steps: CountOrNone = 200
    decay: Decay = 0.98
    dead_share: Share = 0.2
    revive_until: CountOrNone = 1_000_000


class VisualTokenizerModule(nn.Module):
    """What is trained, from features to features."""

    def __init__(
        self, tokenizer: DynamicVisualTokenizer, decoder: KeyframeDecoder, options: VisualTokenizerOptions
    ) -> None:
        super().__init__()
        for part in (tokenizer.token_predictor, tokenizer.causal_encoder, tokenizer.encode_task_layer, decoder):
            part.requires_grad_(True).train()
        self.options = options
        self.predictor = tokenizer.token_predictor
        self.merger = tokenizer.causal_encoder
        self.encode_task_layer = tokenizer.encode_task_layer
        self.codebook = Codebook(tokenizer.quantize, decay=options.decay, dead_share=options.dead_share)
        self.decoder = decoder
        for head in (decoder.unet_proj_1, decoder.unet_proj_2, decoder.unet_attnpool):
            head.requires_grad_(False)

    def forward(self, batch: dict[str, Any], generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """batch: features [B, N, W] and, with a guide, unlike [B, N] -> losses and figures.

        In eval mode what comes back (`as_in_use`).
        """
        features, options = batch["features"], self.options
        if not self.training:
            return self.as_in_use(features, generator)
        logits = self._logits(features)  # [B, N, 2]
        if options.guide:
            wanted = (batch["unlike"] > options.contrast).to(logits.dtype)  # [B, N]
            keep = self._decide(logits, generator, step).detach()
            keep = at_least_one(wanted, batch["unlike"]) if step < options.fixed_share_steps else keep
            guide = F.nll_loss(logits.flatten(0, 1), 1 - wanted.flatten().long())
        else:
            keep = self._decide(logits, generator, step)  # [B, N]
            guide = logits.new_zeros(())
        rebuilt, coded, crowded = self.rebuild(features, keep, generator, quantise=step >= options.plain_steps)
        loss = 1 - F.cosine_similarity(rebuilt, features, dim=-1).mean()
        p = logits[..., 0].exp()  # [B, N]
        # While the share is fixed, probabilities are held to it, or they would drift to all or nothing.
        share = p.mean(1) if step < options.fixed_share_steps else keep.mean(1)  # [B]
        rate = (options.rho - share).square().mean()
        doubt = (4 * p * (1 - p)).mean()
        cooled = self._cooled(step)
        total = loss + options.doubt * cooled * doubt
        total = total + (options.guide * guide if options.guide else options.rate * rate)
        total = total + options.commitment * coded.commitment + options.crowding * crowded
        kept = keep.detach().mean(1)
        return {
            "loss": total,
            "distance": loss,
            "rate": rate,
            "guide": guide,
            "doubt": doubt,
            "commitment": coded.commitment,
            "crowding": crowded,
            "kept": kept.mean(),
            "kept_spread": kept.std() if len(kept) > 1 else kept.new_zeros(()),
            "codes": torch.tensor(float(len(coded.ids.unique()))),
        }

    def as_in_use(self, features: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """features [B, N, W] -> features' `rebuilt`, `keep` [B, N] drawn as in use, its `chances` [B, N], and `ids`."""
        logits = self._logits(features)
        keep = keep_as_in_use(logits, generator)
        rebuilt, coded, _ = self.rebuild(features, keep, generator)
        return {"rebuilt": rebuilt, "keep": keep, "chances": logits[..., 0].exp(), "ids": coded.ids}

    def rebuild(
        self, features: Tensor, keep: Tensor, generator: torch.Generator, *, quantise: bool = True
    ) -> tuple[Tensor, Quantised, Tensor]:
        """Through codes and back.

        Args:
            features: [B, N, W].
            keep: [B, N] of 0 and 1, with at least one 1 in a row; gradients flow through it.
            generator: draws the start of the codebook.
            quantise: choose codes; else encodings go on as they are.

        Returns:
            features' [B, N, W]; what the codebook gave for the M kept patches alone (vectors [M, d], ids [M]); and how
            much the encodings of one picture are alike.
        """
        z = self.encode_task_layer(self.merger(features, keep))  # [B, N, d]
        order, counts = kept_in_order(keep.detach())  # [B, L], [B]
        z = z.gather(1, order[..., None].expand(-1, -1, z.shape[2]))  # [B, L, d], kept patches in raster order
        real = torch.arange(z.shape[1], device=z.device) < counts[:, None]  # [B, L]
        z = F.normalize(z, dim=-1)
        plain = Quantised(z[real], counts.new_zeros(0), z.new_zeros(()))
        coded = self.codebook(z[real], generator) if quantise else plain
        vectors = torch.zeros_like(z).masked_scatter(real[..., None], coded.vectors.to(z.dtype))  # [B, L, d]
        # A factor of exactly 1 where it counts: it tells the decision what the token was worth.
        vectors = vectors * keep.gather(1, order)[..., None]
        return self.decoder.reconstruct(vectors, counts), coded, crowding(z, real.to(z.dtype))

    def _cooled(self, step: int) -> float:
        """How much of the cooling is done, from 0 to 1; it begins when the share is no longer fixed."""
        begun = step - self.options.fixed_share_steps
        return min(max(begun / max(self.options.cooling_steps, 1), 0.0), 1.0)

    def _logits(self, features: Tensor) -> Tensor:
        """features [B, N, W] -> log-probabilities [B, N, 2], column 0 = keep."""
        return self.predictor(features, torch.ones_like(features[..., :1]))

    def _decide(self, logits: Tensor, generator: torch.Generator, step: int) -> Tensor:
        """Keep or drop [B, N] of exactly 0 and 1, with the gradient of the soft decision."""
        options = self.options
        scores = logits + gumbel(logits.shape, generator).to(logits.device)  # [B, N, 2]
        margin = scores[..., 0] - scores[..., 1]  # [B, N]
        if step < options.fixed_share_steps:
            count = max(1, round(options.rho * margin.shape[1]))
            hard = torch.zeros_like(margin).scatter_(1, margin.topk(count, dim=1).indices, 1.0)
        else:
            hard = at_least_one((margin >= 0).to(margin.dtype), margin)
        temperature = options.hot + (options.cold - options.hot) * self._cooled(step)
        soft = torch.sigmoid(margin / temperature)
        return hard + (soft - soft.detach())  # in this order it is exactly `hard`


def gumbel(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Gumbel(0, 1) noise on the generator's device."""
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    return -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))


def keep_as_in_use(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Decisions [B, N] of 0 and 1 drawn from log-probabilities [B, N, 2] as in use (reference semantics §6.3), but with
    at least one 1 in a row."""
    return at_least_one(keep_decision(logits, gumbel(logits.shape, generator).to(logits.device)), logits[..., 0])


def kept_in_order(keep: Tensor) -> tuple[Tensor, Tensor]:
    """keep [B, N] -> positions [B, L] of the kept patches in raster order, then of others, and the counts [B] of kept
    ones; L is the largest count."""
    counts = keep.sum(1).long()
    return torch.sort(keep, dim=1, descending=True, stable=True).indices[:, : int(counts.max())], counts


def at_least_one(keep: Tensor, margin: Tensor) -> Tensor:
    """`keep` [B, N] with the position of the highest `margin` kept in rows that keep nothing."""
    best = F.one_hot(margin.argmax(1), margin.shape[1]).to(keep.dtype)
    return torch.where(keep.sum(1, keepdim=True) > 0, keep, best)


def unlike_the_rest(pictures: Tensor, patch: int) -> Tensor:
    """How unlike the other patches each patch is: pictures [B, S, S, 3] uint8 -> [B, N] in 0..1.

    A patch is the mean and the deviation of its colours; the figure is its mean distance to the quarter of the
    picture's patches that are nearest to it. Ground, plain or textured, has many like it; what stands on it has few.
    """
    cells = (pictures.float() / 255).unfold(1, patch, patch).unfold(2, patch, patch).flatten(1, 2).flatten(3)
    kinds = torch.cat([cells.mean(-1), cells.std(-1)], -1)  # [B, N, 6]
    distances = torch.cdist(kinds, kinds)  # [B, N, N], 0 to itself
    nearest = max(1, kinds.shape[1] // 4)
    return distances.topk(nearest + 1, dim=-1, largest=False).values[..., 1:].mean(-1)


class VisualTokenizerStage(Stage):
    """Trains the visual tokenizer but for its eye and `vit_proj`, and the key-frame decoder but for its heads."""

    name: ClassVar[str] = "visual-tokenizer"
    trains: ClassVar[tuple[str, ...]] = ("visual_tokenizer", "keyframe_decoder")
    completes: ClassVar[tuple[str, ...] | None] = ("visual_tokenizer",)
    Options: ClassVar[type[msgspec.Struct]] = VisualTokenizerOptions
    module: VisualTokenizerModule

    def __init__(self, context: StageContext, options: VisualTokenizerOptions) -> None:
        super().__init__(context, options)
        tokenizer = cast(DynamicVisualTokenizer, copy.deepcopy(context.checkpoint.component("visual_tokenizer")))
        decoder = cast(KeyframeDecoder, copy.deepcopy(context.checkpoint.component("keyframe_decoder")))
        if "keyframe_decoder" in context.checkpoint.untrained:
            # Codes have unit length: this brings their channels to unit size, and attention to them learns faster.
            nn.init.normal_(decoder.in_proj.weight)
        self.eye = tokenizer.encoder.to(context.device)  # without gradients, as it comes
        self.patch = context.checkpoint.config.visual_tokenizer.eva.patch_size
        self.module = VisualTokenizerModule(tokenizer, decoder, options)
        self._held_out: tuple[Reader, dict[str, Any]] | None = None

    def dataset(self) -> torch.utils.data.Dataset:
        return pictures(self.context, labelled=False)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        features = {"features": self._features(normalise(batch["picture"]))}
        if not self.options.guide:
            return features
        return features | {"unlike": unlike_the_rest(batch["picture"], self.patch)}

    def after_step(self, step: int) -> None:
        generator = torch.Generator().manual_seed(self.context.seed * 1_000_003 + step)
        self.module.codebook.update(generator, revive=step <= self.options.revive_until)

    def validate(self, generator: torch.Generator) -> dict[str, float]:
        """How well features come back from codes that are drawn as in use, on held-out pictures."""
        if self.context.data.source != "shapes":
            return {}
        reader, batch = self._judge()
        features = batch["features"]
        got = self.module({"features": features}, generator, 0)
        p, kept = got["chances"], got["keep"].mean(1)
        return {
            "cosine": float(F.cosine_similarity(got["rebuilt"], features, dim=-1).mean()),
            "kept": float(kept.mean()),
            "kept_spread": float(kept.std()),
            "flips": float(torch.minimum(p, 1 - p).sum(1).mean()),  # decisions per picture that chance turns
            "codes_used": float(len(got["ids"].unique())),
            "perplexity": self.module.codebook.perplexity,
            # Only directions are trained; the reader wants features of their usual length.
            **reader.judge(F.normalize(got["rebuilt"], dim=-1) * features.norm(dim=-1).mean(), batch),
        }

    def components(self) -> dict[str, dict[str, Tensor]]:
        module = self.module
        tokenizer = dict(self.context.checkpoint.component("visual_tokenizer").state_dict())
        parts = {
            "token_predictor": module.predictor,
            "causal_encoder": module.merger,
            "encode_task_layer": module.encode_task_layer,
        }
        for prefix, part in parts.items():
            tokenizer |= {f"{prefix}.{name}": value for name, value in part.state_dict().items()}
        tokenizer["quantize.embedding.weight"] = module.codebook.table
        return {"visual_tokenizer": tokenizer, "keyframe_decoder": dict(module.decoder.state_dict())}

    @torch.no_grad()
    def _features(self, pixels: Tensor) -> Tensor:
        return self.eye.forward_features(pixels)[:, 1:]  # [B, N, W]

    def _judge(self) -> tuple[Reader, dict[str, Any]]:
        """A reader fitted to true features of training pictures, and held-out pictures with their features."""
        if self._held_out is None:
            known = labelled_batch(self.context, split="train", size=FITTED)
            held_out = labelled_batch(self.context, split="held-out", size=HELD_OUT)
            held_out["features"] = self._features(held_out["pixels"])
            self._held_out = Reader.fit(self._features(known["pixels"]), known), held_out
        return self._held_out
