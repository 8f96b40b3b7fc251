"""Models that ONNX Runtime has optimised for this machine, kept between runs.

Contract: a kept model computes exactly what the original does and loads in half the time or less. It is found by what
it was made from (`key_of`) and trusted only while its content has the SHA-256 in its name: what is damaged is made
again. Files appear by rename, whole or not at all; one unused for `UNUSED_DAYS` goes when another is kept. A folder
that cannot be read or written means working without.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from runtime.bundle import FileEntry, sha256_of
from runtime.files import cache_folder, drop_unused

# Bytes of a model. Of a larger one reading the weights takes the time, and optimised it may need twice the disk.
LARGEST = 64 * 2**20
UNUSED_DAYS = 30
_STAGING = ".part"
_CPU = ("vendor_id", "cpu family", "model", "flags", "CPU ", "Features")  # lines of /proc/cpuinfo that tell processors


def key_of(files: Sequence[FileEntry], library: str) -> str | None:
    """What an optimised model depends on, as a name; None for a model that is not worth keeping.

    `library` says which build of ONNX Runtime optimises it and how.
    """
    if len(files) != 1 or files[0].bytes > LARGEST:
        return None
    return hashlib.sha256("\n".join((files[0].sha256, library, _processor())).encode()).hexdigest()[:32]


def find(key: str) -> Path | None:
    """The kept model of a key, checked."""
    place = cache_folder()
    if place is None:
        return None
    with contextlib.suppress(OSError):
        for path in place.glob(f"{key}.*.onnx"):
            if sha256_of(path) == path.suffixes[0][1:]:
                os.utime(path)
                return path
            path.unlink()
    return None


def staging(key: str) -> Path | None:
    """Where a model is written before it is kept, if it can be."""
    place = cache_folder()
    if place is None:
        return None
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"{key}.{os.getpid()}{_STAGING}"
        path.touch()
        return path
    return None


def keep(key: str, staged: Path) -> None:
    """Keep the model in a staging file, and let go of those that nobody has used for long."""
    with contextlib.suppress(OSError):
        staged.rename(staged.with_name(f"{key}.{sha256_of(staged)}.onnx"))
        drop_unused(staged.parent, (".onnx", _STAGING), UNUSED_DAYS)


def discard(path: Path) -> None:
    """Remove a kept or staged model that turned out to be of no use."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


@cache
def _processor() -> str:
    """What the optimiser looks at: layouts differ from one processor to another."""
    parts = [platform.system(), platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        parts += [line for line in first.splitlines() if line.startswith(_CPU)]
    return "\n".join(parts)
