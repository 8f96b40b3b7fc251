"""What is kept in the language model's cache: the logits are those of a cache read anew, and little is fed."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from language_models import write
from transformers import LlamaConfig, LlamaForCausalLM

from export.language_model.attention import ATTENTION
from runtime.backends.onnxruntime import OnnxRuntimeLanguageModel
from runtime.context import STEPWISE, Context
from runtime.engines import EngineOptions
from runtime.errors import UsageError
from videolavit.config import LanguageModelConfig
from videolavit.training.stages.writing import TorchLanguageModel

WIDTH = 3
SMALL = LanguageModelConfig(
    hidden_size=32, intermediate_size=24, layers=2, heads=2, kv_heads=1, max_positions=64, rope_theta=10000.0
)


class StrictEngine:
    """A cache that takes what the contract of a language model engine allows, and refuses everything else.

    Logits of a row are a number that depends on every embedding of it and on its place.
    """

    def __init__(self) -> None:
        self.rows: list[list[bytes]] = []
        self.capacity = 0
        self.starts = 0
        self.fed: list[tuple[int, int]] = []  # [rows, positions] of every forward
        self.lengths = np.zeros(0, np.int32)

    def start(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = [[] for _ in range(rows)], capacity
        self.lengths = np.zeros(rows, np.int32)
        self.starts += 1

    def forward(self, embeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
        assert embeds.dtype == np.float32 and embeds.shape[0] == len(counts) == len(self.rows)
        assert counts.min() >= 1 and counts.max() <= embeds.shape[1]
        if self.lengths.any() and embeds.shape[1] > 1:
            assert len(self.rows) == 1 and counts[0] == embeds.shape[1]
        for row, new, count in zip(self.rows, embeds, counts, strict=True):
            row += [position.tobytes() for position in new[:count]]
        self.lengths = np.array([len(row) for row in self.rows], np.int32)
        assert self.lengths.max() <= self.capacity
        self.fed.append(embeds.shape[:2])
        return logits_of(self.rows)

    def rewind(self, lengths: np.ndarray) -> None:
        assert (lengths <= self.lengths).all() and (lengths >= 0).all()
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]
        self.lengths = np.array(lengths, np.int32)

    def close(self) -> None:
        self.rows = []


def logits_of(rows: list[list[bytes]]) -> np.ndarray:
    return np.array([[hash(tuple(row)) % 99991] for row in rows], np.float32)


def embeds(*ids: int) -> np.ndarray:
    """[n, WIDTH], another vector for every id."""
    return np.array(ids, np.float32)[:, None] + np.arange(WIDTH, dtype=np.float32)


def expected(sequences: list[np.ndarray]) -> np.ndarray:
    return logits_of([[position.tobytes() for position in sequence] for sequence in sequences])


sequence = st.lists(st.integers(0, 1), min_size=1, max_size=30)  # two ids: prefixes are shared more often than not


@settings(max_examples=200, deadline=None)
@given(
    reads=st.lists(
        st.tuples(st.lists(sequence, min_size=1, max_size=3), st.integers(0, 4), st.integers(0, 20)), min_size=1
    )
)
def test_any_reads_give_the_logits_of_the_whole_sequences(
    reads: list[tuple[list[list[int]], int, int]],
) -> None:
    engine, context = StrictEngine(), Context()
    for rows, steps, spare in reads:
        sequences = [embeds(*row) for row in rows]
        needed = max(map(len, rows)) + steps
        np.testing.assert_array_equal(context.read(engine, sequences, needed, needed + spare), expected(sequences))
        for step in range(steps):
            sequences = [np.concatenate([row, embeds(step)]) for row in sequences]
            new = np.stack([row[-1:] for row in sequences])
            np.testing.assert_array_equal(context.append(engine, new), expected(sequences))


def test_a_guided_phase_after_another_feeds_its_markers_alone() -> None:
    engine, context = StrictEngine(), Context()
    context.read(engine, [embeds(*range(20), 100), embeds(100)], 60, 60)
    for code in range(30, 40):
        context.append(engine, np.stack([embeds(code)] * 2))
    engine.fed.clear()
    # The end of what was written was chosen but never fed; then comes the start of the next phase.
    sequences = [embeds(*range(20), 100, *range(30, 40), 101, 102), embeds(102)]
    np.testing.assert_array_equal(context.read(engine, sequences, 60, 60), expected(sequences))
    assert engine.fed == [(2, 1)] * 2 and engine.starts == 1


def test_another_question_feeds_what_differs_in_one_forward() -> None:
    engine, context = StrictEngine(), Context()
    video = list(range(50))
    context.read(engine, [embeds(*video, 60, 61, 62)], 100, 100)
    context.append(engine, embeds(7)[None])
    context.read(engine, [embeds(*video, *range(70, 90))], 100, 100)
    assert engine.fed[-1] == (1, 20) and engine.starts == 1
    context.read(engine, [embeds(*video, *range(70, 90))], 100, 100)
    assert engine.fed[-1] == (1, 1)  # the same again: the last position, for its logits


def test_rows_that_changed_early_are_prefilled_together() -> None:
    engine, context = StrictEngine(), Context()
    rows = [embeds(*range(40)), embeds(*range(50, 80))]
    context.read(engine, rows, 60, 60)
    changed = [np.concatenate([rows[0][: 39 - STEPWISE], rows[0][40 - STEPWISE :], embeds(99, 98)]), rows[1]]
    np.testing.assert_array_equal(context.read(engine, changed, 60, 60), expected(changed))
    assert engine.fed == [(2, 40), (2, 41)] and engine.starts == 2


@pytest.mark.parametrize("change", ["rows", "capacity", "engine"])
def test_a_cache_that_cannot_serve_is_replaced(change: str) -> None:
    engine, context = StrictEngine(), Context()
    row = embeds(*range(10))
    context.read(engine, [row], 12, 12)
    other = StrictEngine() if change == "engine" else engine
    sequences = [row, row] if change == "rows" else [row]
    capacity = 13 if change == "capacity" else 12
    np.testing.assert_array_equal(context.read(other, sequences, capacity, capacity), expected(sequences))
    assert other.fed[-1] == (len(sequences), 10) and other.capacity == capacity


def test_a_cache_with_room_to_spare_takes_a_longer_question() -> None:
    engine, context = StrictEngine(), Context()
    context.read(engine, [embeds(*range(20))], 22, 30)
    context.read(engine, [embeds(*range(15), *range(50, 60))], 28, 40)
    assert engine.starts == 1 and engine.capacity == 30


def test_a_cache_with_nothing_to_keep_is_made_for_the_new_sequences() -> None:
    engine, context = StrictEngine(), Context()
    context.read(engine, [embeds(1, 2)], 500, 500)
    context.read(engine, [embeds(3, 4)], 10, 10)
    assert engine.capacity == 10


def test_the_engine_is_not_kept_in_memory() -> None:
    import weakref

    engine, context = StrictEngine(), Context()
    context.read(engine, [embeds(1, 2)], 5, 5)
    gone = weakref.ref(engine)
    del engine
    assert gone() is None
    context.read(StrictEngine(), [embeds(1, 2)], 5, 5)


# Engines that keep a real cache


@cache
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=SMALL.hidden_size,
            intermediate_size=SMALL.intermediate_size,
            num_hidden_layers=SMALL.layers,
            num_attention_heads=SMALL.heads,
            num_key_value_heads=SMALL.kv_heads,
            max_position_embeddings=SMALL.max_positions,
            rms_norm_eps=SMALL.rms_norm_eps,
            initializer_range=0.3,
        )
    ).eval()


@pytest.fixture(scope="module", params=[*sorted(ATTENTION), "torch"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    if request.param == "torch":
        return TorchLanguageModel(llama())
    weights = {name: tensor.numpy() for name, tensor in llama().state_dict().items()}
    path: Path = tmp_path_factory.mktemp("context") / f"{request.param}.onnx"
    write(SMALL, 50, weights, path, request.param)
    return OnnxRuntimeLanguageModel(path, EngineOptions(threads=1), SMALL.max_positions)


def whole(sequences: list[np.ndarray]) -> np.ndarray:
    """Logits [R, V] of every row computed alone and without a cache."""
    with torch.no_grad():
        return np.stack([llama()(inputs_embeds=torch.from_numpy(s)[None]).logits[0, -1].numpy() for s in sequences])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 3),
    changes=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_a_continued_cache_gives_the_logits_of_a_new_one(
    engine: object, rows: int, changes: list[tuple[int, int, int]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.standard_normal((n, SMALL.hidden_size)).astype(np.float32)  # noqa: E731
    context, sequences = Context(), [draw(int(rng.integers(1, 12))) for _ in range(rows)]
    for dropped, added, steps in changes:
        # Every row loses some of its end, the last one all of it, as an unconditional row does.
        lengths = [max(0, len(row) - dropped) for row in sequences[:-1]] + [0 if rows > 1 else 3]
        ends = [draw(int(rng.integers(1, added + 1))) for _ in sequences]
        sequences = [np.concatenate([row[:n], end]) for row, n, end in zip(sequences, lengths, ends, strict=True)]
        assert_relative(context.read(engine, sequences, 60, 60), whole(sequences))  # type: ignore[arg-type]
        for _ in range(steps):
            sequences = [np.concatenate([row, draw(1)]) for row in sequences]
            logits = context.append(engine, np.stack([row[-1:] for row in sequences]))  # type: ignore[arg-type]
            assert_relative(logits, whole(sequences))


def assert_relative(actual: np.ndarray, wanted: np.ndarray) -> None:
    assert_close(actual, wanted, 1e-4 * float(np.abs(wanted).max()))


@pytest.mark.parametrize("lengths", [[3], [3, 2, 1], [4, 2], [-1, 2], [1.0, 1.0]])
def test_rows_are_only_made_shorter(tmp_path: Path, lengths: list[float]) -> None:
    weights = {name: tensor.numpy() for name, tensor in llama().state_dict().items()}
    path = write(SMALL, 50, weights, tmp_path / "llm.onnx")
    model = OnnxRuntimeLanguageModel(path, EngineOptions(threads=1), SMALL.max_positions)
    model.start(2, 8)
    model.forward(np.zeros((2, 3, SMALL.hidden_size), np.float32), np.array([3, 2]))
    with pytest.raises(UsageError, match=r"rows of \[3, 2\] positions cannot be shortened"):
        model.rewind(np.array(lengths))
    model.rewind(np.array([0, 2]))
    assert model.lengths.tolist() == [0, 2]
