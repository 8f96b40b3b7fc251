"""One `config.json` of a snapshot, read key by key.

Contract: every key that decides what is computed is taken with a type or compared with the one value this project
supports; whatever does not fit becomes a problem that names file and key, and reading goes on with the preset's value
so that one pass finds everything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from videolavit.snapshot.report import Problem

T = TypeVar("T")
REQUIRED = object()


class JsonFile:
    """The configuration at `path` in the snapshot `root`; without a file every key has the preset's value."""

    def __init__(self, root: Path, path: str, problems: list[Problem]) -> None:
        self.path = path
        self._problems = problems
        self._used: set[str] = set()
        self.values: dict[str, Any] = {}
        self.found = (root / path).is_file()
        if not self.found:
            problems.append(Problem(path, "missing file", "download it"))
            return
        try:
            self.values = msgspec.json.decode((root / path).read_bytes(), type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self.found = False
            problems.append(Problem(path, "unreadable", f"is not a JSON object ({error}); download it again"))

    def problem(self, detail: str, *, fatal: bool = True) -> None:
        self._problems.append(Problem(self.path, "config" if fatal else "note", detail, fatal))

    def take(self, key: str, kind: type[T] | Any, preset: T, absent: Any = REQUIRED) -> T:
        """Value of `key` as a `kind`; `absent` is what the library that wrote the file means by leaving it out."""
        self._used.add(key)
        if not self.found:
            return preset
        value = self.values.get(key, absent)
        if value is REQUIRED:
            self.problem(f"{key} is missing")
            return preset
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            self.problem(f"{key} is {_shown(value)}: {_reason(error)}")
            return preset

    def expect(self, key: str, allowed: Any, absent: Any = REQUIRED) -> None:
        """`key` has the value `allowed`."""
        self._used.add(key)
        value = self.values.get(key, absent)
        if self.found and value is REQUIRED:
            self.problem(f"{key} is missing, must be {_shown(allowed)}")
        elif self.found and _normal(value) != _normal(allowed):
            self.problem(f"{key} is {_shown(value)}, must be {_shown(allowed)}")

    def expect_rest(self, defaults: Mapping[str, Any], ignored: Collection[str] = ()) -> None:
        """All keys not asked for so far have the values of `defaults`, or do not matter.

        A key that `defaults` does not have is noted; the reference's libraries ignore such keys too.
        """
        for key, allowed in defaults.items():
            if key not in self._used and key not in ignored:
                self.expect(key, allowed, absent=allowed)
        unknown = [k for k in self.values if k not in self._used and k not in ignored and not k.startswith("_")]
        for key in unknown:
            self.problem(f"{key} is not known and not used", fatal=False)


def _normal(value: Any) -> Any:
    """Values that mean the same made equal: lists of one value everywhere and the value, nothing and False."""
    if isinstance(value, list | tuple):
        parts = [_normal(part) for part in value]
        return parts[0] if parts and all(part == parts[0] for part in parts) else parts
    return None if value is False else value


def _shown(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _reason(error: msgspec.ValidationError) -> str:
    return str(error)[:1].lower() + str(error)[1:]
