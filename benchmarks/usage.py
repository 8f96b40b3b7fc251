"""What a process has used: CPU seconds and peak memory, children included.

Contract: standard library only, because motion_reference.py imports it in environments without this project.
"""

from __future__ import annotations

import resource
from pathlib import Path


def cpu_seconds() -> float:
    """Of this process and the children it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def peak_kib() -> int:
    """Largest resident size of this process or of one child, KiB."""
    # Not ru_maxrss of this process: that starts at the size of whoever started it.
    status = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
