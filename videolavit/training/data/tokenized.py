"""Reading a tokenised folder back, item by item.

Contract: map-style and a pure function of the index; shards are memory-mapped and of each item only its own rows are
read. Opening checks the index and the lengths of all files; `verify` compares their digests as well.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from runtime.errors import CheckpointError
from videolavit.checkpoints import Checkpoint
from videolavit.training.data.errors import DataError
from videolavit.training.data.fields import FIELDS, maker_digest
from videolavit.training.data.index import FieldInfo, check_content, check_sizes, read_index
from videolavit.training.data.shards import Text

OPEN_SHARDS = 64  # memory-mapped at a time
_LOADED = {"float16": torch.float32, "float32": torch.float32, "int32": torch.int64, "uint8": torch.uint8}


class TokenizedDataset(Dataset[dict[str, Any]]):
    """Items of the tokenised folder `folder`.

    An item is a dict with the wanted `fields` (None: all), ready to compute with: floats are float32, ids int64, key
    frames uint8. The first axis of a field is the item's clips or pictures, also where there is one; a ragged field
    is a list of tensors [n]. Beside them stand `captions` (tuple of str), `questions` (of `Question`), `negatives` (of
    `Negative`) and `index` (the item's index in its source).

    Raises:
        DataError: the folder is missing, unfinished or damaged, or does not have one of the fields.
    """

    def __init__(self, folder: Path | str, fields: Sequence[str] | None = None) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        stored = self.index.recipe.fields
        if not self.index.complete:
            raise DataError(
                f"{self.folder}: is not finished, {len(self.index.shards)} of {self.index.shard_count} shards are "
                "there; run the same `videolavit tokenize` again with --resume"
            )
        self.fields = tuple(stored if fields is None else fields)
        missing = [name for name in self.fields if name not in stored]
        if missing:
            raise DataError(
                f"{self.folder}: has no field {', '.join(missing)}; run `videolavit tokenize SOURCE -o FOLDER "
                f"--checkpoint DIR --fields {','.join([*stored, *missing])}`"
            )
        strange = [name for name in self.fields if name not in FIELDS or stored[name].dtype not in _LOADED]
        if strange:
            raise DataError(f"{self.folder}: field {strange[0]} is not known to this version; tokenise again")
        for shard in self.index.shards:
            check_sizes(self.folder, shard)
        self._ends = list(accumulate(shard.items for shard in self.index.shards))
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, place = self._place(index)
        return shard.item(place)

    def said(self, index: int) -> Text:
        """What is said about item `index`, without its arrays.

        Raises IndexError beyond the last item, DataError when they cannot be read.
        """
        shard, place = self._place(index)
        return shard.said(place)

    def _place(self, index: int) -> tuple[_OpenShard, int]:
        """The shard of item `index`, and which of its items it is."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        return self._shard(number), index - (self._ends[number - 1] if number else 0)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # open files stay in their process

    def verify(self) -> None:
        """Read everything and raise DataError when a file is not the one that was written."""
        for shard in self.index.shards:
            check_content(self.folder, shard)

    def require(self, checkpoint: Checkpoint, *components: str) -> None:
        """Raise CheckpointError when a field was made with other weights than those of `checkpoint`.

        Of all components that made the wanted fields, or of `components` alone.
        """
        made_by = self.index.recipe.components
        used = {name for field in self.fields for name in FIELDS[field].components}
        for name in components or sorted(used):
            if made_by.get(name) != maker_digest(checkpoint, name):
                raise CheckpointError(
                    f"{self.folder}: was made by another {name} than the checkpoint's; run `videolavit tokenize` "
                    "again with this checkpoint"
                )

    def _shard(self, number: int) -> _OpenShard:
        if number not in self._open:
            shard = self.index.shards[number]
            infos = {name: self.index.recipe.fields[name] for name in self.fields}
            self._open[number] = _OpenShard(self.folder / shard.arrays, self.folder / shard.text, infos)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


class _OpenShard:
    """A memory-mapped shard; the small offset arrays are read once."""

    def __init__(self, arrays: Path, text: Path, fields: dict[str, FieldInfo]) -> None:
        self._text, self._fields = text, fields
        try:
            self._file = safe_open(arrays, "pt")
            self._offsets = {
                name: self._file.get_tensor(f"{name}.offsets").numpy() for name in ("picture", "clip", "text")
            }
            self._indices = self._file.get_tensor("index").numpy()
            self._slices = {name: self._file.get_slice(name) for name in fields}
            self._ragged = {
                name: self._file.get_tensor(f"{name}.offsets").numpy() for name, i in fields.items() if i.shape is None
            }
            for name, info in fields.items():
                rows = int(self._offsets[info.of][-1])
                found = tuple(self._slices[name].get_shape())
                expected = (int(self._ragged[name][-1]),) if info.shape is None else (rows, *info.shape)
                if found != expected or (info.shape is None and len(self._ragged[name]) != rows + 1):
                    raise DataError(f"{arrays}: is damaged: {name} is {list(found)}; tokenise again")
        except (SafetensorError, OSError, IndexError) as error:
            raise DataError(f"{arrays}: is damaged ({error}); copy it again, or tokenise again") from error

    def item(self, index: int) -> dict[str, Any]:
        found: dict[str, Any] = {"index": int(self._indices[index])}
        for name, info in self._fields.items():
            start, end = self._between(self._offsets[info.of], index)
            if info.shape is None:
                edges = self._ragged[name][start : end + 1].tolist()
                rows = self._slices[name][edges[0] : edges[-1]].to(_LOADED[info.dtype])
                found[name] = list(rows.split([b - a for a, b in pairwise(edges)]))
            else:
                found[name] = self._slices[name][start:end].to(_LOADED[info.dtype])
        text = self.said(index)
        return found | {"captions": text.captions, "questions": text.questions, "negatives": text.negatives}

    def said(self, index: int) -> Text:
        start, end = self._between(self._offsets["text"], index)
        try:
            with self._text.open("rb") as stream:
                stream.seek(start)
                return msgspec.json.decode(stream.read(end - start), type=Text)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{self._text}: is damaged at byte {start} ({error}); copy it again") from error

    @staticmethod
    def _between(offsets: np.ndarray, index: int) -> tuple[int, int]:
        return int(offsets[index]), int(offsets[index + 1])
