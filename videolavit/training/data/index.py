"""index.json of a tokenised folder: what is in it, how it was made, and which shards are finished.

Contract: strict both ways; what this version does not know is an error. The index is replaced in one rename after
every finished shard, so a shard is either listed and whole, or not listed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from runtime.bundle import sha256_of
from runtime.files import published, writing
from videolavit.training.data.errors import DataError

INDEX = "index.json"
FORMAT = 1
_NAME = re.compile(r"shard-\d{5,}\.(safetensors|jsonl)")


class FieldInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a field is stored: one row per "clip" or "picture", numpy's type name, shape of a row (None: ragged)."""

    of: str
    dtype: str
    shape: tuple[int, ...] | None


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that decides the content.

    Attributes:
        source: what the source says about itself.
        count: items asked for, from the first one on.
        fields: by name.
        model: name of the configuration.
        components: digest of the weights of every component that was used.
        seed: of the keep draws and of sources drawn by lot.
        size: (width, height) of key frames and of the pictures latents were made of.
        frames: in a clip.
        shard_items: items per shard, skipped ones included.
        skip_bad: unusable files were left out.
    """

    source: dict[str, Any]
    count: int
    fields: dict[str, FieldInfo]
    model: str
    components: dict[str, str]
    seed: int
    size: tuple[int, int]
    frames: int
    shard_items: int
    skip_bad: bool = False


class Shard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A finished shard: items, pictures and clips in it, items skipped, and its two files."""

    number: int
    items: int
    pictures: int
    clips: int
    skipped: int
    arrays: str
    arrays_bytes: int
    arrays_sha256: str
    text: str
    text_bytes: int
    text_sha256: str


class Index(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file; `shards` in ascending order of their numbers."""

    format: int
    complete: bool
    recipe: Recipe
    shards: tuple[Shard, ...]

    @property
    def items(self) -> int:
        return sum(shard.items for shard in self.shards)

    @property
    def skipped(self) -> int:
        return sum(shard.skipped for shard in self.shards)

    @property
    def shard_count(self) -> int:
        """Shards of the finished folder."""
        return -(-self.recipe.count // self.recipe.shard_items)


def read_index(folder: Path) -> Index:
    """The index in `folder`. Raises DataError in one line when it is missing or cannot be used."""
    path = folder / INDEX
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{folder}: no tokenised folder, there is no {INDEX} in it; make one with `videolavit tokenize`"
        ) from None
    try:
        raw = msgspec.json.decode(content, type=dict[str, Any])
        if raw.get("format") != FORMAT:
            raise DataError(f"{path}: format is {raw.get('format')!r}, this version reads {FORMAT}; tokenise again")
        index = msgspec.convert(raw, Index)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is damaged: {' '.join(str(error).split())}; tokenise again") from error
    numbers = [shard.number for shard in index.shards]
    names = [name for shard in index.shards for name in (shard.arrays, shard.text)]
    known = range(index.shard_count) if index.recipe.shard_items > 0 else range(0)
    if numbers != sorted(set(numbers) & set(known)) or not all(map(_NAME.fullmatch, names)):
        raise DataError(f"{path}: is damaged: its list of shards is not one; tokenise again")
    if index.complete and len(numbers) != len(known):
        raise DataError(f"{path}: is damaged: lists {len(numbers)} of {len(known)} shards; tokenise again")
    return index


def write_index(folder: Path, index: Index) -> None:
    """Replace the index in `folder`. Raises UsageError when it cannot be written."""
    path = folder / INDEX
    with published(path) as staging, writing(path):
        staging.write_bytes(msgspec.json.format(msgspec.json.encode(index), indent=1) + b"\n")


def check_sizes(folder: Path, shard: Shard) -> None:
    """Raise DataError when a file of `shard` is missing or has another length than when it was written."""
    for name, size in ((shard.arrays, shard.arrays_bytes), (shard.text, shard.text_bytes)):
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, must have {size}"
            raise DataError(f"{path}: {state}; copy it again, or run the same `videolavit tokenize` with --resume")


def check_content(folder: Path, shard: Shard) -> None:
    """As `check_sizes`, and reads both files to compare their digests."""
    check_sizes(folder, shard)
    for name, digest in ((shard.arrays, shard.arrays_sha256), (shard.text, shard.text_sha256)):
        if sha256_of(folder / name) != digest:
            raise DataError(
                f"{folder / name}: is damaged, its SHA-256 is another one; copy it again, or run the same "
                "`videolavit tokenize` with --resume"
            )
