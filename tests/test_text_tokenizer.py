"""Text to ids and back as transformers' slow, legacy LlamaTokenizer does it, and the understanding prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden import FOLDER, load

from runtime.errors import BundleError, UsageError
from runtime.prompts import STOP, answer_text, question_ids
from runtime.tokenizers import TextTokenizer

PLACEHOLDER = {"image": -200, "video": -201}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(FOLDER / "tiny_sp.model")


def test_generation_prompts(tokenizer: TextTokenizer) -> None:
    golden = load("j_llm_generation")
    for text, ids, mask in zip(
        golden.meta["texts"],
        golden.inputs["img_text/input_ids"],
        golden.inputs["img_text/attention_mask"],
        strict=True,
    ):
        assert tokenizer.encode(text) == ids[mask == 1][:-1].tolist()  # the last one is the image start


@pytest.mark.parametrize(
    ("case", "kind"), [("image", "image"), ("image_row1", "image"), ("video", "video"), ("text", None)]
)
def test_question_prompt_and_answer(tokenizer: TextTokenizer, case: str, kind: str | None) -> None:
    golden = load("j_understanding")
    call = golden.meta["calls"][case]
    masks = golden.inputs[f"{case}/attention_mask_before_splice"]
    for question, ids, mask in zip(call["texts"], golden.inputs[f"{case}/input_ids"], masks, strict=True):
        before, after = question_ids(tokenizer, question, kind)
        place = [PLACEHOLDER[kind]] if kind else []
        assert before + place + after == ids[mask == 1].tolist()
    for text, ids in zip(call["output_text"], golden.outputs[f"{case}/generated_ids"], strict=True):
        assert answer_text(tokenizer.decode(ids.tolist())) == text


# Ids by transformers 4.33.2: LlamaTokenizer("tiny_sp.model", legacy=True)(text, add_special_tokens=False).
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("a</s>b", [259, 2, 267]),
        ("a </s> b", [259, 581, 2, 581, 267]),
        ("<s><unk>", [1, 0]),
        ("two cats<s>  the", [361, 413, 1, 581, 581, 263]),
        ("< s>", [581, 63, 265, 65]),
        ("a\nb", [259, 13, 598]),
        ("<0x0A>", [581, 63, 617, 626, 617, 607, 65]),
        ("é日😀", [581, 198, 172, 233, 154, 168, 243, 162, 155, 131]),
    ],
)
def test_control_strings_are_cut_out(tokenizer: TextTokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text) == ids


def test_bos_stands_in_front(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode("two cats", bos=True) == [1, *tokenizer.encode("two cats")]
    assert tokenizer.encode("", bos=True) == [1]


# Texts by the same tokenizer: decode(ids, skip_special_tokens=True).
@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([], ""),
        ([0, 1, 2], ""),
        ([1, 259, 2, 0, 13], "a\n"),
        ([259, 1, 281], "aes"),
        ([232, 281], "�es"),
        ([233, 162, 168], "查"),
        ([233, 281, 162, 168, 13], "�es��\n"),
    ],
)
def test_decode(tokenizer: TextTokenizer, ids: list[int], text: str) -> None:
    assert tokenizer.decode(ids) == text


def test_answer_ends_at_the_literal_separator() -> None:
    assert list(STOP) == [chr(92), "n"]
    assert answer_text(f" a red\ncircle {STOP} more {STOP}") == "a red\ncircle"
    assert answer_text("no separator \n") == "no separator"


def test_unpaired_surrogate_is_a_usage_error(tokenizer: TextTokenizer) -> None:
    with pytest.raises(UsageError, match="not valid Unicode at character 1"):
        tokenizer.encode("a\udcff")


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_unreadable_model_is_a_bundle_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.model"):
        TextTokenizer(path)
