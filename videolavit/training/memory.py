"""Keeping freed memory in the process.

Contract: glibc gives every large block back to the system when it is freed, and convolutions ask for one such block
after the other; on a CPU the system then spends as long on clearing pages as torch does on computing. Results do not
depend on it. Elsewhere than on glibc nothing is changed.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # parameters of mallopt


def keep_freed_memory() -> None:
    """Make this process reuse large blocks of memory instead of giving them back; its size stays at its peak."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20)):
            mallopt(parameter, value)
