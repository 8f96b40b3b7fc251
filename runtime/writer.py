"""Encoding of what is ready while the next is made.

Contract: `write_clips` writes the file that `runtime.video.write_video` would, byte for byte, but encodes in a thread
of its own: the caller's thread goes on to make the next clip. At most one clip waits to be encoded, so memory does not
grow with their number. The file appears when all is written; whatever ends the making or the writing early, Ctrl-C
included, leaves nothing behind.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np

from runtime.files import check_output
from runtime.video import SUFFIXES, write_video

_PATIENCE = 0.1  # seconds between looks at whether the other side is still there

Clip = Iterable[np.ndarray]  # frames uint8 [H, W, 3]


class _GivenUp(Exception):
    """Ends the writing of a file that nobody waits for any more."""


class _Writer:
    """The thread that encodes."""

    def __init__(self, path: Path, fps: float | Fraction, metadata: Mapping[str, str], force: bool) -> None:
        self._clips: queue.Queue[Clip | None] = queue.Queue(1)
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(path, fps, metadata, force), name="writer")

    def start(self) -> None:
        self._thread.start()

    def put(self, clip: Clip | None) -> None:
        """Hand over a clip, None after the last. Waits for a free place; raises what the writing has failed with."""
        while self._thread.is_alive():
            try:
                return self._clips.put(clip, timeout=_PATIENCE)
            except queue.Full:
                continue
        self._raise()

    def finish(self) -> None:
        """Wait until the file is there. Raises what the writing has failed with."""
        self.put(None)
        self._thread.join()
        self._raise()

    def stop(self) -> None:
        """Give up: the file will not appear."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self, path: Path, fps: float | Fraction, metadata: Mapping[str, str], force: bool) -> None:
        try:
            write_video(path, self._frames(), fps, metadata, force)
        except _GivenUp:
            pass
        except BaseException as failure:  # raised again in the thread that waits for it
            self._failure = failure

    def _frames(self) -> Iterator[np.ndarray]:
        while (clip := self._next()) is not None:
            for frame in clip:
                if self._stopped.is_set():
                    raise _GivenUp
                yield frame

    def _next(self) -> Clip | None:
        while not self._stopped.is_set():
            try:
                return self._clips.get(timeout=_PATIENCE)
            except queue.Empty:
                continue
        raise _GivenUp


def write_clips(
    path: Path | str, clips: Iterable[Clip], fps: float | Fraction, metadata: Mapping[str, str], force: bool
) -> None:
    """Write the frames of `clips`, which are made one after the other in this thread, to an .mp4 or .gif file.

    Arguments and errors are those of `write_video`; errors of `clips` come through.
    """
    path = Path(path)
    check_output(path, SUFFIXES, force)
    writer = _Writer(path, fps, metadata, force)
    try:
        writer.start()
        for clip in clips:
            writer.put(clip)
        writer.finish()
    except BaseException:
        writer.stop()
        raise
