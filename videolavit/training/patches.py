"""What the patches of pictures show: single pictures to train the visual stages on, exact labels, and a reader of them.

Contract: items are pure functions of (seed, index). Labels exist for the world of shapes only. Patches are in raster
order; places and lengths are shares of the frame.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from torch import Tensor

from runtime.images import MEAN, STD, resize_image
from videolavit.config import EvaConfig
from videolavit.shapes import COLOURS, KINDS, Scene, render_frame, sample_scene
from videolavit.shapes.drawing import signed_distance
from videolavit.training.data import Source, open_source
from videolavit.training.stage import StageContext

GRAIN = 4  # points per axis at which the cover of a patch is measured
HELD_OUT = 256  # pictures that are judged
FITTED = 256  # pictures that the reader is fitted to


def normalise(pictures: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] as the vision transformer takes it (reference semantics §11.5)."""
    mean, std = torch.from_numpy(MEAN).to(pictures.device), torch.from_numpy(STD).to(pictures.device)
    return ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def grid_of(eva: EvaConfig) -> int:
    """Patches per side."""
    return eva.image_size // eva.patch_size


def labels(scene: Scene, frame: int, grid: int) -> dict[str, Tensor]:
    """What the patches of a frame show, N = grid * grid.

    Returns:
        cover [N] 0..1 by any shape; and of the shape nearest to each patch: its number, colour and kind [N] int64, its
        centre [N, 2] (x, y) and diameter [N].
    """
    fine = (np.arange(grid * GRAIN) + 0.5) / (grid * GRAIN)
    gaps, covers, facts = [], [], []
    for number, shape in enumerate(scene.shapes):
        (x, y), diameter = shape.centre_at(frame), shape.diameter_at(frame)
        across, down = (fine - x)[None, :] / (diameter / 2), (fine - y)[:, None] / (diameter / 2)
        gap = signed_distance(shape.kind, across, down) * diameter / 2  # [G, G]
        blocks = gap.reshape(grid, GRAIN, grid, GRAIN).swapaxes(1, 2).reshape(grid * grid, -1)  # [N, GRAIN^2]
        covers.append((blocks < 0).mean(-1))
        gaps.append(blocks.mean(-1))
        facts.append((number, COLOURS.index(shape.colour), KINDS.index(shape.kind), x, y, diameter))
    chosen = torch.tensor(facts)[torch.from_numpy(np.argmin(gaps, axis=0))]  # [N, 6]
    return {
        "cover": torch.from_numpy(np.max(covers, axis=0)).float(),
        "shape": chosen[:, 0].long(),
        "colour": chosen[:, 1].long(),
        "kind": chosen[:, 2].long(),
        "centre": chosen[:, 3:5].float(),
        "diameter": chosen[:, 5].float(),
    }


class ShapesPictures(torch.utils.data.Dataset[dict[str, Any]]):
    """Any frame of any scene: `picture` [S, S, 3] uint8 and, if wanted, `labels`."""

    def __init__(self, eva: EvaConfig, *, size: int, seed: int, split: str, labelled: bool) -> None:
        self.eva, self.size, self.seed, self.split, self.labelled = eva, size, seed, split, labelled

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, index])
        scene = sample_scene(int(rng.integers(2**40)), split=self.split)  # type: ignore[arg-type]
        frame = int(rng.integers(scene.frames))
        item = {"picture": torch.from_numpy(render_frame(scene, frame, self.eva.image_size))}
        return item | labels(scene, frame, grid_of(self.eva)) if self.labelled else item


class SourcePictures(torch.utils.data.Dataset[dict[str, Any]]):
    """The pictures of any source: `picture` [S, S, 3] uint8."""

    def __init__(self, source: Source, side: int) -> None:
        self.source, self.side = source, side

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = resize_image(self.source.picture(index).image, (self.side, self.side))
        return {"picture": torch.from_numpy(np.array(image))}


def pictures(context: StageContext, *, labelled: bool) -> torch.utils.data.Dataset[dict[str, Any]]:
    """The pictures that the settings name; labels only from the world of shapes.

    Raises UsageError for settings that name no usable source.
    """
    data, config = context.data, context.checkpoint.config
    eva = config.visual_tokenizer.eva
    source = open_source(data, config.geometry, seed=context.seed)
    if data.source == "shapes":
        return ShapesPictures(eva, size=data.size, seed=context.seed, split=data.split, labelled=labelled)
    return SourcePictures(source, eva.image_size)


def labelled_batch(context: StageContext, *, split: str, size: int) -> dict[str, Tensor]:
    """`size` pictures of the world of shapes with labels and normalised `pixels`, on the context's device."""
    items = ShapesPictures(
        context.checkpoint.config.visual_tokenizer.eva, size=size, seed=2**31 + context.seed, split=split, labelled=True
    )
    batch = send_to_device(torch.utils.data.default_collate([items[index] for index in range(size)]), context.device)
    return {**batch, "pixels": normalise(batch["picture"])}


class Reader:
    """Reads labels from features by linear maps that are fitted to true features in closed form."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights  # [W + 1, size] by name

    @classmethod
    def fit(cls, features: Tensor, batch: dict[str, Tensor]) -> Reader:
        """Least squares over features [B, N, W] with `labels`; all but the cover from covered patches only."""
        on = batch["cover"] > 0.5  # [B, N]
        targets = {
            "colour": F.one_hot(batch["colour"][on], len(COLOURS)).float(),
            "kind": F.one_hot(batch["kind"][on], len(KINDS)).float(),
            "centre": batch["centre"][on],
            "diameter": batch["diameter"][on][:, None],
        }
        weights = {name: _ridge(features[on], target) for name, target in targets.items()}
        weights["cover"] = _ridge(features.flatten(0, 1), on.flatten().float()[:, None])
        return cls(weights)

    def judge(self, features: Tensor, batch: dict[str, Tensor]) -> dict[str, float]:
        """What features [B, N, W], true or rebuilt, still say.

        Returns:
            colour, kind: shares of right patches among those that a shape covers by more than half; cover_iou: overlap
            of said and true cover; centre, diameter: median errors over shapes, each read as the mean over its covered
            patches; shapes_right: share of shapes with colour, kind and, within half a patch, centre right.
        """
        rows = _with_one(features)
        said = {name: rows @ weight for name, weight in self._weights.items()}  # [B, N, size]
        on = batch["cover"] > 0.5
        claimed = said["cover"][..., 0] > 0.5
        half = 0.5 / features.shape[1] ** 0.5
        # One row a shape: the mean of what its covered patches say.
        owner = (torch.arange(len(on), device=on.device)[:, None] * 2 + batch["shape"])[on]  # two shapes at most
        _, owner = owner.unique(return_inverse=True)
        colour, kind, centre, diameter = (
            _mean_by(owner, said[name][on]) for name in ("colour", "kind", "centre", "diameter")
        )
        true = {name: _mean_by(owner, batch[name][on].float()) for name in ("colour", "kind", "centre", "diameter")}
        off = (centre - true["centre"]).norm(dim=-1)
        right = (colour.argmax(-1) == true["colour"].round()) & (kind.argmax(-1) == true["kind"].round())
        return {
            "colour": float((said["colour"].argmax(-1) == batch["colour"])[on].float().mean()),
            "kind": float((said["kind"].argmax(-1) == batch["kind"])[on].float().mean()),
            "cover_iou": float((claimed & on).sum() / (claimed | on).sum().clamp_min(1)),
            "centre": float(off.median()),
            "diameter": float((diameter[:, 0] - true["diameter"]).abs().median()),
            "shapes_right": float((right & (off < half)).float().mean()),
            "shapes_named": float(right.float().mean()),
        }


def _ridge(rows: Tensor, targets: Tensor) -> Tensor:
    """Weights [W + 1, K] from rows [M, W] to targets [M, K]."""
    rows = _with_one(rows)
    square = rows.t() @ rows
    return torch.linalg.solve(
        square + 1e-3 * len(rows) * torch.eye(len(square), device=rows.device), rows.t() @ targets
    )


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)


def _mean_by(owner: Tensor, values: Tensor) -> Tensor:
    """Means of values [M, ..] over equal `owner` [M]."""
    total = values.new_zeros((int(owner.max()) + 1, *values.shape[1:])).index_add_(0, owner, values)
    return total / owner.bincount().to(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
