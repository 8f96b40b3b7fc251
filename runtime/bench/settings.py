"""What a benchmark was asked for, and what one stage of it found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.bench.timing import Times
from runtime.bundle import Manifest
from runtime.engines import EngineOptions
from runtime.errors import UsageError
from runtime.requests import VideoRequest, resolve

PROMPT = "a red circle moving right"
OURS = "videolavit"


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """How to measure.

    Attributes:
        repeats: counted runs of everything.
        warm_up: runs before them that are not counted, at least 1.
        contexts: positions in the cache before a token is written, and lengths of a prompt.
        tokens: tokens of one decoding run.
        video: file whose motion is read; None makes one.
        size, keyframe_size: (width, height) in pixels of the pictures of a clip and of key frames; None the model's.
        keyframe_steps, video_steps: of the whole clip; None the model's.
        candidates: of the whole clip; torch writes them one after the other, so beside it one says most.
        count_work: count operations and bytes, for shares of the roofs.
        seed: of all inputs.
    """

    repeats: int = 10
    warm_up: int = 2
    contexts: tuple[int, ...] = (64, 1024)
    tokens: int = 16
    threads: int | None = None
    provider: str = "cpu"
    video: Path | None = None
    size: tuple[int, int] | None = None
    keyframe_size: tuple[int, int] | None = None
    keyframe_steps: int | None = None
    video_steps: int | None = None
    candidates: int = 1
    count_work: bool = True
    seed: int = 0

    @property
    def options(self) -> EngineOptions:
        return EngineOptions(provider=self.provider, threads=self.threads)

    def check(self, manifest: Manifest) -> None:
        """Raise UsageError for sizes, steps and contexts that the model does not have."""
        positions = manifest.language_model.max_positions
        for context in self.contexts:
            if context + self.tokens > positions:
                raise UsageError(
                    f"--contexts {context}: with --tokens {self.tokens} it comes to {context + self.tokens} positions, "
                    f"the language model has {positions}; ask for at most {max(0, positions - self.tokens)}"
                )
        resolve(self.clip_request(manifest), manifest.geometry, manifest.defaults)

    def clip_request(self, manifest: Manifest) -> VideoRequest:
        """The clip that is made."""
        size, keyframe_size = self.sizes(manifest)
        return VideoRequest(
            prompt=PROMPT,
            size=size,
            keyframe_size=keyframe_size,
            keyframe_steps=self.keyframe_steps,
            video_steps=self.video_steps,
            candidates=self.candidates,
        )

    def sizes(self, manifest: Manifest) -> tuple[tuple[int, int], tuple[int, int]]:
        """(width, height) of a clip's pictures and of key frames."""
        geometry = manifest.geometry
        return self.size or geometry.video_size, self.keyframe_size or geometry.keyframe_size


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: one thing that one contender did.

    Attributes:
        stage, detail: what was done.
        contender: who did it.
        times: of one `unit`.
        unit: what is counted, `token` or `step` for example.
        amount, of: how much there is in a unit, for a rate: 1 token, 24 frames.
        flops: operations in a unit; None where they are not counted.
        bytes: weights and cache read for a unit; the same.
        ratio: this contender's median to that of `ratio_to`.
    """

    stage: str
    detail: str
    contender: str
    times: Times
    unit: str
    amount: float = 1.0
    of: str = ""
    flops: float | None = None
    bytes: float | None = None
    ratio: float | None = None
    ratio_to: str = ""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What one stage gave.

    Attributes:
        peak_rss: resident bytes at most, of a process that did this stage alone and no peer.
        load_seconds: to load its engines.
        notes: what a reader has to know.
    """

    stage: str
    rows: tuple[Row, ...]
    peak_rss: int
    load_seconds: float
    notes: tuple[str, ...] = ()
