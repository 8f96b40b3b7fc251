"""A key frame moved along its motion vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.motion.compensation import compensated
from runtime.motion.grid import deviation

SIDE, CELLS, FRAMES = 64, 8, 5
GROUND = 40


def picture(x: int, y: int, side: int = 16) -> np.ndarray:
    """A bright square with its corner at (x, y) on dark ground: [64, 64, 3]."""
    made = np.full((SIDE, SIDE, 3), GROUND, np.uint8)
    made[y : y + side, x : x + side] = (250, 200, 10)
    return made


def motion(x: float = 0, y: float = 0) -> np.ndarray:
    """Every cell moves by so many pixels a frame: [2, T, 8, 8]."""
    shares = np.array([x, y]) / SIDE / deviation(rescale=False)
    return np.broadcast_to(shares[:, None, None, None], (2, FRAMES, CELLS, CELLS)).astype(np.float32)


@given(x=st.integers(-4, 4), y=st.integers(-4, 4))
def test_whole_pixels_are_moved_exactly_and_stay_sharp(x: int, y: int) -> None:
    frames = compensated(picture(24, 24), motion(x, y), tokenized=False)
    for index, frame in enumerate(frames):
        np.testing.assert_array_equal(frame, picture(24 + index * x, 24 + index * y))


@given(seed=st.integers(0, 99), tokenized=st.booleans())
def test_nothing_moves_without_motion(seed: int, tokenized: bool) -> None:
    keyframe = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE * 2, 3), dtype=np.uint8)
    frames = compensated(keyframe, np.zeros((2, FRAMES, CELLS, CELLS * 2), np.float32), tokenized=tokenized)
    np.testing.assert_array_equal(frames, np.broadcast_to(keyframe, frames.shape))


def test_vectors_of_the_first_frame_do_not_count() -> None:
    vectors = motion(2)
    changed = vectors.copy()
    changed[:, 0] = 1
    keyframe = picture(8, 8)
    np.testing.assert_array_equal(
        compensated(keyframe, changed, tokenized=False), compensated(keyframe, vectors, tokenized=False)
    )


def test_a_vector_stands_where_its_content_has_come_to() -> None:
    """A square that fills a cell moves by a cell: the vector is in the cell that it reaches."""
    vectors = np.zeros((2, 2, CELLS, CELLS), np.float32)
    vectors[:, 1, 3, 4] = motion(x=8)[:, 1, 0, 0]
    frames = compensated(picture(24, 24, side=8), vectors, tokenized=False)
    assert (frames[1, 24:32, 32:40] == (250, 200, 10)).all()


def test_between_pixels_it_is_interpolated() -> None:
    frames = compensated(picture(24, 24), motion(x=0.5), tokenized=False)
    assert frames[1, 30, 24, 0] == (250 + GROUND) / 2
    assert frames[2, 30, 24, 0] == GROUND


def test_what_comes_into_view_shows_the_border() -> None:
    keyframe = picture(24, 24)
    keyframe[:, 0] = (9, 8, 7)
    frames = compensated(keyframe, motion(x=3), tokenized=False)
    assert (frames[-1, :, : 3 * (FRAMES - 1)] == (9, 8, 7)).all()


def test_decoded_vectors_that_fade_move_a_shape_as_one() -> None:
    """A shape's own cells say how it moves and those around them say it weakly, as decoded tokens do."""
    rows, columns = np.mgrid[:CELLS, :CELLS]
    vectors = np.zeros((2, FRAMES, CELLS, CELLS), np.float32)
    for index in range(1, FRAMES):
        distance = np.hypot(rows - 3.5, columns - 3.5 - index * 2 / 8)  # cells from its centre
        vectors[:, index] = motion(x=2)[:, 1] * np.exp(-0.5 * (distance / 0.7) ** 2)
    vectors *= motion(x=2).max() / vectors.max()

    def reached(tokenized: bool) -> tuple[float, int]:
        """How far the shape's middle has come, and its area, in pixels."""
        bright = compensated(picture(24, 24), vectors, tokenized=tokenized)[-1, ..., 0] > 140
        return float(bright.any(axis=0).nonzero()[0].mean()) - 31.5, int(bright.sum())

    assert reached(tokenized=True) == (pytest.approx(2 * (FRAMES - 1), abs=1), 16 * 16)
    assert reached(tokenized=False) == (pytest.approx(3, abs=1), pytest.approx(18 * 16, abs=16))  # left behind, smeared
