"""Examples -> rows of fields, through the frozen tokenizers in torch.

Contract: `Encoder.encode` takes a few items and gives the rows of every field in the order of items and, within one, of
pictures or clips. Values are those the runtime's own preparation and the checkpoint's modules give; batching changes
them by rounding only. The keep draw of a picture depends on (seed, index of the item, number of the picture) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.images import resize_image, to_signed, tokenizer_pixels
from runtime.motion.grid import TOKENIZER_SCALE, model_motion
from runtime.noise import Noise
from videolavit.checkpoints import Checkpoint
from videolavit.training.data.examples import Negative, Question
from videolavit.training.data.fields import FIELDS, Size, components_of, latent_grid

PICTURES_AT_ONCE = 32
FRAMES_AT_ONCE = 8  # through a VAE


@dataclass(frozen=True, kw_only=True)
class Item:
    """What is encoded of one example.

    Attributes:
        index: in the source.
        pictures: [H, W, 3] uint8 each: the picture, or the key frames of the clips.
        frames, grid: [C, T, H, W, 3] and [C, T, 2, rows, columns], or None for a picture.
        captions, questions, negatives: what is said about it.
    """

    index: int
    pictures: Sequence[np.ndarray]
    frames: np.ndarray | None = None
    grid: np.ndarray | None = None
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    negatives: tuple[Negative, ...] = ()

    @property
    def clips(self) -> int:
        return 0 if self.grid is None else len(self.grid)


class Encoder:
    """Computes `fields` (names of `FIELDS`) with the modules of `checkpoint`.

    Args:
        size: (width, height) to which frames and key frames are brought for the VAEs.
        seed: of the keep draws.
    """

    def __init__(
        self, checkpoint: Checkpoint, fields: Sequence[str], size: Size, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.config, self.fields, self.size, self.seed = checkpoint.config, tuple(fields), size, seed
        self._device = torch.device(device)
        self._modules: dict[str, Any] = {
            name: checkpoint.component(name).to(self._device) for name in components_of(fields)
        }
        self._compute: dict[str, Callable[[Sequence[Item]], dict[str, Any]]] = {
            "motion": self._motion,
            "motion_ids": self._motion,
            "motion_latent": self._motion_latent,
            "latents": self._latents,
            "keyframe": self._keyframe,
            "keyframe_latents": self._keyframe,
            "features": self._visual,
            "keep_logits": self._visual,
            "visual_ids": self._visual,
        }

    @torch.inference_mode()
    def encode(self, items: Sequence[Item]) -> dict[str, Any]:
        """Rows by field: an array [rows, ...] of the field's type, for a ragged field a list of arrays [n]."""
        found: dict[str, Any] = {}
        for name in self.fields:
            if name not in found:
                found |= self._compute[name](items)
        return {name: _stored(found[name], FIELDS[name].dtype) for name in self.fields}

    def _motion(self, items: Sequence[Item]) -> dict[str, Any]:
        grids = [model_motion(grid, self.config.geometry.motion_grid) for item in items for grid in _grids(item)]
        motion = _stack(grids, (2, self.config.geometry.frames, *self.config.geometry.motion_grid))
        found: dict[str, Any] = {"motion": motion}
        if "motion_ids" in self.fields:
            if len(motion):
                codes = self._modules["motion_tokenizer"].encode(self._tensor(motion))
                found["motion_ids"] = _array(codes) + self.config.vocabulary.first_motion
            else:
                found["motion_ids"] = np.empty((0, self.config.geometry.motion_tokens), np.int64)
        return found

    def _motion_latent(self, items: Sequence[Item]) -> dict[str, Any]:
        shape = latent_grid(self.size)
        grids = [model_motion(grid, shape) / np.float32(TOKENIZER_SCALE) for item in items for grid in _grids(item)]
        return {"motion_latent": _stack(grids, (2, self.config.geometry.frames, *shape))}

    def _latents(self, items: Sequence[Item]) -> dict[str, Any]:
        vae = self._modules["video_vae"]
        clips = [frames for item in items if item.frames is not None for frames in item.frames]
        latents = [self._encode(vae, frames) for frames in clips]  # [T, 4, h, w] each
        return {"latents": _stack(latents, (self.config.geometry.frames, 4, *latent_grid(self.size)))}

    def _keyframe(self, items: Sequence[Item]) -> dict[str, Any]:
        pictures = [resize_image(picture, self.size) for item in items for picture in item.pictures]
        found: dict[str, Any] = {"keyframe": np.stack(pictures)}
        if "keyframe_latents" in self.fields:
            parts = [self._encode(self._modules["keyframe_vae"], part) for part in _chunks(pictures)]
            found["keyframe_latents"] = np.concatenate(parts)
        return found

    def _visual(self, items: Sequence[Item]) -> dict[str, Any]:
        tokenizer, side = self._modules["visual_tokenizer"], self.config.geometry.image_size
        pictures = [(item.index, k, picture) for item in items for k, picture in enumerate(item.pictures)]
        found: dict[str, list[Any]] = {"features": [], "keep_logits": [], "visual_ids": []}
        for part in _chunks(pictures):
            features = tokenizer.features(
                self._tensor(np.stack([tokenizer_pixels(picture, side) for _, _, picture in part]))
            )  # [B, N, W]
            logits = tokenizer.keep_logits(features)  # [B, N, 2]
            found["features"].append(_array(features))
            found["keep_logits"].append(_array(logits))
            if "visual_ids" in self.fields:
                keep = np.stack(
                    [keep_draw(row, self.seed, i, k) for row, (i, k, _) in zip(_array(logits), part, strict=True)]
                )  # [B, N]
                merged = tokenizer.merge(features, self._tensor(keep))
                codes = _array(tokenizer.codes(merged)) + self.config.vocabulary.first_visual
                found["visual_ids"] += [row[kept > 0] for row, kept in zip(codes, keep, strict=True)]
        return {
            "features": np.concatenate(found["features"]),
            "keep_logits": np.concatenate(found["keep_logits"]),
            "visual_ids": found["visual_ids"],
        }

    def _encode(self, vae: Any, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Pictures [H, W, 3] uint8 -> latents [B, 4, h, w]."""
        signed = np.stack([to_signed(resize_image(picture, self.size)) for picture in pictures])
        parts = self._tensor(signed).split(FRAMES_AT_ONCE)
        return np.concatenate([_array(vae.encode(part).latent_dist.mode()) for part in parts])

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def keep_draw(logits: np.ndarray, seed: int, index: int, picture: int) -> np.ndarray:
    """Keep decision [N] float32 of 0 and 1 for log-probabilities [N, 2] (reference semantics §6.3).

    A draw that keeps nothing keeps the patch that was nearest to it, so that every picture has an id.
    """
    state = np.random.SeedSequence([seed, index, picture]).generate_state(1, np.uint64)
    scores = logits + Noise(int(state[0]) >> 1).gumbel(*logits.shape)
    margin = scores[:, 0] - scores[:, 1]
    keep = margin >= 0
    keep[margin.argmax()] = True
    return keep.astype(np.float32)


def _grids(item: Item) -> Sequence[np.ndarray]:
    return [] if item.grid is None else list(item.grid)


def _chunks(values: Sequence[Any]) -> list[Sequence[Any]]:
    return [values[start : start + PICTURES_AT_ONCE] for start in range(0, len(values), PICTURES_AT_ONCE)]


def _stack(rows: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return np.stack(rows) if rows else np.empty((0, *shape), np.float32)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def _stored(rows: Any, dtype: str) -> Any:
    return [row.astype(dtype) for row in rows] if isinstance(rows, list) else rows.astype(dtype)
