"""Writing one shard of a tokenised folder.

Contract: a shard is two files. shard-NNNNN.safetensors has for every field an array of rows in the order of items
(a ragged field NAME: `NAME`, its rows joined, and `NAME.offsets` int64 [rows + 1]), and three more int64 arrays of
[items + 1]: `picture.offsets` and `clip.offsets`, the rows at which an item's pictures and clips start, and
`text.offsets`, where its line starts in shard-NNNNN.jsonl, plus `index` [items], its index in the source. A line is a
JSON object with `captions`, `questions` ([question, answer, topic] each) and `negatives` ([caption, wrong, topic]
each). Both files appear whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from runtime.bundle import sha256_of
from runtime.files import published, writing
from videolavit.config import ModelConfig
from videolavit.training.data.encoding import Item
from videolavit.training.data.examples import Negative, Question
from videolavit.training.data.fields import FIELDS, Size
from videolavit.training.data.index import FieldInfo, Shard

STAGING = ".shard-*"  # names of half-written files


class Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is said about an item: a line of the .jsonl file."""

    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    negatives: tuple[Negative, ...] = ()


class ShardWriter:
    """Collects the rows of a shard in memory and writes it."""

    def __init__(self, fields: Mapping[str, FieldInfo]) -> None:
        self._fields = fields
        self._rows: dict[str, list[Any]] = {name: [] for name in fields}
        self._indices: list[int] = []
        self._pictures, self._clips, self._text = [0], [0], [0]
        self._lines: list[bytes] = []

    def add(self, items: Sequence[Item], rows: Mapping[str, Any]) -> None:
        """Append `items` with the rows that `Encoder.encode` gave for them."""
        for name, part in rows.items():
            self._rows[name].extend(part)
        for item in items:
            line = msgspec.json.encode(Text(item.captions, item.questions, item.negatives)) + b"\n"
            self._indices.append(item.index)
            self._lines.append(line)
            self._pictures.append(self._pictures[-1] + len(item.pictures))
            self._clips.append(self._clips[-1] + item.clips)
            self._text.append(self._text[-1] + len(line))

    def write(self, folder: Path, number: int, skipped: int) -> Shard:
        """Write the shard to `folder`. Raises UsageError when it cannot be written."""
        arrays, text = (folder / f"shard-{number:05}.{suffix}" for suffix in ("safetensors", "jsonl"))
        with published(text) as staging, writing(text):
            staging.write_bytes(b"".join(self._lines))
            text_sha256 = sha256_of(staging)
        with published(arrays) as staging, writing(arrays, SafetensorError):
            save_file(self._arrays(), staging)
            staging.chmod(text.stat().st_mode)  # the library makes files that only their owner can read
            arrays_sha256 = sha256_of(staging)
        return Shard(
            number=number,
            items=len(self._indices),
            pictures=self._pictures[-1],
            clips=self._clips[-1],
            skipped=skipped,
            arrays=arrays.name,
            arrays_bytes=arrays.stat().st_size,
            arrays_sha256=arrays_sha256,
            text=text.name,
            text_bytes=self._text[-1],
            text_sha256=text_sha256,
        )

    def _arrays(self) -> dict[str, np.ndarray]:
        found = {
            "index": np.array(self._indices, np.int64),
            "picture.offsets": np.array(self._pictures, np.int64),
            "clip.offsets": np.array(self._clips, np.int64),
            "text.offsets": np.array(self._text, np.int64),
        }
        for name, info in self._fields.items():
            rows = self._rows[name]
            if info.shape is None:
                lengths = [len(row) for row in rows]
                found[name] = np.concatenate(rows) if rows else np.empty(0, info.dtype)
                found[f"{name}.offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            else:
                found[name] = np.stack(rows) if rows else np.empty((0, *info.shape), info.dtype)
        # The library writes the memory as it lies, and torch's convolutions leave theirs with channels last.
        return {name: np.ascontiguousarray(array) for name, array in found.items()}


def field_infos(names: Sequence[str], config: ModelConfig, size: Size) -> dict[str, FieldInfo]:
    """How fields `names` of `FIELDS` are stored for a model and a picture size."""
    infos = {}
    for name in names:
        field = FIELDS[name]
        shape = field.shape(config, size) if field.shape else None
        infos[name] = FieldInfo(of=field.of, dtype=field.dtype, shape=shape)
    return infos
