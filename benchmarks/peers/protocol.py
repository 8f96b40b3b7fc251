"""What every peer can do, and where it finds the weights.

Contract: a peer is made without arguments, `prepare` loads it, and from then on it holds one sequence. Tokens are
chosen greedily; all peers write the same in fp32. A file of a peer imports its library in `prepare`, so that one that
is missing is found there; `LIBRARY` names the package, `PRECISIONS` those the peer has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PRECISIONS = ("fp32", "int8", "int4")


@dataclass(frozen=True)
class Setting:
    """What to load and how.

    Attributes:
        folder: the model as transformers reads it; a peer keeps its own form of it there too.
        precision: of `PRECISIONS`; weights, that is: what computes is the peer's business.
        threads: to compute with.
        capacity: positions of the longest sequence.
    """

    folder: Path
    precision: str
    threads: int
    capacity: int


class Peer(Protocol):
    """One runtime with one model."""

    def convert(self, setting: Setting) -> None:
        """Write the peer's own form of the model where it is not there yet; in a process that ends thereafter."""
        ...

    def prepare(self, setting: Setting) -> None:
        """Load the model. Raises ImportError for a library that is missing."""
        ...

    def prefill(self, ids: list[int]) -> int:
        """Read a prompt into an empty cache; the token that follows, which is not in the cache yet."""
        ...

    def decode(self, token: int, count: int) -> list[int]:
        """Append `token`, and then what follows it, to the cache: `count` positions. The tokens after each of them."""
        ...

    def rewind(self, length: int) -> None:
        """Keep the first `length` positions of the cache."""
        ...


class Stepwise:
    """A peer that decodes a token at a time."""

    def convert(self, setting: Setting) -> None:
        """Nothing to write."""

    def decode_step(self, token: int) -> int:
        """Append `token` to the cache; the token that follows."""
        raise NotImplementedError

    def decode(self, token: int, count: int) -> list[int]:
        tokens = []
        for _ in range(count):
            token = self.decode_step(token)
            tokens.append(token)
        return tokens
