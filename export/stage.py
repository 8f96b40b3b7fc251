"""The place beside a bundle where it grows, so that an export that was ended goes on where it stopped.

Contract: `Stage` is the folder `.NAME.export` beside the target and belongs to one export at a time. An engine is built
in a folder of its own and becomes a finished one by one rename; its key says everything it depends on, and a finished
engine whose key or files no longer fit is made again. `publish` fills `bundle` in the stage with links to the finished
engines and swaps it in by rename. Whatever ends the process, the target is the old bundle, the new one, or not there
while the old one is still in the stage, from where the next export puts it back.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from export.engine import Built
from runtime.bundle import MANIFEST, describe_file, write_manifest
from runtime.bundle import Manifest as BundleManifest
from runtime.errors import UsageError
from runtime.files import writing

ENTRY = "engine.json"
_OLD, _NEW, _LOCK, _WORK = "old", "bundle", "lock", "work"


def content_key(facts: object) -> str:
    """SHA-256 of facts that msgspec can write."""
    return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()


class Stage:
    """Use as a context manager; when it ends without a finished engine, it removes itself.

    Raises UsageError when `target` exists and `replace` is not given, is no bundle, or cannot be made, or when
    another export is at work on it.
    """

    def __init__(self, target: Path, *, replace: bool) -> None:
        self.target = target
        self.folder = target.parent / f".{target.name}.export"
        self._replace = replace
        self._lock: BinaryIO | None = None

    def __enter__(self) -> Stage:
        if not self.target.parent.is_dir():
            raise UsageError(f"{self.target}: folder {self.target.parent} does not exist; create it first")
        self._check_target()
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = (self.folder / _LOCK).open("wb")
        except OSError as error:
            raise UsageError(f"{self.target}: cannot write in {self.target.parent}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise UsageError(f"{self.target}: another export is writing it; wait for it to end") from error
        if (self.folder / _OLD).exists() and not self.target.exists():
            (self.folder / _OLD).rename(self.target)
            self._check_target()
        self._clean()
        return self

    def __exit__(self, *_: object) -> None:
        self._clean()
        if self.folder.exists() and not any(path.is_dir() for path in self.folder.iterdir()):
            shutil.rmtree(self.folder)
        if self._lock is not None:
            self._lock.close()

    def finished(self, key: str) -> Built | None:
        """The engine with this key if it is there and whole."""
        folder = self.folder / key
        try:
            built = msgspec.json.decode((folder / ENTRY).read_bytes(), type=Built)
            whole = all(describe_file(folder, folder / file.path) == file for file in built.entry.files)
        except (OSError, msgspec.DecodeError):
            return None
        return msgspec.structs.replace(built, reused=True) if whole else None

    def build(self, key: str, make: Callable[[Path], Built]) -> Built:
        """Let `make` fill a folder with an engine and keep it under `key`."""
        work, done = self.folder / _WORK, self.folder / key
        shutil.rmtree(work, ignore_errors=True)
        with writing(self.folder):
            work.mkdir()
            built = make(work)
            (work / ENTRY).write_bytes(msgspec.json.encode(built))
            shutil.rmtree(done, ignore_errors=True)
            work.rename(done)
        return built

    def publish(self, engines: dict[str, Built], manifest: Callable[[Path], BundleManifest]) -> None:
        """Make the bundle of the finished `engines` (by key); `manifest` is given its folder to add files to."""
        new = self.folder / _NEW
        with writing(self.folder):
            new.mkdir()
            for key, built in engines.items():
                for file in built.entry.files:
                    (new / file.path).parent.mkdir(parents=True, exist_ok=True)
                    _link(self.folder / key / file.path, new / file.path)
            write_manifest(new, manifest(new))
            self._check_target()
            old = self.folder / _OLD
            if self.target.exists():
                self.target.rename(old)
            try:
                new.rename(self.target)
            except OSError:
                if old.exists():
                    old.rename(self.target)
                raise
        shutil.rmtree(self.folder)

    def _check_target(self) -> None:
        if not self.target.exists():
            return
        if not self._replace:
            raise UsageError(f"{self.target}: exists already; add --force to replace it")
        if not (self.target / MANIFEST).is_file():
            raise UsageError(f"{self.target}: exists and is not an engine bundle; choose another folder")

    def _clean(self) -> None:
        for leftover in (_OLD, _NEW, _WORK):
            shutil.rmtree(self.folder / leftover, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
