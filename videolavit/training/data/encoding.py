"""Examples -> rows of fields, through the frozen tokenizers in torch.

Contract: `Encoder.encode` takes a few items and gives the rows of every field in the order of items and, within one, of
pictures or clips. Values are those the runtime's own preparation and the checkpoint's modules give; batching changes
them by rounding only. The keep draw and the noise of a picture depend on (seed, index of the item, number of the
picture) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.images import resize_image, to_signed, to_uint8, tokenizer_pixels
from runtime.motion.grid import TOKENIZER_SCALE, model_motion
from runtime.noise import Noise
from videolavit.checkpoints import Checkpoint
from videolavit.models.keyframe_decoder import pad_codes
from videolavit.reference import keyframes
from videolavit.training.data.examples import Negative, Question
from videolavit.training.data.fields import FIELDS, Size, components_of, latent_grid

PICTURES_AT_ONCE = 32
FRAMES_AT_ONCE = 8  # through a VAE
REBUILDING = 1  # what the noise of a rebuilt picture has in its key beside that of its keep draw


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
            "rebuilt_keyframe": self._visual,
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
        coded = "visual_ids" in self.fields or "rebuilt_keyframe" in self.fields
        found: dict[str, list[Any]] = {"features": [], "keep_logits": [], "visual_ids": []}
        for part in _chunks(pictures):
            features = tokenizer.features(
                self._tensor(np.stack([tokenizer_pixels(picture, side) for _, _, picture in part]))
            )  # [B, N, W]
            logits = tokenizer.keep_logits(features)  # [B, N, 2]
            found["features"].append(_array(features))
            found["keep_logits"].append(_array(logits))
            if coded:
                keep = np.stack(
                    [keep_draw(row, self.seed, i, k) for row, (i, k, _) in zip(_array(logits), part, strict=True)]
                )  # [B, N]
                merged = tokenizer.merge(features, self._tensor(keep))
                codes = _array(tokenizer.codes(merged)) + self.config.vocabulary.first_visual
                found["visual_ids"] += [row[kept > 0] for row, kept in zip(codes, keep, strict=True)]
        rows: dict[str, Any] = {
            "features": np.concatenate(found["features"]),
            "keep_logits": np.concatenate(found["keep_logits"]),
            "visual_ids": found["visual_ids"],
        }
        if "rebuilt_keyframe" in self.fields:
            parts = zip(_chunks(pictures), _chunks(found["visual_ids"]), strict=True)
            rows["rebuilt_keyframe"] = np.concatenate([self._rebuilt(*part) for part in parts])
        return rows

    def _rebuilt(self, pictures: Sequence[tuple[int, int, np.ndarray]], visual_ids: Sequence[np.ndarray]) -> np.ndarray:
        """Pictures [B, H, W, 3] uint8 as the key-frame detokenizer makes them of their ids.

        It starts half-way, from the picture's own latents with noise: what it makes from nothing has another place and
        another ground, under which the frames that follow the true picture do not follow.
        """
        config, defaults = self.config, self.config.defaults
        bare = [(ids - config.vocabulary.first_visual).tolist() for ids in visual_ids]
        codes, counts = (part.to(self._device) for part in pad_codes(bare, config.geometry.patches))
        vectors = self._modules["visual_tokenizer"].quantize.lookup(codes)
        prompt, pooled = self._modules["keyframe_decoder"](vectors, counts)
        vae = self._modules["keyframe_vae"]
        clean = self._tensor(self._encode(vae, [picture for *_, picture in pictures])) * vae.config.scaling_factor
        steps = defaults.keyframe_steps
        level, scheduler = steps // 2, config.keyframe_scheduler
        noises = [_noise(self.seed, index, k, REBUILDING) for index, k, _ in pictures]
        start = [
            keyframes.noised(part, scheduler, steps=steps, level=level, noise=noise)
            for part, noise in zip(clean.split(1), noises, strict=True)
        ]
        *_, latents = keyframes.denoise(
            self._modules["keyframe_unet"],
            scheduler,
            prompt,
            pooled,
            keyframes.size_ids(self.size, prompt).expand(len(prompt), -1),
            size=self.size,
            steps=steps,
            guidance=defaults.image_guidance,
            noise=noises[0],  # not drawn from: the models' own samplers add no noise on their way
            interval=defaults.image_guidance_interval,
            start=torch.cat(start),
            level=level,
        )
        return to_uint8(_array(keyframes.decode(vae, latents)))

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
    scores = logits + _noise(seed, index, picture).gumbel(*logits.shape)
    margin = scores[:, 0] - scores[:, 1]
    keep = margin >= 0
    keep[margin.argmax()] = True
    return keep.astype(np.float32)


def _noise(*key: int) -> Noise:
    """The noise that belongs to `key`: seed, index of the item, number of the picture, and what else sets it apart."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return Noise(int(state[0]) >> 1)


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
