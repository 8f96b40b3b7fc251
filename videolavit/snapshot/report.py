"""What is wrong with a snapshot, all of it at once.

Contract: a `Problem` names a file, and the tensor or key in it; a `SnapshotReport` gives the state of every official
file, one line that fits an error message, and a text that lists everything. Nothing here reads files.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.errors import CheckpointError

Kind = Literal["missing file", "unreadable", "config", "missing", "unexpected", "wrong shape", "wrong type", "note"]
REPOSITORY = "rain1011/Video-LaVIT-v1"
FIRST = 3  # problems spelled out in the one-line summary
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be.

    Attributes:
        file: path inside the snapshot.
        detail: the tensor, the key and its value, or why the file cannot be used.
        fatal: False for what the reference puts up with as well.
    """

    file: str
    kind: Kind
    detail: str
    fatal: bool = True


@dataclass(frozen=True)
class FileState:
    """One official file, or a folder with the shards of one.

    Attributes:
        path: where it is, or should be.
        scope: file or folder whose problems concern it.
        found: whether it is there and can be read.
        tensors, bytes: what is in it; of a missing file, what should be, in 16 bits.
        dtypes: stored types.
        components: what takes tensors from it.
    """

    path: str
    scope: str
    found: bool
    tensors: int
    bytes: int
    dtypes: tuple[str, ...]
    components: tuple[str, ...]


@dataclass(frozen=True)
class SnapshotReport:
    """State of all official files of the snapshot in `folder`."""

    folder: Path
    files: tuple[FileState, ...]
    problems: tuple[Problem, ...]

    @property
    def fatal(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.fatal)

    @property
    def usable(self) -> bool:
        return not self.fatal

    def line(self) -> str:
        """One line: the first problems, and the command that shows all of them."""
        groups = [_sentence(group) for group in _grouped(self.fatal)]
        more = f"; and {len(groups) - FIRST} more" if len(groups) > FIRST else ""
        return (
            f"{self.folder}: {'; '.join(groups[:FIRST])}{more}; "
            f"`videolavit convert {self.folder} --check` lists everything"
        )

    def text(self) -> str:
        """Every file and every problem."""
        rows: list[tuple[str, ...]] = [("file", "state", "tensors", "stored as", "size", "used for")]
        rows += [self._row(state) for state in self.files]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        notes = tuple(problem for problem in self.problems if not problem.fatal)
        for title, chosen in (("problem", self.fatal), ("note", notes)):
            lines += ["", f"{_count(len(chosen), title)}:"] if chosen else []
            for group in _grouped(chosen):
                heading = f"  {group[0].file}: {_HEADINGS[group[0].kind]}"
                if len(group) == 1:
                    lines.append(f"{heading}: {printable(group[0].detail)}")
                else:
                    lines += [heading, *(f"    {printable(problem.detail)}" for problem in group)]
        if any(problem.kind == "missing file" for problem in self.fatal):
            lines += ["", f"to go on with a download: hf download {REPOSITORY} --local-dir {self.folder}"]
        verdict = "complete" if self.usable else f"cannot be used, {_count(len(self.fatal), 'problem')}"
        return "\n".join([*lines, "", f"{self.folder}: {verdict}"])

    def _row(self, state: FileState) -> tuple[str, ...]:
        mine = [p for p in self.fatal if p.file == state.scope or p.file.startswith(f"{state.scope}/")]
        counts = ", ".join(f"{n} {kind}" for kind, n in Counter(p.kind for p in mine).items())
        size = size_text(state.bytes)
        return (
            state.path,
            counts or ("complete" if state.found else "not there"),
            str(state.tensors),
            " ".join(state.dtypes) or "-",
            size if state.found else f"({size})",
            " ".join(state.components) or "-",
        )


_HEADINGS: dict[Kind, str] = {
    "missing file": "missing",
    "unreadable": "cannot be read",
    "config": "not supported",
    "missing": "missing tensors",
    "unexpected": "unexpected tensors",
    "wrong shape": "tensors of the wrong shape",
    "wrong type": "tensors of the wrong type",
    "note": "note",
}


def size_text(size: int) -> str:
    """Bytes as people write them."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.2f} MiB"


def printable(text: str) -> str:
    """`text` on one line: a damaged file can have anything in its names."""
    return re.sub(r"[\x00-\x1f\x7f]", "?", text).encode("utf-8", "backslashreplace").decode()


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _grouped(problems: tuple[Problem, ...]) -> list[list[Problem]]:
    """Problems by file and kind, files in the order in which they first appear."""
    groups: dict[str, dict[Kind, list[Problem]]] = {}
    for problem in problems:
        groups.setdefault(problem.file, {}).setdefault(problem.kind, []).append(problem)
    return [group for kinds in groups.values() for group in kinds.values()]


def _sentence(problems: list[Problem]) -> str:
    """Problems of one file and kind in a few words."""
    first, more = problems[0], len(problems) - 1
    if first.kind in ("config", "unreadable", "missing file"):
        what = f"missing, {first.detail}" if first.kind == "missing file" else first.detail
        return printable(f"{first.file}: {what}" + (f" (and {more} more)" if more else ""))
    return printable(f"{first.file}: {more + 1} {first.kind}: {first.detail}" + (", ..." if more else ""))


class SnapshotError(CheckpointError):
    """A snapshot that cannot be used; `report` has everything, the message the first few problems."""

    def __init__(self, report: SnapshotReport) -> None:
        self.report = report
        super().__init__(report.line())
