"""Clips are encoded while the next is made: the same file, flat memory, and nothing left behind."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import UsageError
from runtime.video import write_video
from runtime.writer import write_clips

LONG = 60.0  # seconds after which something that must happen has not


def clip(index: int, frames: int = 4) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (frames, 32, 48, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_the_file_is_the_one_written_at_once(tmp_path: Path, suffix: str) -> None:
    clips = [clip(0), clip(1), clip(2)]
    together, apart = tmp_path / f"together{suffix}", tmp_path / f"apart{suffix}"
    write_video(together, np.concatenate(clips), 6, {"a": "b"}, force=False)
    write_clips(apart, iter(clips), 6, {"a": "b"}, force=False)
    assert together.read_bytes() == apart.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {together.name, apart.name}


def test_a_clip_is_encoded_while_the_next_is_made(tmp_path: Path) -> None:
    encoded = threading.Event()

    def frames() -> Iterator[np.ndarray]:
        yield from clip(0)
        encoded.set()  # asked for one more: all before it have gone to the encoder

    def clips() -> Iterator[Any]:
        yield frames()
        assert encoded.wait(LONG), "the first clip was not encoded before the second was there"
        yield clip(1)

    write_clips(tmp_path / "a.mp4", clips(), 6, {}, force=False)


def test_memory_does_not_grow_with_clips(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def clips() -> Iterator[np.ndarray]:
        nonlocal most
        for index in range(12):
            made = clip(index)
            alive.append(weakref.ref(made))
            most = max(most, sum(one() is not None for one in alive))
            yield made
            del made

    write_clips(tmp_path / "a.mp4", clips(), 6, {}, force=False)
    # The one made last and the one before it, one that waits, one that is encoded and the frame before.
    assert most <= 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, UsageError])
def test_what_ends_the_making_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def clips() -> Iterator[np.ndarray]:
        yield clip(0)
        yield clip(1)
        raise error("enough")

    with pytest.raises(error, match="enough"):
        write_clips(tmp_path / "a.mp4", clips(), 6, {}, force=False)
    assert list(tmp_path.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "writer"]


def test_what_ends_the_writing_ends_the_making(tmp_path: Path) -> None:
    made = []

    def clips() -> Iterator[np.ndarray]:
        for index in range(1000):
            made.append(index)
            yield clip(index) if index != 1 else clip(index)[:, :16]  # of another size

    with pytest.raises(UsageError, match="frame 4"):
        write_clips(tmp_path / "a.mp4", clips(), 6, {}, force=False)
    assert len(made) < 1000
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_made_for_a_file_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("keep me")

    def clips() -> Iterator[np.ndarray]:
        raise AssertionError("a clip was made")
        yield

    with pytest.raises(UsageError, match="--force"):
        write_clips(tmp_path / "a.mp4", clips(), 6, {}, force=False)
    with pytest.raises(UsageError, match="no frame"):
        write_clips(tmp_path / "b.mp4", iter(()), 6, {}, force=False)
    assert (tmp_path / "a.mp4").read_text() == "keep me"
