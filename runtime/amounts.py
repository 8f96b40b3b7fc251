"""Amounts of memory, as people write them."""

from __future__ import annotations

import re

from runtime.errors import UsageError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_bytes(value: int | str) -> int:
    """A number of bytes, or a text like "512M" or "1.5GiB". Raises UsageError for anything else, and for nothing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)(?:i?B)?", str(value), re.IGNORECASE)
    amount = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if not amount:
        raise UsageError(f"{value!r} is not an amount of memory; write for example 800M or 8G")
    return amount
