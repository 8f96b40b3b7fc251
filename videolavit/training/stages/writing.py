"""How well a language model writes held-out scenes of the world of shapes from their captions.

Contract: scenes and their tokens depend on the checkpoint alone. Writing follows the runtime's own rules
(`runtime.decoder`), with the torch model behind its engine contract, and its defaults unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import DynamicCache

from runtime.decoder import DecodingOptions, collect, generate, image_phase, motion_phase
from runtime.noise import Noise
from runtime.vocabulary import EOS
from videolavit.checkpoints import Checkpoint
from videolavit.shapes.scene import Scene, nearest_direction
from videolavit.training.data.encoding import Encoder
from videolavit.training.data.encoding import Item as Example
from videolavit.training.stages.held_out import held_out_scenes
from videolavit.training.stages.sequences import Item, Layout

FIELDS = ("motion_ids", "features", "keep_logits", "visual_ids")
ROWS = 32  # written at a time


class HeldOut:
    """`count` held-out scenes as `items` of a tokenised folder, and the `scenes` themselves."""

    def __init__(self, checkpoint: Checkpoint, count: int) -> None:
        self.checkpoint = checkpoint
        geometry = checkpoint.config.geometry
        source = held_out_scenes(geometry, count)
        self.scenes = [source.scene(index)[0] for index in range(count)]
        encoder = Encoder(checkpoint, FIELDS, geometry.video_size, seed=0)
        self.items: list[Item] = []
        for index in range(count):
            clip = source.clip(index)
            frames, grid = clip.per_clip()
            example = Example(
                index=index,
                pictures=[frames[0, 0]],
                grid=grid,
                captions=clip.captions,
                questions=clip.questions,
            )
            rows = encoder.encode([example])
            self.items.append(
                {
                    "index": index,
                    "captions": clip.captions,
                    "questions": clip.questions,
                    "visual_ids": [torch.from_numpy(row).long() for row in rows["visual_ids"]],
                    "motion_ids": torch.from_numpy(rows["motion_ids"]).long(),
                    "features": torch.from_numpy(rows["features"]).float(),
                    "keep_logits": torch.from_numpy(rows["keep_logits"]).float(),
                }
            )

    def generation(self, model: Any, layout: Layout, rules: Any) -> dict[str, float]:
        """Figures of what `model` writes from the scenes' first captions.

        Args:
            rules: guidance, top-k and temperature, each None for the model's default, and `greedy_image`.

        Returns:
            direction: of scenes of one moving shape, the share whose written motion, decoded, goes its way; the same
            for the tokenised true motion is `direction of true motion`, the most that can be expected. `image tokens`:
            mean number written.
        """
        chosen = [i for i, scene in enumerate(self.scenes) if _direction(scene) is not None]
        if not chosen:
            return {}
        written, lengths = [], []
        for start in range(0, len(chosen), ROWS):
            part = chosen[start : start + ROWS]
            prompts = [layout.text.encode(self.items[i]["captions"][0]) for i in part]
            motion, count = self._write(model, prompts, rules)
            written.append(motion)
            lengths += count
        vocabulary = self.checkpoint.config.vocabulary
        true = np.stack([self.items[i]["motion_ids"][0].numpy() for i in chosen]) - vocabulary.first_motion
        wanted = [_direction(self.scenes[i]) for i in chosen]
        return {
            "direction": self._share(np.concatenate(written), wanted),
            "direction of true motion": self._share(true, wanted),
            "image tokens": float(np.mean(lengths)),
        }

    def _write(self, model: Any, prompts: Sequence[list[int]], rules: Any) -> tuple[np.ndarray, list[int]]:
        """Motion codes [B, K] after the prompts and pictures written after them, and the pictures' lengths."""
        config = self.checkpoint.config
        defaults, vocabulary = config.defaults, config.vocabulary
        engine = TorchLanguageModel(model)
        limit = config.language_model.max_positions
        image = DecodingOptions(
            max_new=defaults.max_image_tokens,
            min_new=min(defaults.min_image_tokens, defaults.max_image_tokens),
            guidance=_given(rules.text_guidance, defaults.text_guidance),
            temperature=_given(rules.temperature, defaults.temperature),
            top_k=_given(rules.top_k, defaults.top_k),
            top_p=defaults.top_p,
            greedy=rules.greedy_image,
        )
        contexts = [engine.embed(np.array([prompt]))[0] for prompt in prompts]
        steps = generate(
            engine, engine.embed, contexts, image_phase(vocabulary), image, max_positions=limit, noise=Noise(0)
        )
        pictures = [[int(i) for i in row if i != EOS] for row in collect(steps)]
        rows = [[*prompt, vocabulary.image_start, *ids] for prompt, ids in zip(prompts, pictures, strict=True)]
        motion = DecodingOptions(
            max_new=config.geometry.motion_tokens,
            guidance=_given(rules.motion_guidance, defaults.motion_guidance),
            greedy=True,
            exact=config.geometry.motion_tokens,
        )
        contexts = [engine.embed(np.array([row]))[0] for row in rows]
        steps = generate(engine, engine.embed, contexts, motion_phase(vocabulary), motion, max_positions=limit)
        return collect(steps) - vocabulary.first_motion, [len(ids) for ids in pictures]

    @torch.no_grad()
    def _share(self, codes: np.ndarray, wanted: Sequence[Any]) -> float:
        """Share of motions, codes [B, K], that go the way `wanted`."""
        tokenizer = cast(Any, self.checkpoint.component("motion_tokenizer"))
        found = []
        for start in range(0, len(codes), ROWS):
            device = next(tokenizer.parameters()).device
            motion = tokenizer.decode_codes(torch.from_numpy(codes[start : start + ROWS]).to(device))
            found += [nearest_direction(field.sum(axis=(1, 2, 3))) for field in motion.cpu().numpy()]
        return float(np.mean([a == b for a, b in zip(found, wanted, strict=True)]))


def _direction(scene: Scene) -> str | None:
    """Direction of a scene's only shape; None if it has two, or does not go anywhere."""
    return scene.shapes[0].motion.direction if len(scene.shapes) == 1 else None


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


class TorchLanguageModel:
    """A Llama of transformers as a language model engine of the runtime (`runtime.engines.LanguageModelEngine`)."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self.lengths = np.zeros(0, np.int32)
        self.most_rows: int | None = None
        self.close()

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """ids [B, S] -> embeddings [B, S, D]."""
        table = self._model.get_input_embeddings().weight.detach()
        return table[torch.from_numpy(np.asarray(ids, np.int64)).to(self._device)].float().cpu().numpy()

    def start(self, rows: int, capacity: int) -> None:
        self._cache = DynamicCache(config=self._model.config)
        self._mask = torch.zeros(rows, 0, dtype=torch.long, device=self._device)
        self.lengths = np.zeros(rows, np.int32)

    @torch.inference_mode()
    def forward(self, embeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
        # The cache of transformers has one length for all rows: their new positions are moved to the right.
        width = embeds.shape[1]
        moved, new = np.zeros_like(embeds), np.zeros(embeds.shape[:2], np.int64)
        for row, count in enumerate(counts):
            moved[row, width - count :] = embeds[row, :count]
            new[row, width - count :] = 1
        self._mask = torch.cat([self._mask, torch.from_numpy(new).to(self._device)], dim=1)
        positions = (self._mask.cumsum(1) - 1).clamp_min(0)[:, -width:]
        hidden = self._model.model(
            inputs_embeds=torch.from_numpy(moved).to(self._device),
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self.lengths = self._mask.sum(1).to(torch.int32).cpu().numpy()
        return self._model.lm_head(hidden[:, -1]).float().cpu().numpy()

    def rewind(self, lengths: np.ndarray) -> None:
        # What is forgotten stays in the cache, where no position sees it.
        self._mask = self._mask * (self._mask.cumsum(1) <= torch.from_numpy(lengths).to(self._device)[:, None])
        self.lengths = np.array(lengths, np.int32)

    def close(self) -> None:
        self._cache, self._mask = None, torch.zeros(0, 0, dtype=torch.long)
