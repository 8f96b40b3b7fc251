"""Kernels that TensorRT-RTX has compiled for this GPU, kept between runs.

Contract: TensorRT-RTX compiles a plan's kernels where it is loaded, which takes seconds; from what is kept it takes
them instead. Kept is one file for a plan, library version and GPU, found by that and trusted only while it has the
SHA-256 that stands before its content; one of another driver, say, the library refuses. It is written again when
something was compiled, and appears by rename, whole or not at all; one unused for `graph_cache.UNUSED_DAYS` goes. A
folder that cannot be read or written, and a library without such a cache, mean working without.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from runtime.backends.graph_cache import UNUSED_DAYS
from runtime.errors import UsageError
from runtime.files import cache_folder, drop_unused, published

SUFFIX = ".kernels"
_DIGEST = hashlib.sha256().digest_size


class KernelCache:
    """The kernels of one deserialised engine.

    Attributes:
        config: what an execution context is created with, so that it takes kernels from here and puts them here. It
            must live as long as that context does.
    """

    def __init__(self, config: Any, cache: Any, path: Path) -> None:
        self.config, self._cache, self._path = config, cache, path
        content = _read(path)
        self._stored = content if content and cache.deserialize(content) else b""

    def save(self) -> None:
        """Keep the kernels if there are others than were kept before."""
        memory = self._cache.serialize()
        content = b"" if memory is None else bytes(memoryview(memory))
        if content == self._stored:
            return
        with contextlib.suppress(OSError, UsageError):  # `published` makes the latter of a disk that is full
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with published(self._path) as staging:
                staging.write_bytes(hashlib.sha256(content).digest() + content)
            self._stored = content
            drop_unused(self._path.parent, (SUFFIX,), UNUSED_DAYS)


def kernel_cache(engine: Any, plan: str, library: str, compute_capability: str) -> KernelCache | None:
    """The cache of an engine whose plan has SHA-256 `plan`; None where there can be none or none is wanted."""
    folder = cache_folder()
    make_config = getattr(engine, "create_runtime_config", None)
    if folder is None or make_config is None:
        return None
    config = make_config()
    make_cache = getattr(config, "create_runtime_cache", None)  # full TensorRT compiles nothing when it loads
    if make_cache is None:
        return None
    cache = make_cache()
    if cache is None or not config.set_runtime_cache(cache):
        return None
    key = hashlib.sha256("\n".join((plan, library, compute_capability)).encode()).hexdigest()[:32]
    return KernelCache(config, cache, folder / f"{key}{SUFFIX}")


def _read(path: Path) -> bytes:
    """What is kept, if it is whole; it counts as used."""
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        digest, kernels = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(kernels).digest() == digest:
            os.utime(path)
            return kernels
    return b""
