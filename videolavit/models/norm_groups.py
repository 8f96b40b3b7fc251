"""The number of groups of group norms, which diffusers' video blocks and our own fix at 32.

Contract: at widths of the official model 32 groups are ten channels or more each. At small widths they would be one
channel each, and such a norm erases what the channel says by its mean, a colour for instance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import nn


@contextmanager
def norm_groups(groups: int) -> Iterator[None]:
    """Every GroupNorm made inside has `groups` groups, whatever its maker asks for."""
    make = nn.GroupNorm.__init__

    def make_with(self: nn.GroupNorm, num_groups: int, num_channels: int, *args: Any, **kwargs: Any) -> None:
        make(self, groups, num_channels, *args, **kwargs)

    with patch.object(nn.GroupNorm, "__init__", make_with):
        yield
