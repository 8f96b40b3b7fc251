"""Who else computes the stages: the interface of another implementation.

Contract: a peer makes runs that do what the runtime's own do, from the same inputs; a run returns when its results are
there. A peer says by returning None that it has no such thing, and its place in the table stays empty.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from runtime.bench.timing import Run
from runtime.errors import EnvironmentProblem
from runtime.requests import VideoRequest


@dataclass(frozen=True)
class Call:
    """One call of an engine: its name, its inputs, and which of them stay the same over a loop."""

    engine: str
    inputs: Mapping[str, np.ndarray]
    held: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decoding:
    """Tokens written greedily after a prompt.

    Attributes:
        prompt: [N, D] float32 embeddings, start marker included.
        start: [1, D], the whole context of the unconditional row where there is guidance.
        allowed: ids that may be written.
        tokens: how many are.
        guidance: 1 is none; else conditional and unconditional scores are mixed for every token.
    """

    prompt: np.ndarray
    start: np.ndarray
    allowed: range
    tokens: int
    guidance: float


class Peer(Protocol):
    """Another implementation with the same weights. `name` is its column in tables."""

    name: str

    def calls(self, calls: Sequence[Call]) -> Run | None:
        """One call after the other."""
        ...

    def prefill(self, prompt: np.ndarray) -> Run | None:
        """Read `prompt` [N, D] into an empty cache and give the logits at its end."""
        ...

    def decode(self, work: Decoding) -> Run | None:
        """Write tokens after a prompt that is in the cache already; leave the cache as it was."""
        ...

    def clip(self, request: VideoRequest, seed: int) -> Run | None:
        """Make one clip from a sentence."""
        ...


@dataclass(frozen=True)
class PeerSpec:
    """How to make a peer, wherever it is needed.

    Attributes:
        name: for people.
        factory: `module:function`, called with `arguments` and `threads=`, gives the Peer.
        arguments: numbers and texts. Anything else would bring its module into a stage's process before the peak
            memory of the runtime alone was read.
        install: what to run when a library of it is missing.
    """

    name: str
    factory: str
    arguments: tuple[str | int | None, ...]
    install: str

    def make(self, threads: int) -> Peer:
        """Raises EnvironmentProblem when a library is missing."""
        module, _, function = self.factory.partition(":")
        try:
            return cast(Peer, getattr(importlib.import_module(module), function)(*self.arguments, threads=threads))
        except ModuleNotFoundError as error:
            raise EnvironmentProblem(
                f"--against {self.name}: {error.name} is not installed; run: {self.install}"
            ) from error
