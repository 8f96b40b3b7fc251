"""Stage `motion-tokenizer`: the VQ autoencoder over motion fields (reference semantics §4).

Objective: mean squared error between field and reconstruction, plus commitment; a codebook that follows moving averages
with decay 0.99 from a k-means start. Error and codebook are the official model's as far as its authors have told in
public, and by their class's defaults. What is added are options, off by default:

* Cells that move can count more (`moving_weight`). Most cells of most fields are exactly zero, and a tokenizer that
  says "nothing moves" has a low error already.
* Targets can be cut at `limit`. The search of an encoder now and then finds its match far away, in flat or repetitive
  areas; squared, one such vector outweighs a whole clip. The input is not cut: it is what is met in use.
* Fields can be mirrored by lot (`mirror`): a mirrored motion is a motion.

Contract: fields are [2, T, rows, columns] at the tokenizer's scale. For the first `continuous` steps vectors pass
unquantised, so that the k-means start sees an encoder that has something to say.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, ClassVar, cast

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from videolavit.models.motion_tokenizer import MotionTokenizer
from videolavit.shapes.scene import Scene, nearest_direction
from videolavit.training.codebook import Codebook, nearest
from videolavit.training.data import open_source
from videolavit.training.settings import CountOrNone, Decay, NotNegative
from videolavit.training.stage import Stage, StageContext
from videolavit.training.stages.clips import MotionFields, TokenizedClips, open_tokenized, stacked
from videolavit.training.stages.held_out import held_out_scenes
from videolavit.training.stages.starting import trainable

STILL = 0.2  # a cell whose vector is shorter stands still; half a pixel of a picture of 256 is 0.18
FASTER = 1.25  # speeds whose ratio is larger are different ones
SAMPLE = 8  # clips by which a new encoder's outputs are brought to size
PROBES = 128  # held-out clips
PROBES_AT_ONCE = 16


class MotionTokenizerOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Objective of the stage.

    Attributes:
        decay: of the codebook's moving averages.
        commitment: weight of the distance of encoder outputs to their codes.
        moving_weight: weight of a cell that moves against one that is still; 1: plain mean squared error.
        limit: largest component of a target; 0: not cut.
        mirror: flip fields left-right and up-down by lot, and transpose them where the grid is square.
        continuous: first steps without quantisation.
    """

    decay: Decay = 0.99
    commitment: NotNegative = 0.25
    moving_weight: Annotated[float, msgspec.Meta(ge=1.0)] = 1.0
    limit: NotNegative = 0.0
    mirror: bool = False
    continuous: CountOrNone = 0


class MotionAutoencoder(nn.Module):
    """The tokenizer, the trainer of its codebook, and the loss."""

    def __init__(self, tokenizer: MotionTokenizer, options: MotionTokenizerOptions) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.codebook = Codebook(tokenizer.quantize, decay=options.decay)
        self.options = options

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """Losses of batch["motion"] [B, 2, T, rows, columns]."""
        motion = mirrored(batch["motion"], generator) if self.options.mirror else batch["motion"]
        z = self.tokenizer.features(motion)  # [B, t, h, w, d]
        if step < self.options.continuous:
            vectors, commitment = F.normalize(z.float(), dim=-1), z.new_zeros(())
        else:
            vectors, _, commitment = self.codebook(z, generator)
        error = weighted_error(self.tokenizer.decode(vectors), motion, self.options)
        return {
            "loss": error + self.options.commitment * commitment,
            "error": error.detach(),
            "commitment": commitment.detach(),
        }

    def round_trip(self, motion: Tensor) -> tuple[Tensor, Tensor]:
        """motion [B, 2, T, rows, columns] -> (motion after its codes, codes [B, t, h, w] int64)."""
        z = self.tokenizer.features(motion)
        ids = nearest(F.normalize(z.float(), dim=-1), self.codebook.table)
        return self.tokenizer.decode(F.embedding(ids, self.codebook.table)), ids


class MotionTokenizerStage(Stage):
    """Trains `motion_tokenizer`."""

    name = "motion-tokenizer"
    trains = ("motion_tokenizer",)
    Options: ClassVar[type[msgspec.Struct]] = MotionTokenizerOptions
    module: MotionAutoencoder

    def __init__(self, context: StageContext, options: MotionTokenizerOptions) -> None:
        super().__init__(context, options)
        self.grid = context.checkpoint.config.geometry.motion_grid
        tokenizer = trainable(context, "motion_tokenizer")
        if "motion_tokenizer" in context.checkpoint.untrained:
            begin(tokenizer, stacked(self.dataset(), SAMPLE)["motion"])
        self.module = MotionAutoencoder(tokenizer, options)

    def dataset(self) -> Dataset[dict[str, Tensor]]:
        """Motion of one clip per item, from a tokenised folder (field `motion`) or from raw videos."""
        data, seed = self.context.data, self.context.seed
        if data.source == "tokenized":
            return TokenizedClips(open_tokenized(data, ("motion",), self.name), ("motion",), seed)
        geometry = self.context.checkpoint.config.geometry
        return MotionFields(open_source(data, geometry, seed=seed), self.grid, seed)

    def after_step(self, step: int) -> None:
        """Let the codebook follow what the step has seen."""
        lots = torch.Generator().manual_seed((self.context.seed << 32) + step)
        self.module.codebook.update(lots)

    def validate(self, generator: torch.Generator) -> dict[str, float]:
        """How well motion survives its codes, on held-out clips of the world of shapes.

        Returns:
            error: mean squared error; error_of_zero: that of the answer "nothing moves" (both with targets cut at the
            limit); direction: share of scenes of one shape that still goes its true way, or still stands still, and
            direction_before the share for which the field itself says so; speed: share of those that move whose speed
            stays within a factor of FASTER; perplexity: codes in use.
        """
        scenes, before = self._probes
        after, ids = map(torch.cat, zip(*map(self._round_trip, before.split(PROBES_AT_ONCE)), strict=True))
        limit = self.options.limit or float("inf")
        cut = before.clamp(-limit, limit)
        alone = [i for i, scene in enumerate(scenes) if len(scene.shapes) == 1]
        true = [scenes[i].shapes[0].motion.direction for i in alone]
        old, new = ([main_vector(fields[i].numpy()) for i in alone] for fields in (before, after))
        ratios = [
            np.hypot(*b) / np.hypot(*a) for a, b, way in zip(old, new, true, strict=True) if way and np.hypot(*a) > 0
        ]
        share = torch.bincount(ids.flatten()).float() / ids.numel()
        return {
            "error": float((after - cut).square().mean()),
            "error_of_zero": float(cut.square().mean()),
            "direction": float(np.mean([direction_of(v) == way for v, way in zip(new, true, strict=True)])),
            "direction_before": float(np.mean([direction_of(v) == way for v, way in zip(old, true, strict=True)])),
            "speed": float(np.mean([1 / FASTER < ratio < FASTER for ratio in ratios])),
            "perplexity": float(torch.exp(-torch.xlogy(share, share).sum())),
        }

    def components(self) -> dict[str, dict[str, Tensor]]:
        """The tokenizer with the codebook's rows under the quantiser's name."""
        state = self.module.tokenizer.state_dict()
        return {"motion_tokenizer": {**state, "quantize.embedding.weight": self.module.codebook.table}}

    @cached_property
    def _probes(self) -> tuple[list[Scene], Tensor]:
        """Held-out scenes and their motion [PROBES, 2, T, rows, columns], made when they are first asked for."""
        source = held_out_scenes(self.context.checkpoint.config.geometry, PROBES)
        scenes = [source.scene(index)[0] for index in range(PROBES)]
        return scenes, stacked(MotionFields(source, self.grid, 0), PROBES)["motion"]

    def _round_trip(self, motion: Tensor) -> tuple[Tensor, Tensor]:
        after, ids = self.module.round_trip(motion.to(self.context.device))
        return after.cpu(), ids.cpu()


@torch.no_grad()
def begin(tokenizer: MotionTokenizer, motion: Tensor) -> None:
    """Prepare a new tokenizer for training, given some `motion` [B, 2, T, rows, columns].

    The eight convolutions stand in the way of the residual stream, so they are made to keep its size: with torch's
    own start each loses two fifths of it, and training lingers at the mean field. The encoder's last layer is changed
    so that its outputs are white; else all point nearly the same way, and say next to nothing at unit length.
    """
    for part in tokenizer.modules():
        if isinstance(part, nn.Conv3d):
            part.weight *= 3**0.5
    z = tokenizer.features(motion).flatten(0, -2).double()  # [N, d]
    mean = z.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov(z.t()))
    whiten = (axes * (variances.clamp_min(0) + 1e-4 * variances[-1]).rsqrt()).t()  # [d, d]
    last = cast(nn.Linear, tokenizer.encode_task_layer[-1])
    last.weight.copy_(whiten @ last.weight.double())
    last.bias.copy_(whiten @ (last.bias.double() - mean))


def mirrored(motion: Tensor, generator: torch.Generator) -> Tensor:
    """motion [B, 2, T, rows, columns], each clip mirrored by lot, and transposed by lot where the grid is square."""
    rows, columns = motion.shape[3:]
    lots = torch.rand(3, len(motion), 1, 1, 1, 1, generator=generator, device=motion.device) < 0.5
    against_x = motion.new_tensor([-1.0, 1.0])[:, None, None, None]
    motion = torch.where(lots[0], motion.flip(4) * against_x, motion)
    motion = torch.where(lots[1], motion.flip(3) * -against_x, motion)
    return torch.where(lots[2], motion.flip(1).transpose(3, 4), motion) if rows == columns else motion


def weighted_error(said: Tensor, motion: Tensor, options: MotionTokenizerOptions) -> Tensor:
    """Weighted mean squared error of fields [B, 2, T, rows, columns], as the module's docstring has it."""
    target = motion.clamp(-options.limit, options.limit) if options.limit else motion
    moves = motion.abs().amax(1, keepdim=True) > STILL  # [B, 1, T, rows, columns]
    weight = moves * (options.moving_weight - 1) + 1
    return ((said - target).square() * weight).mean()


def main_vector(motion: np.ndarray) -> np.ndarray:
    """Median [2] of the vectors of the cells that move in a field [2, T, rows, columns]; zeros if none does."""
    cells = motion[:, np.hypot(*motion) > STILL]  # [2, N]
    return np.median(cells, axis=1) if cells.size else np.zeros(2)


def direction_of(vector: np.ndarray) -> str | None:
    """The nearest of the eight directions; None for a vector that stands still."""
    if np.hypot(*vector) < STILL:
        return None
    return nearest_direction(vector)
