"""Training of the language model: rows are the runtime's own contexts, only what should be learnt is, losses fall."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from language_rows import CONFIG, ITEMS, TEXT_FIRST, WIDTH, K, V, item, small_checkpoint, stage, steps, tokenized

from runtime.errors import CheckpointError, UsageError
from runtime.noise import Noise
from runtime.prompts import STOP, answer_text, question_ids
from runtime.requests import AnswerRequest, VideoRequest
from runtime.vocabulary import EOS, UNK
from videolavit.checkpoints import Checkpoint, RandomWeights, load
from videolavit.tokenizer_training import SHAPES_TOKENIZER
from videolavit.training.data.examples import Question
from videolavit.training.loop import train
from videolavit.training.settings import DataSettings, TrainSettings
from videolavit.training.stage import StageContext, find_stage
from videolavit.training.stages import sequences
from videolavit.training.stages.instruct import InstructOptions, InstructStage
from videolavit.training.stages.language_model import LanguageModelOptions, LanguageModelStage, PartWeights
from videolavit.training.stages.sequences import ANSWER, CONTEXT, GENERATED, NO_LABEL, Layout, Mix
from videolavit.training.stages.writing import HeldOut, TorchLanguageModel


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return small_checkpoint()


@pytest.fixture(scope="module")
def layout() -> Layout:
    return Layout(SHAPES_TOKENIZER.read_bytes(), V, 512)


@pytest.fixture(scope="module")
def folders(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tokenised folder and the checkpoint that made it."""
    return tokenized(checkpoint, tmp_path_factory.mktemp("language"))


# Rows are what the runtime builds


class Recorder:
    """Stands in for a pipeline's engines: notes the embeddings that the language model is started with."""

    def __init__(self, picture: dict[str, np.ndarray], motion_codes: np.ndarray) -> None:
        self.picture, self.motion_codes, self.contexts = picture, motion_codes, list[np.ndarray]()
        self.written = list[int]()
        self.most_rows: int | None = None

    def get(self, name: str, task: str | None = None) -> Any:
        return getattr(self, name)

    def language_model(self, task: str | None = None) -> Any:
        return self

    def expect(self, *stages: Any) -> None:
        pass

    def token_embedding(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return {"embeds": np.repeat(ids[..., None].astype(np.float32), WIDTH, axis=-1)}  # an id is its own embedding

    def visual_encoder(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {name: self.picture[name] for name in ("features", "keep_logits")}

    def visual_merger(self, features: np.ndarray, keep: np.ndarray) -> dict[str, np.ndarray]:
        self.keep = keep
        embeds = np.repeat(-1.0 - np.arange(64, dtype=np.float32)[None, :, None], WIDTH, axis=-1)
        return {"codes": np.arange(64)[None], "embeds": embeds}

    def motion_encoder(self, motion: np.ndarray) -> dict[str, np.ndarray]:
        return {"codes": self.motion_codes[None]}

    def start(self, rows: int, capacity: int) -> None:
        self.rows = rows

    def forward(self, embeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
        if embeds.shape[1] > 1 or counts.max() > 1:
            self.contexts += [row[:count, 0] for row, count in zip(embeds, counts, strict=True)]
        scores = np.zeros((self.rows, V.size), np.float32)
        scores[:, self.written.pop(0) if self.written else EOS] = 50
        return scores


def pipeline_with(engines: Recorder, monkeypatch: pytest.MonkeyPatch, layout: Layout) -> Any:
    import runtime.pipeline as module
    from runtime.progress import Stopwatch, ignore
    from runtime.token_writer import TokenWriter

    pipeline = object.__new__(module.Pipeline)
    manifest = type("Manifest", (), {})()
    manifest.geometry, manifest.vocabulary, manifest.defaults = CONFIG.geometry, V, CONFIG.defaults
    manifest.language_model = type("Shape", (), {"max_positions": 512})()
    manifest.keyframe_scheduler, manifest.video_scheduler = CONFIG.keyframe_scheduler, CONFIG.video_scheduler
    pipeline.manifest, pipeline._geometry, pipeline._vocabulary = manifest, CONFIG.geometry, V
    pipeline._defaults, pipeline._observer, pipeline._watch = CONFIG.defaults, ignore, Stopwatch()
    pipeline._engines, pipeline._text = engines, layout.text
    pipeline._writer = TokenWriter(engines, manifest, ignore, pipeline._watch)  # type: ignore[arg-type]
    pipeline._writer.context = None  # every context is read as a whole
    return pipeline


def test_generation_rows_are_the_runtimes_contexts(monkeypatch: pytest.MonkeyPatch, layout: Layout) -> None:
    example = item(5, clips=2)
    visual = [(ids - V.first_visual).numpy() for ids in example["visual_ids"]]
    engines = Recorder({}, np.zeros(K, np.int64))
    for codes in visual:
        engines.written += [*(codes + V.first_visual), V.image_end, *[V.first_motion + 1] * K]
    pipeline = pipeline_with(engines, monkeypatch, layout)
    frame = np.zeros((128, 128, 3), np.uint8)
    pipeline._keyframes = type("", (), {"decode_each": lambda self, codes, *a: [(None, frame)] * len(codes)})()
    pipeline._videos = type("", (), {"decode": lambda *a: (None, frame[None])})()
    monkeypatch.setattr("runtime.pipeline.MotionTokenizer.decode", lambda *a: np.zeros((1, 2, 24, 16, 16)))
    request = VideoRequest(prompt=example["captions"][0], clips=2, greedy=True)
    list(pipeline.generate_video(request, Noise(0)))
    example["motion_ids"][:] = V.first_motion + 1
    row = layout.generation(example, TEXT_FIRST, np.random.default_rng(0))
    conditional = [context.astype(int).tolist() for context in engines.contexts if len(context) > 1]
    assert len(conditional) == 4  # image and motion, twice; what the model saw is how the row begins
    assert all(context == row.ids[: len(context)] for context in conditional)
    assert len(conditional[-1]) + K + 1 == len(row.ids) and row.ids[-1] == V.motion_end
    unconditional = {int(context[0]) for context in engines.contexts if len(context) == 1}
    assert unconditional == {V.image_start, V.motion_start}
    without = Mix(condition_dropout=1, motion_alone=0)
    assert layout.generation(example, without, np.random.default_rng(0)).ids[0] == V.image_start
    alone = layout.generation(example, Mix(motion_alone=1), np.random.default_rng(0))
    assert alone.ids == V.motion_span([1] * K)


@pytest.mark.parametrize("moving", [True, False])
def test_conversations_are_the_runtimes_contexts(moving: bool, monkeypatch: pytest.MonkeyPatch, layout: Layout) -> None:
    example = item(6, moving=moving)
    picture = {"features": example["features"].numpy(), "keep_logits": example["keep_logits"].numpy()}
    engines = Recorder(picture, np.full(K, 1))
    pipeline = pipeline_with(engines, monkeypatch, layout)
    question, answer, _ = example["questions"][0]
    frame, grid = np.zeros((128, 128, 3), np.uint8), np.zeros((24, 2, 16, 16), np.float32)
    row = layout.conversation(example, question, answer, (0, 0))
    assert row.keep is not None
    kept = row.keep[0].numpy()
    # The runtime draws its own noise: give it one that keeps the same patches.
    monkeypatch.setattr(Noise, "gumbel", lambda self, *shape: 100 * np.stack([kept, 1 - kept], -1)[None])
    motions = (grid,) if moving else None
    pipeline.answer(AnswerRequest(question=question, pictures=(frame,), motions=motions), Noise(0))
    context = engines.contexts[0]
    learnt = [at for at, kind in enumerate(row.kinds) if kind == ANSWER]
    assert learnt == list(range(len(context), len(row.ids)))
    slots = np.isin(np.arange(len(context)), row.slots)
    assert (context[~slots].astype(int) == np.array(row.ids)[: len(context)][~slots]).all()
    assert (context[slots] == -1.0 - np.flatnonzero(kept)).all()


def test_answers_end_as_the_runtime_reads_them(layout: Layout) -> None:
    ids = layout.answer_ids("a red circle")
    assert ids[-1] == EOS and ids.count(EOS) == 1
    text = layout.text.decode(ids)
    assert answer_text(text) == "a red circle" and STOP in text
    before, after = question_ids(layout.text, "what moves?", "video")
    whole = layout.text.encode(f"\nwhat moves? ASSISTANT: a red circle {STOP} </s>")
    assert whole == after + ids and before[0] == 1  # one by one or as a whole: the same ids


# What is learnt


def test_labels_are_the_next_ids_where_something_is_learnt(layout: Layout) -> None:
    quiet = replace_mix(TEXT_FIRST, learn_prompts=False)
    rows = [
        layout.generation(ITEMS[0], quiet, np.random.default_rng(0)),
        layout.generation(item(1, 2), quiet, np.random.default_rng(0)),
    ]
    rows.append(layout.conversation(ITEMS[2], "what moves?", "nothing", (0, 1)))
    batch = sequences.collate(rows[::-1], groups=2)
    order = sorted(rows, key=lambda row: len(row.ids))
    assert batch["groups"] == [[0, 1, len(order[0].ids)], [1, 3, len(order[2].ids)]]
    for index, row in enumerate(order):
        ids, labels = batch["ids"][index].tolist(), batch["labels"][index].tolist()
        count = len(row.ids)
        assert ids == row.ids + [UNK] * (len(ids) - count)
        expected = [row.ids[t + 1] if row.kinds[t + 1] != CONTEXT else NO_LABEL for t in range(count - 1)]
        assert labels == expected + [NO_LABEL] * (len(ids) - count + 1)
    places = batch["places"]
    assert len(places) == int(batch["keep"].sum()) and (batch["ids"][tuple(places.unbind(1))] == UNK).all()


def replace_mix(mix: Mix, **changes: Any) -> Mix:
    return msgspec.structs.replace(mix, **changes)


def test_forms_come_as_often_as_asked(layout: Layout) -> None:
    mix = Mix(condition_dropout=0.3, motion_alone=0.1, visual_first=0.5)
    rows = [layout.generation(ITEMS[index % 16], mix, np.random.default_rng(index)) for index in range(600)]
    first = np.array([row.ids[0] for row in rows])
    last = np.array([row.ids[-1] for row in rows])
    assert np.mean(first == V.motion_start) == pytest.approx(0.1, abs=0.04)
    assert np.mean((first == V.image_start) & (last == V.motion_end)) == pytest.approx(0.9 * 0.3, abs=0.06)
    assert np.mean(last == EOS) == pytest.approx(0.9 * 0.7 * 0.5, abs=0.06)
    assert all(GENERATED in row.kinds for row in rows)


def test_other_folders_take_their_share() -> None:
    pictures = [item(index, moving=False) for index in range(3)]
    rows = sequences.Rows(ITEMS, 0, 30, lambda found, index, rng: found, [(pictures, 0.25)])  # type: ignore[arg-type,return-value]
    share = np.mean(["motion_ids" not in rows[index] for index in range(480)])
    assert share == pytest.approx(0.25, abs=0.06)


def test_padding_and_groups_change_nothing(checkpoint: Checkpoint) -> None:
    trained = stage(LanguageModelStage, LanguageModelOptions(), checkpoint)
    rows = [trained.row(item(index, 1 + index % 2), index, np.random.default_rng(index)) for index in range(6)]
    with torch.no_grad():
        losses = [trained.module.predict(sequences.collate(rows, groups))[1] for groups in (1, 3)]
        alone = [
            trained.module.predict(sequences.collate([row], 1))[1] for row in sorted(rows, key=lambda r: len(r.ids))
        ]
    assert torch.allclose(losses[0], losses[1], atol=1e-5)
    assert torch.allclose(losses[0], torch.cat(alone), atol=1e-5)


# Losses fall


@pytest.mark.parametrize("name", ["language-model", "instruct"])
def test_a_few_steps_lower_the_loss(name: str, checkpoint: Checkpoint) -> None:
    kind = find_stage(name)
    trained = stage(kind, kind.Options(), checkpoint)  # type: ignore[arg-type]
    losses = [found["loss"] for found in steps(trained, 20)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_topics_are_asked_about_as_often_as_they_weigh(checkpoint: Checkpoint) -> None:
    trained = stage(InstructStage, InstructOptions(generation=0, topics={"direction": 4.0}), checkpoint)
    answers = [trained.layout.answer_ids(word) for word in ("right", "left", "up", "down")]
    rng = np.random.default_rng(0)
    rows = [trained.row(ITEMS[index % 16], index, rng) for index in range(400)]
    written = [[i for i, kind in zip(row.ids, row.kinds, strict=True) if kind == sequences.ANSWER] for row in rows]
    assert np.mean([ids in answers for ids in written]) == pytest.approx(0.8, abs=0.06)


def test_contrasts_are_answered_otherwise_elsewhere_in_the_same_scene(checkpoint: Checkpoint) -> None:
    trained = stage(InstructStage, InstructOptions(generation=0, contrasts=1.0), checkpoint)
    other = Question("what colour is the star?", "white", "colour")
    pair = {**ITEMS[0], "questions": (*ITEMS[0]["questions"], other)}
    rows = sequences.Rows([ITEMS[1], pair, ITEMS[2]], 0, 10, trained.row)
    colours = [trained.layout.answer_ids(word) for word in ("red", "white")]
    written = [
        [i for i, kind in zip(row.ids, row.kinds, strict=True) if kind == sequences.ANSWER]
        for row in (rows[index] for index in range(30))
    ]
    assert all(ids in colours for ids in written) and all(colour in written for colour in colours)
    with pytest.raises(UsageError, match="no row of the kind that is asked for, from item 0 on; ask for less"):
        sequences.Rows([ITEMS[1]], 0, 10, trained.row)[0]


def test_pairs_are_what_generation_rows_show(checkpoint: Checkpoint) -> None:
    options = InstructOptions(generation=1, pairs=1.0, topics={"colour": 1.0})
    trained = stage(InstructStage, options, checkpoint)
    other = Question("what colour is the star?", "white", "colour")
    pair = {**ITEMS[0], "questions": (*ITEMS[0]["questions"], other)}
    rng = np.random.default_rng(0)
    assert all(trained.row(ITEMS[0], index, rng) is None for index in range(20))
    assert all(trained.row(pair, index, rng) is not None for index in range(20))
    with pytest.raises(UsageError, match=r"options\.topics is empty; name the topics"):
        stage(InstructStage, InstructOptions(pairs=0.5), checkpoint)


def test_motion_before_a_question_may_be_learnt_too(checkpoint: Checkpoint) -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 1.0):
        trained = stage(InstructStage, InstructOptions(generation=0, motion=share), checkpoint)
        row = trained.row(ITEMS[0], 0, rng)
        assert row is not None
        learnt = [i for i, kind in zip(row.ids, row.kinds, strict=True) if kind == GENERATED]
        span = [V.motion_start, *ITEMS[0]["motion_ids"][0].tolist(), V.motion_end]
        assert learnt == (span if share else [])
        assert ANSWER in row.kinds


def test_questions_about_captions_show_nothing(checkpoint: Checkpoint) -> None:
    options = InstructOptions(generation=0.0, topics={"colour": 1.0}, reading=1.0)
    trained = stage(InstructStage, options, checkpoint)
    rows = [trained.row(ITEMS[1], 0, np.random.default_rng(seed)) for seed in range(40)]
    asked = [row for row in rows if row is not None and row.features is None]
    assert 0 < len(asked) < len(rows)  # the direction is no named topic, and is asked about the clip
    for row in asked:
        answer = trained.layout.answer_ids("green")
        before = trained.layout.text.encode("a green circle moving right what colour is the circle?")
        assert row.ids == [*before, *answer] and row.kinds == [CONTEXT] * len(before) + [ANSWER] * len(answer)


def test_one_batch_of_answers_is_learnt_by_heart(checkpoint: Checkpoint) -> None:
    trained = stage(InstructStage, InstructOptions(generation=0), checkpoint)
    before = copy.deepcopy(trained.module.projector)
    losses = steps(trained, 200, same=True)
    assert losses[-1]["answer"] < 0.05 < losses[0]["answer"]
    state = trained.components()
    assert set(state) == {"language_model", "visual_tokenizer"}
    assert before is not None and not torch.equal(state["visual_tokenizer"]["vit_proj.weight"], before.weight)
    source = checkpoint.component("visual_tokenizer").state_dict()
    assert list(state["visual_tokenizer"]) == list(source)
    assert all(torch.equal(value, source[n]) for n, value in state["visual_tokenizer"].items() if "vit_proj" not in n)


def test_one_batch_of_rows_is_learnt_by_heart(checkpoint: Checkpoint) -> None:
    # A clip has many more ids of motion than of its picture.
    mix, weights = replace_mix(TEXT_FIRST, learn_prompts=False), PartWeights(motion=0.1)
    options = LanguageModelOptions(mix=mix, weights=weights)
    losses = steps(stage(LanguageModelStage, options, checkpoint), 60, same=True)
    assert losses[-1]["image"] < 0.5 and losses[-1]["motion"] < 0.1


def test_rows_and_losses_are_the_same_again(checkpoint: Checkpoint) -> None:
    runs = [steps(stage(InstructStage, InstructOptions(), checkpoint), 3) for _ in range(2)]
    assert runs[0] == runs[1]


# Held-out figures


def test_engine_gives_the_logits_of_a_whole_pass(checkpoint: Checkpoint) -> None:
    model = stage(LanguageModelStage, LanguageModelOptions(), checkpoint).module.language_model.eval()
    engine = TorchLanguageModel(model)
    ids = np.random.default_rng(0).integers(0, V.size, (2, 9))
    engine.start(2, 16)
    padded = engine.embed(ids)[:, :6]
    engine.forward(padded, np.array([6, 4]))
    for at in range(3):
        step = np.stack([ids[0, 6 + at], ids[1, 4 + at]])[:, None]
        logits = engine.forward(engine.embed(step), np.ones(2, np.int64))
    with torch.no_grad():
        expected = [
            model(torch.from_numpy(row[None, :count])).logits[0, -1] for row, count in zip(ids, (9, 7), strict=True)
        ]
    assert np.allclose(logits, torch.stack(expected).numpy(), atol=1e-4)
    assert engine.lengths.tolist() == [9, 7]


def test_figures_on_held_out_scenes(checkpoint: Checkpoint) -> None:
    trained = stage(InstructStage, InstructOptions(), checkpoint)
    trained.options = msgspec.structs.replace(
        trained.options, validation=msgspec.structs.replace(trained.options.validation, scenes=2)
    )
    trained.module.eval()
    figures = trained.validate(torch.Generator())
    held_out = trained.held_out()
    assert isinstance(held_out, HeldOut) and len(held_out.items) == 2
    assert {"answers", "answers colour", "held-out loss", "held-out motion"} <= set(figures)
    assert not {"held-out answer", "held-out text", "held-out negatives"} & set(figures)  # no row has any
    assert all(0 <= figures[name] <= 1 for name in figures if name.startswith(("answers", "direction")))


# The real loop over a tokenised folder


def test_a_topic_that_the_data_does_not_have_is_named(folders: tuple[Path, Path]) -> None:
    tokens, source = folders
    data = DataSettings(source="tokenized", path=str(tokens))
    context = StageContext(checkpoint=load(source), data=data, seed=0, device=torch.device("cpu"))
    InstructStage(context, InstructOptions(topics={"colour": 2.0})).dataset()
    with pytest.raises(UsageError, match=r"options\.topics coluor: no question of .*; there are: .*colour"):
        InstructStage(context, InstructOptions(topics={"colour": 2.0, "coluor": 2.0})).dataset()


@pytest.mark.parametrize("name", ["language-model", "instruct"])
def test_a_resumed_run_is_the_unbroken_one(name: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    tokens, source = folders
    data = DataSettings(source="tokenized", path=str(tokens))
    options = {"repeats": 20, "mix": {"learn_prompts": False}}
    settings = TrainSettings(
        stage=name, steps=4, batch_size=4, learning_rate=1e-3, save_every=2, log_every=1, data=data, options=options
    )
    published = []
    for broken in (False, True):
        run, folder = tmp_path / f"run-{broken}", tmp_path / f"checkpoint-{broken}"
        shutil.copytree(source, folder)
        if broken:
            train(msgspec.structs.replace(settings, schedule="constant", steps=2), folder, run)
            shutil.rmtree(folder)
            shutil.copytree(source, folder)
        train(msgspec.structs.replace(settings, schedule="constant"), folder, run, resume=broken)
        published.append(load(folder))
    for component in find_stage(name).trains:
        first, second = (dict(found.weights.tensors(component)) for found in published)
        assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert "language_model" not in published[0].untrained
    start = dict(load(source).weights.tensors("language_model"))["lm_head.weight"]
    assert not torch.equal(start, dict(published[0].weights.tensors("language_model"))["lm_head.weight"])


def test_tokens_of_other_weights_are_refused(folders: tuple[Path, Path]) -> None:
    other = Checkpoint(CONFIG, tokenizer=SHAPES_TOKENIZER.read_bytes(), weights=RandomWeights(CONFIG, 9))
    data = DataSettings(source="tokenized", path=str(folders[0]))
    context = StageContext(checkpoint=other, data=data, seed=0, device=torch.device("cpu"))
    with pytest.raises(CheckpointError, match="tokenize"):
        LanguageModelStage(context, LanguageModelOptions()).dataset()
    raw = replace(context, data=DataSettings())
    with pytest.raises(UsageError, match=r"language-model trains on a tokenised folder .* `videolavit tokenize"):
        LanguageModelStage(raw, LanguageModelOptions()).dataset()
