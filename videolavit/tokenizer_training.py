"""Training of a text tokenizer that behaves like Llama's, and the one of the demo model.

Contract: the same corpus gives the same pieces. The model has byte pieces, so every text can be written; its ids 0, 1
and 2 are `<unk>`, `<s>`, `</s>`; it changes nothing but adding a dummy space in front (`runtime.tokenizers` reads it).
Unlike Llama's it is a unigram model: byte-pair encoding spends a piece on every step towards a long word, and a few
hundred pieces do not hold the words of the world of shapes that way.
`python -m videolavit.tokenizer_training` writes the demo model's tokenizer anew.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceTrainer

from runtime.errors import UsageError
from runtime.vocabulary import BOS, EOS, UNK

SHAPES_TOKENIZER = Path(__file__).parent / "assets" / "shapes_tokenizer.model"


def train_text_tokenizer(corpus: Iterable[str], size: int, path: str | Path) -> None:
    """Train a unigram tokenizer and write it to `path`, a SentencePiece model file.

    Args:
        corpus: lines of text; how often a word occurs decides whether it becomes one piece.
        size: number of pieces, the 3 control and 256 byte pieces included.

    Raises:
        UsageError: the corpus does not yield exactly `size` pieces.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=model,
            vocab_size=size,
            model_type="unigram",
            byte_fallback=True,
            character_coverage=1.0,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"no tokenizer of {size} pieces can be trained on this corpus: {reason}") from error
    Path(path).write_bytes(model.getvalue())


if __name__ == "__main__":
    from videolavit.config import PRESETS
    from videolavit.shapes.words import corpus

    train_text_tokenizer(corpus(), PRESETS["shapes"].vocabulary.text_size, SHAPES_TOKENIZER)
