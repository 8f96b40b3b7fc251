"""Stage `vision`: a vision transformer for models that have no pretrained one.

The official model starts from EVA-CLIP weights and skips this stage. A small model has none, so its `encoder` is
trained here from scratch with dense objectives; the linear heads are thrown away. From pictures of the world of shapes
every patch token says, of the shape nearest to it, colour, kind, place and diameter, and of itself how much of it is
covered, its colours at low resolution and its place. From other pictures, which carry no labels, the only objective is
the low-resolution content of every patch, a share of the patches being masked.

Contract: what is trained is the output of the last block without the final norm, for that is what is used (reference
semantics §6.1). It is kept at about unit size per channel and zero mean, because the merger and the cosine
reconstruction of the next stage take it raw.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videolavit.models.components import build
from videolavit.models.eva import EvaVisionTransformer
from videolavit.models.visual_tokenizer import DynamicVisualTokenizer
from videolavit.shapes import COLOURS, KINDS
from videolavit.training.patches import FITTED, HELD_OUT, Reader, labelled_batch, normalise, pictures
from videolavit.training.settings import NotNegative, Share
from videolavit.training.stage import Stage, StageContext

CELLS = 4  # a patch's content is CELLS x CELLS colours
BINS = 16  # per axis, for a shape's place
DIAMETERS = (0.08, 0.56)  # bounds of the diameter's bins, shares of the frame
DIAMETER_BINS = 8
BLUR = 0.6  # of the bins, standard deviation in bins


class VisionOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the stage `vision`; numbers are weights of objectives but for `masked`.

    Attributes:
        fresh: start from new weights; else from the checkpoint's, to train on.
        pixels: of the content of patches.
        kind: of the kind of shapes, which is what takes longest to learn.
        covered: how much more a patch that a shape covers counts for that shape's attributes than a bare one.
        tame: of the penalty that keeps features at unit size and zero mean.
        masked: share of the patches hidden in pictures without labels.
    """

    fresh: bool = True
    pixels: NotNegative = 1.0
    kind: NotNegative = 3.0
    covered: NotNegative = 4.0
    tame: NotNegative = 1.0
    masked: Share = 0.4


class ShapesHeads(nn.Module):
    """Linear read-outs of what a patch says."""

    SIZES: ClassVar[dict[str, int]] = {
        "pixels": 3 * CELLS * CELLS,
        "cover": 1,
        "colour": len(COLOURS),
        "kind": len(KINDS),
        "x": BINS,
        "y": BINS,
        "diameter": DIAMETER_BINS,
        "place": 2,
    }

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(width, sum(self.SIZES.values()))

    def forward(self, features: Tensor, batch: dict[str, Tensor], covered: float) -> dict[str, Tensor]:
        """Scalar losses by name of features [B, N, W]; `batch` has `pixels` and labels, `covered` is the option."""
        said = dict(zip(self.SIZES, self.read(features).split(list(self.SIZES.values()), dim=-1), strict=True))
        weight = 1 + (covered - 1) * batch["cover"].sqrt()  # [B, N]
        weight = (weight / weight.mean()).flatten()
        grid = int(features.shape[1] ** 0.5)
        middle = (torch.arange(grid, device=features.device) + 0.5) * 2 / grid - 1  # -1..1
        places = torch.cartesian_prod(middle, middle).flip(-1)  # [N, 2] (x, y) in raster order

        def classes(name: str, target: Tensor) -> Tensor:
            """Cross-entropy with class ids [B, N] or distributions [B, N, K]."""
            return (F.cross_entropy(said[name].flatten(0, 1), target.flatten(0, 1), reduction="none") * weight).mean()

        return {
            "pixels": (said["pixels"] - patch_content(batch["pixels"], grid)).square().mean(),
            "cover": F.binary_cross_entropy_with_logits(said["cover"][..., 0], batch["cover"]),
            "colour": classes("colour", batch["colour"]),
            "kind": classes("kind", batch["kind"]),
            "x": classes("x", soft_bins(batch["centre"][..., 0], BINS)),
            "y": classes("y", soft_bins(batch["centre"][..., 1], BINS)),
            "diameter": classes("diameter", soft_bins(batch["diameter"], DIAMETER_BINS, *DIAMETERS)),
            "place": (said["place"] - places).square().mean(),
        }


def soft_bins(values: Tensor, bins: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Distribution [.., bins] over equal bins of [low, high] that peaks at `values` [..]."""
    middle = (torch.arange(bins, device=values.device) + 0.5) / bins  # [bins]
    place = ((values - low) / (high - low)).clamp(0, 1)
    return (-0.5 * ((place[..., None] - middle) * bins / BLUR).square()).softmax(-1)


def patch_content(pixels: Tensor, grid: int) -> Tensor:
    """pixels [B, 3, S, S] -> mean colours of CELLS x CELLS parts of every patch, [B, N, 3 * CELLS^2]."""
    small = F.adaptive_avg_pool2d(pixels, grid * CELLS)  # [B, 3, grid * CELLS, grid * CELLS]
    return F.unfold(small, CELLS, stride=CELLS).transpose(1, 2)


def scale_penalty(features: Tensor) -> Tensor:
    """How far features [B, N, W] are from unit size per channel and zero mean; scalar."""
    size = features.square().mean(-1).sqrt()  # [B, N]
    return (size - 1).square().mean() + features.mean((0, 1)).square().mean()


class VisionModule(nn.Module):
    """The vision transformer and its heads."""

    def __init__(self, encoder: EvaVisionTransformer, options: VisionOptions, *, labelled: bool) -> None:
        super().__init__()
        self.options = options
        self.encoder = encoder
        self.grid = int((encoder.pos_embed.shape[1] - 1) ** 0.5)
        # What the model never uses takes no part: it would have no gradient.
        encoder.norm.requires_grad_(False)
        encoder.head.requires_grad_(False)
        width = encoder.pos_embed.shape[2]
        self.heads = ShapesHeads(width) if labelled else nn.Linear(width, 3 * CELLS * CELLS)

    def forward(self, batch: dict[str, Any], generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """batch: pixels [B, 3, S, S] and, with labels, those of every picture -> losses; in eval mode `features`."""
        if not self.training:
            return {"features": self.encoder.forward_features(batch["pixels"])[:, 1:]}
        if isinstance(self.heads, ShapesHeads):
            features = self.encoder.forward_features(batch["pixels"])[:, 1:]  # [B, N, W]
            return self._total(self.heads(features, batch, self.options.covered), features)
        return self._masked(batch["pixels"], generator)

    def _masked(self, pixels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        cells = self.grid
        drawn = torch.rand(len(pixels), 1, cells, cells, generator=generator, device=generator.device)
        hidden = (drawn < self.options.masked).to(pixels)  # [B, 1, grid, grid]
        shown = pixels * (1 - F.interpolate(hidden, size=pixels.shape[2:]))
        features = self.encoder.forward_features(shown)[:, 1:]  # [B, N, W]
        error = (self.heads(features) - patch_content(pixels, cells)).square().mean()
        return self._total({"pixels": error}, features)

    def _total(self, losses: dict[str, Tensor], features: Tensor) -> dict[str, Tensor]:
        losses = {**losses, "tame": scale_penalty(features)}
        weights = {"pixels": self.options.pixels, "kind": self.options.kind, "tame": self.options.tame}
        loss = torch.stack([weights.get(name, 1.0) * value for name, value in losses.items()]).sum()
        return {"loss": loss, **losses}


class VisionStage(Stage):
    """Trains `encoder.*` of the visual tokenizer."""

    name: ClassVar[str] = "vision"
    trains: ClassVar[tuple[str, ...]] = ("visual_tokenizer",)
    completes: ClassVar[tuple[str, ...] | None] = ()  # the rest of the tokenizer is trained by `visual-tokenizer`
    Options: ClassVar[type[msgspec.Struct]] = VisionOptions
    module: VisionModule

    def __init__(self, context: StageContext, options: VisionOptions) -> None:
        super().__init__(context, options)
        self.labelled = context.data.source == "shapes"
        tokenizer = cast(DynamicVisualTokenizer, build(context.checkpoint.config, "visual_tokenizer"))
        if not options.fresh:
            tokenizer.load_state_dict(context.checkpoint.component("visual_tokenizer").state_dict())
        self.module = VisionModule(tokenizer.encoder, options, labelled=self.labelled)
        self._batches: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    def dataset(self) -> torch.utils.data.Dataset[dict[str, Any]]:
        return pictures(self.context, labelled=self.labelled)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        return {**batch, "pixels": normalise(batch["picture"])}

    @torch.no_grad()
    def validate(self, generator: torch.Generator) -> dict[str, float]:
        """What features say of held-out pictures of the world of shapes, and their size per channel."""
        if not self.labelled:
            return {}
        if self._batches is None:
            known = labelled_batch(self.context, split="train", size=FITTED)
            self._batches = known, labelled_batch(self.context, split="held-out", size=HELD_OUT)
        known, held_out = self._batches
        seen, features = (self.module(batch, generator, 0)["features"] for batch in (known, held_out))
        reader = Reader.fit(seen, known)
        return {**reader.judge(features, held_out), "size": float(features.square().mean(-1).sqrt().mean())}

    def components(self) -> dict[str, dict[str, Tensor]]:
        state = dict(self.context.checkpoint.component("visual_tokenizer").state_dict())
        trained = self.module.encoder.state_dict()
        return {"visual_tokenizer": state | {f"encoder.{name}": value for name, value in trained.items()}}
