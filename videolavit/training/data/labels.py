"""What is said about a media file, read from the file beside it.

Contract: NAME.txt has one caption a line; NAME.json has {"captions": [...], "questions": [{"question", "answer",
"topic"}], "negatives": [{"caption", "wrong", "topic"}]}, all optional; a line of captions.jsonl has the same and
"file". Unknown keys and wrong types are errors of one line that names the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from videolavit.training.data.errors import DataError
from videolavit.training.data.examples import Negative, Question

T = TypeVar("T")


class _Asked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    question: str
    answer: str
    topic: str = ""


class _Told(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    caption: str
    wrong: str
    topic: str = ""


class _Said(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    captions: tuple[str, ...] = ()
    questions: tuple[_Asked, ...] = ()
    negatives: tuple[_Told, ...] = ()


class _SaidOf(_Said, frozen=True, kw_only=True, forbid_unknown_fields=True):
    file: str


@dataclass(frozen=True)
class Labels:
    """What is said about one item."""

    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    negatives: tuple[Negative, ...] = ()


def from_text(content: bytes, where: str) -> Labels:
    """Captions of a .txt file. Raises DataError naming `where` when it is not UTF-8."""
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 text ({error.reason}); save it again") from error
    return Labels(captions=tuple(line.strip() for line in lines if line.strip()))


def from_json(content: bytes, where: str) -> Labels:
    """What a .json file says. Raises DataError naming `where` and the key."""
    return _labels(_decode(content, _Said, where))


# By suffix of the file beside the media; the first one that is there counts.
READERS: dict[str, Callable[[bytes, str], Labels]] = {".json": from_json, ".txt": from_text}


def from_jsonl(content: bytes, where: str) -> dict[str, Labels]:
    """Labels by file name of a .jsonl file. Raises DataError naming `where` and the line; also for a file twice."""
    found: dict[str, Labels] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        said = _decode(line, _SaidOf, f"{where}: line {number}")
        if said.file in found:
            raise DataError(f"{where}: line {number}: {said.file} has a line already; join them")
        found[said.file] = _labels(said)
    return found


def _decode(content: bytes, kind: type[T], where: str) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: {' '.join(str(error).split())}") from error


def _labels(said: _Said) -> Labels:
    questions = tuple(Question(q.question, q.answer, q.topic) for q in said.questions)
    return Labels(said.captions, questions, tuple(Negative(n.caption, n.wrong, n.topic) for n in said.negatives))
