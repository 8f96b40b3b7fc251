"""A folder of videos and pictures as a source.

Contract: items are the media files below the folder in the order of their names; `labels` says what is beside them.
What a file is follows from its suffix. Nothing is read before it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from runtime.errors import UsageError
from runtime.geometry import Geometry
from videolavit.training.data.errors import DataError
from videolavit.training.data.labels import READERS, Labels, from_jsonl
from videolavit.training.data.media import PICTURES, VIDEOS
from videolavit.training.data.media_source import MediaSource

JSON_LINES = "captions.jsonl"


class FolderSource(MediaSource):
    """Videos and pictures below `folder`, at most `clips` clips of each video.

    Raises:
        UsageError: no such folder, or nothing in it that can be used.
        DataError: a damaged captions.jsonl, or one that names a file that is not there.
    """

    def __init__(self, folder: Path, geometry: Geometry, *, clips: int = 1) -> None:
        if not folder.is_dir():
            raise UsageError(f"{folder}: is not a folder; name one with videos or pictures")
        super().__init__(geometry, clips)
        self.folder = folder
        self.files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.suffix.lower() in PICTURES | VIDEOS)
        if not self.files:
            raise UsageError(f"{folder}: no video or picture is in it; known suffixes are {_known()}")
        table = folder / JSON_LINES
        self._table = from_jsonl(table.read_bytes(), str(table)) if table.is_file() else {}
        strangers = self._table.keys() - {file.as_posix() for file in self.files}
        if strangers:
            raise DataError(f"{table}: {min(strangers)}: there is no such video or picture in the folder")

    def __len__(self) -> int:
        return len(self.files)

    def identity(self) -> Mapping[str, object]:
        return {"source": "folder", "path": str(self.folder), "clips": self.clips, "files": len(self.files)}

    def shown(self, index: int) -> str:
        return str(self.folder / self.files[index])

    def suffix(self, index: int) -> str:
        return self.files[index].suffix.lower()

    def opened(self, index: int) -> AbstractContextManager[Path]:
        return nullcontext(self.folder / self.files[index])

    def labels(self, index: int) -> Labels:
        """What is said about item `index`: its line of captions.jsonl, else NAME.json, else NAME.txt, else nothing."""
        file = self.files[index]
        if file.as_posix() in self._table:
            return self._table[file.as_posix()]
        for suffix, read in READERS.items():
            path = (self.folder / file).with_suffix(suffix)
            if path.is_file():
                return read(path.read_bytes(), str(path))
        return Labels()


def _known() -> str:
    return " ".join(sorted(PICTURES | VIDEOS))
