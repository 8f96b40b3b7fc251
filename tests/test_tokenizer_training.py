"""The demo model's tokenizer: reproducible, lossless, and short on what its world says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import UsageError
from runtime.prompts import question_ids
from runtime.tokenizers import CONTROL, TextTokenizer
from videolavit.config import PRESETS
from videolavit.shapes import caption, picture_caption, questions, sample_scene
from videolavit.shapes.words import SPOKEN, corpus
from videolavit.tokenizer_training import SHAPES_TOKENIZER, train_text_tokenizer

SIZE = PRESETS["shapes"].vocabulary.text_size
TOKENIZER = TextTokenizer(SHAPES_TOKENIZER)
PLAIN = st.text(st.characters(exclude_categories=("Cs",))).filter(lambda text: not any(c in text for c in CONTROL))


def test_size_is_the_vocabulary_of_the_preset() -> None:
    assert TOKENIZER.size == SIZE == 512


@settings(deadline=None)
@given(PLAIN)
def test_any_text_survives(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert all(2 < i < SIZE for i in ids)
    # U+2581 is how SentencePiece writes a space, so it comes back as one.
    assert TOKENIZER.decode(ids) == text.replace("\u2581", " ")


@settings(deadline=None)
@given(st.lists(st.one_of(PLAIN, st.sampled_from(list(CONTROL)))))
def test_control_ids_appear_exactly_where_their_strings_are(parts: list[str]) -> None:
    text = "".join(parts)
    found = [i for i in TOKENIZER.encode(text) if i <= 2]
    assert len(found) == sum(text.count(control) for control in CONTROL)


@settings(deadline=None)
@given(st.lists(st.integers(0, SIZE - 1)))
def test_any_ids_decode(ids: list[int]) -> None:
    assert isinstance(TOKENIZER.decode(ids), str)


def test_words_of_the_world_are_single_pieces() -> None:
    assert not {word for word in SPOKEN if len(TOKENIZER.encode(word)) > 1}


def test_every_word_that_is_said_is_on_the_list() -> None:
    said: set[str] = set()
    for seed in range(150):
        scene, rng = sample_scene(seed, split=("train", "held-out")[seed % 2]), np.random.default_rng(seed)
        lines = [caption(scene, rng), picture_caption(scene, rng)]
        lines += [line for question, answer, _ in questions(scene, rng) for line in (question, answer)]
        said |= {word.strip(".,?") for line in lines for word in line.replace("-", " ").split()}
    assert said <= set(SPOKEN)


def test_typical_lines_are_short() -> None:
    assert len(TOKENIZER.encode("a red circle moving right")) == 5
    assert len(TOKENIZER.encode("a small blue star moving up slowly and a large yellow square moving left")) == 14
    assert len(TOKENIZER.encode("which direction does the circle move?")) == 7
    before, after = question_ids(TOKENIZER, "what moves?", "video")
    assert len(before) == 33 and len(after) == 7  # the second begins with the dummy space and the newline byte


def test_training_again_gives_the_shipped_file(tmp_path: Path) -> None:
    path = tmp_path / "again.model"
    train_text_tokenizer(corpus(), SIZE, path)
    again = TextTokenizer(path)
    for line in ("a purple star bouncing quickly on a grey background", "what colour is the triangle? ASSISTANT:"):
        assert again.encode(line) == TOKENIZER.encode(line)
    assert [again.decode([i]) for i in range(SIZE)] == [TOKENIZER.decode([i]) for i in range(SIZE)]


@pytest.mark.parametrize("size", [100, 5000])
def test_impossible_size_is_a_usage_error(tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match=f"{size} pieces"):
        train_text_tokenizer(["a red circle", "two cats"], size, tmp_path / "never.model")
    assert not (tmp_path / "never.model").exists()
