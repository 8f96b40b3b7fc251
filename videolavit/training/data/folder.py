"""A folder of videos and pictures as a source.

Contract: items are the media files below the folder in the order of their names; `labels` says what is beside them.
What a file is follows from its suffix. Nothing is read before it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from runtime.errors import MediaError, UsageError
from runtime.geometry import Geometry
from videolavit.training.data.errors import DataError
from videolavit.training.data.examples import ClipExample, PictureExample
from videolavit.training.data.labels import Labels, from_json, from_jsonl, from_text
from videolavit.training.data.media import PICTURES, VIDEOS, read_clips, read_picture

JSON_LINES = "captions.jsonl"


class FolderSource:
    """Videos and pictures below `folder`, at most `clips` clips of each video.

    Raises:
        UsageError: no such folder, or nothing in it that can be used.
        DataError: a damaged captions.jsonl, or one that names a file that is not there.
    """

    def __init__(self, folder: Path, geometry: Geometry, *, clips: int = 1) -> None:
        if not folder.is_dir():
            raise UsageError(f"{folder}: is not a folder; name one with videos or pictures")
        self.folder, self.geometry, self.clips = folder, geometry, clips
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

    def moves(self, index: int) -> bool:
        return self.files[index].suffix.lower() in VIDEOS

    def picture(self, index: int) -> PictureExample:
        labels = self.labels(index)
        image = read_picture(self.folder / self.files[index], self.moves(index), self.geometry)
        return PictureExample(image=image, captions=labels.captions, questions=labels.questions)

    def clip(self, index: int) -> ClipExample:
        path, labels = self.folder / self.files[index], self.labels(index)
        if not self.moves(index):
            raise MediaError(f"{path}: is a picture; motion is read from videos")
        read = read_clips(path, self.geometry, self.clips)
        return ClipExample(
            frames=read.frames,
            grid=read.grid,
            clip_count=read.count,
            captions=labels.captions,
            questions=labels.questions,
        )

    def labels(self, index: int) -> Labels:
        """What is said about item `index`: its line of captions.jsonl, else NAME.json, else NAME.txt, else nothing."""
        file = self.files[index]
        if file.as_posix() in self._table:
            return self._table[file.as_posix()]
        for suffix, read in ((".json", from_json), (".txt", from_text)):
            path = (self.folder / file).with_suffix(suffix)
            if path.is_file():
                return read(path.read_bytes(), str(path))
        return Labels()


def _known() -> str:
    return " ".join(sorted(PICTURES | VIDEOS))
