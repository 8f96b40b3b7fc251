"""The conversation the model was instructed with: how a question is put and where an answer ends.

Contract: one turn, in the exact wording and token boundaries of training (reference semantics §13.1, §13.3). A picture
or a video stands between two lists of ids; its embeddings are put there by the caller.
"""

from __future__ import annotations

from typing import Literal

from runtime.tokenizers import TextTokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
STOP = "\\n"  # backslash and n, two characters: the separator the model writes after its answer

Kind = Literal["image", "video"]


def question_ids(tokenizer: TextTokenizer, question: str, kind: Kind | None = None) -> tuple[list[int], list[int]]:
    """Ids before and after the place of the picture or video (§13.1).

    Both kinds are asked about in the same words. The text after the place is tokenised by itself, so it begins with
    the dummy space and a newline byte.

    Args:
        kind: what `question` is about; None for text alone, and then the second list is empty.
    """
    if kind is None:
        return tokenizer.encode(f"{SYSTEM} USER: {question} ASSISTANT:", bos=True), []
    return tokenizer.encode(f"{SYSTEM} USER: ", bos=True), tokenizer.encode(f"\n{question} ASSISTANT:")


def answer_text(raw: str) -> str:
    """What a person is shown of a decoded answer: everything before the first STOP, stripped (§13.3)."""
    return raw.partition(STOP)[0].strip()
