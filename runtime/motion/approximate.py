"""Motion from pictures that come with vectors of their own: frames and clips in the model's layout, approximate.

Contract: the units, scale, grid and frame choice are those of `runtime.motion.sources`; the vectors are the stream's
encoder's, not the model's training encoder's, so values only resemble those of the `mpeg4` source
(`runtime.motion.agreement` measures how much) and every frame and clip says `exact = False`. The model expects a key
frame every `clips.GROUP` frames; here every frame whose number is a multiple of it is one, whatever its type in the
stream, and scene cuts are not looked for. A bounded number of pictures is held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from runtime.frame_rate import Timed, at_rate
from runtime.motion.clips import GROUP
from runtime.motion.grid import deviation, grid_shape
from runtime.motion.mpeg4 import MotionSettings
from runtime.motion.sources import MotionClip, MotionFrame
from runtime.motion.trace import VectorTrace, macroblock_motion

C = TypeVar("C", bound=MotionClip)
Images = Literal["none", "key", "all"]  # which frames carry pixels
MAX_WAITING = 32  # frames that wait for the next picture with vectors; more than any encoder's run of B frames


@dataclass(frozen=True)
class ApproximateFrame(MotionFrame):
    """A frame whose grid resembles that of the `mpeg4` source.

    Attributes:
        exact: always False.
    """

    exact: bool = False


@dataclass(frozen=True)
class ApproximateClip(MotionClip):
    """A clip whose grids resemble those of the `mpeg4` source.

    Attributes:
        exact: always False.
    """

    exact: bool = False


@dataclass(frozen=True)
class Picture:
    """One picture of a stream.

    Attributes:
        field: displacement since the anchor before (`runtime.motion.trace`), zero in an I picture; None for a picture
            that is not an anchor: a B picture, whose vectors are not used.
        image: makes the pixels, uint8 [H, W, 3] RGB of the upright picture.
        width, height: of the upright picture, pixels.
    """

    field: np.ndarray | None
    image: Callable[[], np.ndarray]
    width: int
    height: int


class _Slot(NamedTuple):
    picture: Picture
    time: Fraction


def sampled(pictures: Iterable[Timed[Picture]], settings: MotionSettings, images: Images) -> Iterator[ApproximateFrame]:
    """Frames at `settings.fps`, in order, from the pictures of a stream in presentation order, all of one size."""
    trace = VectorTrace()
    waiting: deque[tuple[int, _Slot]] = deque()

    def observed() -> Iterator[Timed[_Slot]]:
        for timed in pictures:
            if timed.frame.field is not None:
                trace.add(timed.time, timed.frame.field)
            yield Timed(_Slot(timed.frame, timed.time), timed.time, timed.end)

    def frame(index: int, slot: _Slot) -> ApproximateFrame:
        picture = slot.picture
        if trace.end is None:  # no anchor yet: a stream that was cut into
            motion = np.zeros((2, *grid_shape(picture.width, picture.height)), np.float32)
        else:
            motion = macroblock_motion(trace.sample(slot.time))
        key = index % GROUP == 0
        unit = deviation(settings.rescale) * (picture.width, picture.height)
        return ApproximateFrame(
            index=index,
            time_s=float(index / settings.rate),
            kind="I" if key else "P",
            grid=None if key else (motion / unit[:, None, None]).astype(np.float32) + np.float32(0),
            image=picture.image() if images == "all" or (images == "key" and key) else None,
            width=picture.width,
            height=picture.height,
        )

    for index, slot in enumerate(at_rate(observed(), settings.rate)):
        waiting.append((index, slot))
        while waiting and (len(waiting) > MAX_WAITING or (trace.end is not None and trace.end >= waiting[0][1].time)):
            yield frame(*waiting.popleft())
    while waiting:
        yield frame(*waiting.popleft())


def clip_of(index: int, frames: Sequence[MotionFrame], length: int, kind: type[C]) -> C:
    """Clip number `index` from at most `length` frames, the first with pixels; missing frames are zero."""
    first = frames[0]
    if first.image is None:
        raise ValueError(f"frame {first.index} starts a clip and has no pixels")
    grid = np.zeros((length, 2, *grid_shape(first.width, first.height)), np.float32)
    for target, frame in zip(grid, frames, strict=False):
        if frame.grid is not None:
            target[:] = frame.grid
    return kind(index, first.index, first.time_s, first.image, grid)


def collect(frames: Iterable[MotionFrame], starts: Sequence[int], length: int) -> Iterator[ApproximateClip]:
    """Clips of `length` frames that begin at the frame numbers `starts`, which are at least `length` apart."""
    wanted = frozenset(starts)
    clips = 0
    held: list[MotionFrame] = []
    for frame in islice(frames, starts[-1] + length):
        if held or frame.index in wanted:
            held.append(frame)
        if len(held) == length:
            yield clip_of(clips, held, length, ApproximateClip)
            clips, held = clips + 1, []
    if held:
        yield clip_of(clips, held, length, ApproximateClip)
