"""Text as ids and back: the Llama tokenizer over a SentencePiece model file.

Contract: the ids are those of transformers' slow LlamaTokenizer with legacy behaviour (reference semantics §10.1),
without that library. The control strings `<s>`, `</s>` and `<unk>` are cut out of the text first and become their ids;
every piece of text between them is encoded by itself, so each starts with the tokenizer's dummy space. Nothing is
stripped. Plain text therefore never yields a control id, as long as the model has byte pieces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from runtime.errors import BundleError, UsageError
from runtime.vocabulary import BOS, EOS, UNK

CONTROL = {"<unk>": UNK, "<s>": BOS, "</s>": EOS}
_SPLIT = re.compile("(" + "|".join(map(re.escape, CONTROL)) + ")")


class TextTokenizer:
    """Tokenizer of one SentencePiece model file, usually a bundle's `tokenizer.model`.

    Raises:
        BundleError: the file cannot be read, is no SentencePiece model, or its control ids are not 0, 1, 2.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise BundleError(
                f"{path}: not a readable SentencePiece model ({reason}); export the bundle again"
            ) from error
        found = (self._model.unk_id(), self._model.bos_id(), self._model.eos_id())
        if found != (UNK, BOS, EOS):
            raise BundleError(f"{path}: ids of <unk>, <s>, </s> are {found}, must be {(UNK, BOS, EOS)}")

    @property
    def size(self) -> int:
        """Text ids: 0 to size - 1."""
        return self._model.get_piece_size()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`, with `<s>` in front if `bos`.

        Raises:
            UsageError: `text` has unpaired surrogates, as an argument in another encoding than UTF-8 has.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"text is not valid Unicode at character {error.start}: {text!r}; give UTF-8") from error
        ids = [BOS] if bos else []
        for part in _SPLIT.split(text):
            if part in CONTROL:
                ids.append(CONTROL[part])
            elif part:
                ids += self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control ids are skipped and one space in front, the dummy one, is dropped.

        Byte pieces are joined to UTF-8 and every byte that fits nowhere becomes U+FFFD. Ids from `size` on have no
        text: SentencePiece raises IndexError for them. The library drops a second space in front if it is a piece
        of its own; here text survives the round trip instead (an answer is stripped anyway, §13.3).
        """
        return self._model.decode([int(i) for i in ids if i not in CONTROL.values()])
