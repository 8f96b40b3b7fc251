"""Golden cases of answers (j): question, pictures and motion to embeddings, ids and text (reference semantics §13).

A batch whose rows differ in length is answered wrongly by the reference after the first token (§13.4, quirk 18): its
rows are compared with the runs that have them alone, as far as the batch itself goes only in what precedes that token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from export.fidelity import configs
from export.fidelity.backends import Engines
from export.fidelity.golden import Golden
from export.fidelity.language import SCORES, TOKENIZER
from export.fidelity.measure import Measurement, close, equal
from runtime.decoder import DecodingOptions, collect, generate, text_phase
from runtime.engines import Engine, LanguageModelEngine
from runtime.geometry import Geometry
from runtime.prompts import Kind, answer_text, question_ids
from runtime.tokenizers import TextTokenizer
from runtime.vocabulary import EOS, Vocabulary
from videolavit.checkpoints import Checkpoint
from videolavit.config import ModelConfig

EMBEDDINGS = 3e-5
IMAGE_SLOT, VIDEO_SLOT, PAD = -200, -201, 0  # the reference's placeholders, and its padding on the right
VOCABULARY = Vocabulary()


class _Model:
    """The engines an answer goes through."""

    def __init__(self, golden: Golden, engines: Engines) -> None:
        self.golden = golden
        checkpoint = _checkpoint(golden)
        self.max_positions = checkpoint.config.language_model.max_positions
        self.tokenizer = TextTokenizer(golden.path.with_name(TOKENIZER))
        self.encoder = engines.engine(checkpoint, "visual_encoder")
        self.merger = engines.engine(checkpoint, "visual_merger")
        self.motion: Engine = engines.engine(checkpoint, "motion_encoder")
        self.embedding = engines.engine(checkpoint, "token_embedding")
        self.language_model: LanguageModelEngine = engines.language_model(checkpoint)

    def embed(self, ids: np.ndarray | list[int]) -> np.ndarray:
        """ids [..] -> embeddings [.., D]."""
        array = np.asarray(ids, np.int64)
        return self.embedding(ids=array.reshape(-1, array.shape[-1]))["embeds"].reshape(*array.shape, -1)

    def pictures(self, name: str, pixels: np.ndarray) -> list[np.ndarray]:
        """Embeddings [n, D] of the patches kept of every picture."""
        keep = self.golden.inputs[f"{name}/hard_keep_decision"]
        features = self.encoder(pixels=pixels)["features"]
        embeds = self.merger(features=features, keep=keep)["embeds"]
        return [row[kept] for row, kept in zip(embeds, keep > 0, strict=True)]

    def prompts(self, name: str) -> list[np.ndarray]:
        """Embeddings [L, D] of every row's prompt, pictures and motion in their place (§13.1, §13.2)."""
        inputs = self.golden.inputs
        texts, kind = self.golden.meta["calls"][name]["texts"], _kind(self.golden, name)
        spans: list[list[np.ndarray]] = [[] for _ in texts]
        if kind == "image":
            spans = [[self._between_markers(picture)] for picture in self.pictures(name, _pixels(self.golden, name))]
        elif kind == "video":
            codes = self.motion(motion=inputs[f"{name}/motion"])["codes"]
            found = zip(self.pictures(name, inputs[f"{name}/visual"]), codes, strict=True)
            spans = [[x for p, c in found for x in (self._between_markers(p), self.embed(VOCABULARY.motion_span(c)))]]
        rows = []
        for text, span in zip(texts, spans, strict=True):
            before, after = question_ids(self.tokenizer, text, kind)
            rows.append(np.concatenate([self.embed(before), *span, *([self.embed(after)] if after else [])]))
        return rows

    def _between_markers(self, picture: np.ndarray) -> np.ndarray:
        markers = self.embed([VOCABULARY.image_start, VOCABULARY.image_end])
        return np.concatenate([markers[:1], picture, markers[1:]])


def understanding(golden: Golden, engines: Engines) -> Iterator[Measurement]:
    """Every question of the file, from prepared pixels and motion to the text of the answer."""
    model = _Model(golden, engines)
    outputs = golden.outputs
    call = golden.meta["call_kwargs"]
    options = DecodingOptions(max_new=call["max_length"], min_new=call["min_length"], greedy=True)
    for name in golden.meta["calls"]:
        if f"{name}/motion_tokens" in outputs:
            codes = model.motion(motion=golden.inputs[f"{name}/motion"])["codes"]
            yield equal("motion codes", codes, outputs[f"{name}/motion_tokens"] % VOCABULARY.first_motion)
        prompts = model.prompts(name)
        yield from _embeddings(golden, name, prompts)
        steps = list(
            generate(
                model.language_model,
                model.embed,
                prompts,
                text_phase(VOCABULARY),
                options,
                max_positions=model.max_positions,
            )
        )
        ids = collect(steps)
        uneven = len({len(prompt) for prompt in prompts}) > 1
        for index in range(1 if uneven else 2):
            scores = np.full((len(prompts), VOCABULARY.size), -np.inf)
            scores[:, : VOCABULARY.text_size] = steps[index].scores
            shown = scores[:, golden.inputs["score_slice_ids"]]
            yield close("scores of the first tokens", shown, outputs[f"{name}/processed_scores_step{index}"], SCORES)
        for row, found in enumerate(ids):
            target, target_row = (f"{name}_row{row}", 0) if uneven else (name, row)
            if f"{target}/generated_ids" not in outputs:
                continue
            expected = outputs[f"{target}/generated_ids"][target_row]
            yield equal("generated ids", _until_end(found), _until_end(expected))
            text = answer_text(model.tokenizer.decode(_until_end(found)))
            yield equal("text of the answer", [text], [golden.meta["calls"][target]["output_text"][target_row]])


def understanding_host(golden: Golden) -> Iterator[Measurement]:
    """Prompts from texts, and the text of stored ids."""
    tokenizer = TextTokenizer(golden.path.with_name(TOKENIZER))
    for name, call in golden.meta["calls"].items():
        kind = _kind(golden, name)
        slot = [] if kind is None else [IMAGE_SLOT if kind == "image" else VIDEO_SLOT]
        for text, stored in zip(call["texts"], golden.inputs[f"{name}/input_ids"], strict=True):
            before, after = question_ids(tokenizer, text, kind)
            ids = [*before, *slot, *after]
            yield equal("prompt ids", np.pad(ids, (0, len(stored) - len(ids)), constant_values=PAD), stored)
        for ids, text in zip(golden.outputs[f"{name}/generated_ids"], call["output_text"], strict=True):
            yield equal("text of the answer", [answer_text(tokenizer.decode(_until_end(ids)))], [text])


def _embeddings(golden: Golden, name: str, prompts: list[np.ndarray]) -> Iterator[Measurement]:
    """Stored embeddings are padded on the left; the mask says by how much, the positions start behind it."""
    mask, positions = golden.outputs[f"{name}/attention_mask"], golden.outputs[f"{name}/position_ids"]
    yield equal("prompt lengths", [len(prompt) for prompt in prompts], mask.sum(axis=1))
    for row, prompt in enumerate(prompts):
        yield equal("positions", np.arange(len(prompt)), positions[row][mask[row] > 0])
        if f"{name}/inputs_embeds" in golden.outputs:
            expected = golden.outputs[f"{name}/inputs_embeds"][row][mask[row] > 0]
            yield close("prompt embeddings", prompt, expected, EMBEDDINGS)


def _kind(golden: Golden, name: str) -> Kind | None:
    ids = golden.inputs[f"{name}/input_ids"]
    if (ids == IMAGE_SLOT).any():
        return "image"
    return "video" if (ids == VIDEO_SLOT).any() else None


def _pixels(golden: Golden, name: str) -> np.ndarray:
    """Pixels [B, 3, S, S]; a run of one row of a batch has them under the batch's name."""
    if f"{name}/pixels" in golden.inputs:
        return golden.inputs[f"{name}/pixels"]
    batch, row = re.fullmatch(r"(.+)_row(\d+)", name).groups()  # type: ignore[union-attr]
    return golden.inputs[f"{batch}/pixels"][[int(row)]]


def _until_end(ids: np.ndarray) -> list[int]:
    """Ids up to the end of the answer; what follows is padding."""
    found = ids.tolist()
    return found[: found.index(EOS)] if EOS in found else found


def _checkpoint(golden: Golden) -> Checkpoint:
    c = golden.config
    tokenizer = configs.motion_tokenizer(c["motion_tokenizer"])
    llama = configs.language_model(c["llama"])
    visual = configs.visual_tokenizer(c["dvt"], c["eva"], llama.hidden_size)
    model = ModelConfig(
        name="golden",
        vocabulary=VOCABULARY,
        geometry=Geometry(
            frames=tokenizer.frames,
            motion_grid=tokenizer.grid,
            image_size=visual.eva.image_size,
            patch_size=visual.eva.patch_size,
        ),
        visual_tokenizer=visual,
        motion_tokenizer=tokenizer,
        language_model=llama,
    )
    prefixes = {
        "language_model": "",
        "visual_tokenizer": "model.visual_tokenizer.",
        "motion_tokenizer": "model.motion_tokenizer.",
    }
    return configs.checkpoint(golden, model, prefixes, weights=configs.llama_weights(golden))
