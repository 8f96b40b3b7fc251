"""Output files that are either complete or not there, and the folder of what is kept between runs.

Contract: a file is written beside its final name and moved there in one rename; whatever ends the writing early,
Ctrl-C included, leaves neither a partial file nor the staging file. Nothing is overwritten without `force`.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.errors import UsageError


def check_output(path: Path, suffixes: Collection[str], force: bool) -> None:
    """Raise UsageError unless `path` can be created: known suffix, writable folder, not there yet (or `force`)."""
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{path}: unknown output type {path.suffix or '(none)'}; use one of {', '.join(suffixes)}")
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name a file in it")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: folder {path.parent} does not exist; create it first")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()  # asking for permission is not enough: try
    except OSError as error:
        raise UsageError(f"{path}: folder {path.parent} is not writable; choose another folder") from error
    if path.exists() and not force:
        raise UsageError(f"{path}: exists already; use --force to replace it")


@contextmanager
def writing(path: Path, also: type[Exception] = OSError) -> Iterator[None]:
    """Turn OSError, and `also`, the error of the library that writes, into UsageError naming `path`."""
    try:
        yield
    except (OSError, also) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot be written: {reason}; free some space or choose another place") from error


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Yield a staging path with the suffix of `path`; rename it to `path` if the block succeeds, else remove it."""
    staging = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield staging
        with writing(path):
            staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def drop_unused(folder: Path, suffixes: Collection[str], days: float) -> None:
    """Remove the files in `folder` with one of `suffixes` that nobody has touched for `days`. Raises OSError."""
    for path in folder.iterdir():
        if path.suffix in suffixes and time.time() - path.stat().st_mtime > days * 86400:
            path.unlink()


def cache_folder() -> Path | None:
    """Where what took long to make is kept between runs: `~/.cache/videolavit`, or as VIDEOLAVIT_CACHE says.

    None when that is `off`, or there is no home.
    """
    chosen = os.environ.get("VIDEOLAVIT_CACHE")
    if chosen:
        return None if chosen == "off" else Path(chosen)
    with suppress(RuntimeError):  # there may be no home
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return base / "videolavit" if base.is_absolute() else None
    return None
