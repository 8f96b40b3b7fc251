"""Tar shards in the WebDataset layout as a source.

Contract: files of a shard that share a KEY (the path up to the first dot of the file's name) are one item: KEY.mp4 or
another video, or KEY.jpg, .png or .webp, with KEY.json or KEY.txt (`labels`); other files are passed over. Opening
reads the headers of the shards, nothing is unpacked to disk, and an item is read from its place in the file.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from runtime.errors import MediaError, UsageError
from runtime.geometry import Geometry
from videolavit.training.data.labels import READERS, Labels
from videolavit.training.data.media import PICTURES, VIDEOS, in_memory
from videolavit.training.data.media_source import MediaSource


@dataclass(frozen=True)
class _Member:
    """A file in a shard: where its bytes are."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class _Item:
    shard: Path
    media: _Member
    labels: dict[str, _Member]  # by suffix


class WebDatasetSource(MediaSource):
    """Items of the .tar shards in `path`, a folder or one shard, at most `clips` clips of each video.

    Raises:
        UsageError: no shard, or no item in one.
        MediaError: a shard is damaged, or has two media files for one key.
    """

    def __init__(self, path: Path, geometry: Geometry, *, clips: int = 1) -> None:
        super().__init__(geometry, clips)
        self.path = path
        shards = sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.is_file() else []
        if not shards:
            raise UsageError(f"{path}: no shard; name a .tar file or a folder with .tar files")
        self.shards = shards
        self._items = [item for shard in shards for item in _index(shard)]
        if not self._items:
            raise UsageError(f"{path}: no KEY.mp4, KEY.jpg or KEY.png is in its {len(shards)} shards")

    def __len__(self) -> int:
        return len(self._items)

    def identity(self) -> Mapping[str, object]:
        return {"source": "webdataset", "path": str(self.path), "clips": self.clips, "files": len(self._items)}

    def shown(self, index: int) -> str:
        item = self._items[index]
        return f"{item.shard}:{item.media.name}"

    def suffix(self, index: int) -> str:
        return _suffix(self._items[index].media.name)

    def opened(self, index: int) -> AbstractContextManager[Path]:
        item = self._items[index]
        return in_memory(_content(item.shard, item.media), self.shown(index), self.suffix(index))

    def labels(self, index: int) -> Labels:
        """What is said about item `index`: its KEY.json, else its KEY.txt, else nothing."""
        item = self._items[index]
        for suffix, read in READERS.items():
            member = item.labels.get(suffix)
            if member is not None:
                return read(_content(item.shard, member), f"{item.shard}:{member.name}")
        return Labels()


def _index(shard: Path) -> list[_Item]:
    """Items of a shard in the order of their first files. Raises MediaError when it is damaged."""
    media: dict[str, _Member] = {}
    labels: dict[str, dict[str, _Member]] = {}
    try:
        # Mode "r:" reads uncompressed archives only: in others a file has no place of its own.
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                if not entry.isreg():
                    continue
                member = _Member(entry.name, entry.offset_data, entry.size)
                if entry.offset_data + entry.size > shard.stat().st_size:
                    raise MediaError(f"{shard}: {entry.name} is cut short; copy the shard again")
                key, suffix = _key(entry.name), _suffix(entry.name)
                if suffix in READERS:
                    labels.setdefault(key, {})[suffix] = member
                elif suffix in PICTURES | VIDEOS:
                    if key in media:
                        raise MediaError(f"{shard}: {media[key].name} and {entry.name} have the same key; rename one")
                    media[key] = member
    except (tarfile.TarError, OSError, ValueError) as error:
        raise MediaError(f"{shard}: is not an uncompressed tar file that can be read ({error})") from error
    return [_Item(shard, member, labels.get(key, {})) for key, member in media.items()]


def _key(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.parent / path.name.partition(".")[0])


def _suffix(name: str) -> str:
    """Everything from the first dot of the file's name on: a mask KEY.seg.png is no picture of the item."""
    return "." + PurePosixPath(name).name.partition(".")[2].lower()


def _content(shard: Path, member: _Member) -> bytes:
    with shard.open("rb") as stream:
        stream.seek(member.offset)
        return stream.read(member.size)
