"""Vectors to grids, against a dense map per pixel and the reference's numbers."""

import numpy as np
import pytest
from golden import assert_close, load
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.motion.clips import GROUP, consecutive_clips, understanding_starts
from runtime.motion.grid import macroblock_grid, model_motion, to_pixels

FIELDS = ["source", "w", "h", "src_x", "src_y", "dst_x", "dst_y", "motion_x", "motion_y", "motion_scale"]
STD = np.array([0.0993703, 0.1130276])


def structured(rows):
    return np.array([tuple(row) for row in rows], dtype=[(name, "<i4") for name in FIELDS])


def dense_map(rows, width, height, rescale):
    """Float64 [H, W, 2]: -10000 without a vector, else the last vector of the pixel."""
    dense = np.full((height, width, 2), -10000.0)
    std = STD / 10 if rescale else STD
    for source, _, _, _, _, x, y, mx, my, scale in np.asarray(rows, dtype=np.int64).reshape(-1, 10):
        value = source * np.array([mx, my]) / scale / (width, height) / std
        dense[min(max(y, 0), height - 1), min(max(x, 0), width - 1)] = value
    return dense


def pooled(dense):
    """Float32 [2, rows, columns]: largest value of every 16x16 block, holes zero."""
    height, width, _ = dense.shape
    padded = np.full((-(-height // 16) * 16, -(-width // 16) * 16, 2), -10000.0)
    padded[:height, :width] = dense
    blocks = padded.reshape(padded.shape[0] // 16, 16, padded.shape[1] // 16, 16, 2).max(axis=(1, 3))
    grid = blocks.transpose(2, 0, 1).astype(np.float32)
    return np.where(grid < -1000, np.float32(0), grid)


vector = st.tuples(
    st.sampled_from([-1, 1]),
    st.just(16),
    st.just(16),
    st.just(0),
    st.just(0),
    st.integers(-20, 140),
    st.integers(-20, 110),
    st.integers(-300, 300),
    st.integers(-300, 300),
    st.sampled_from([1, 2, 4]),
)


@given(st.lists(vector, max_size=60), st.integers(1, 120), st.integers(1, 90), st.booleans())
@settings(max_examples=150, deadline=None)
def test_equals_dense_definition(rows, width, height, rescale):
    grid = macroblock_grid(structured(rows), width, height, rescale)
    np.testing.assert_array_equal(grid, pooled(dense_map(rows, width, height, rescale)))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("frame", [0, 1, 2])
def test_golden_vectors(frame, rescale):
    golden = load("k_extract_motions")
    height, width = golden.meta["config"]["H"], golden.meta["config"]["W"]
    dense = np.full((height, width, 2), -10000.0)
    y, x = golden.outputs[f"rescale_{rescale}/frame{frame}_yx"].T
    dense[y, x] = golden.outputs[f"rescale_{rescale}/frame{frame}_value"]
    rows = golden.inputs[f"frame{frame}_mvs"]
    assert_close(dense_map(rows, width, height, rescale), dense, 1e-9)
    assert_close(macroblock_grid(structured(rows), width, height, rescale), pooled(dense), 1e-6)


def test_golden_pooling_and_fill():
    golden = load("k_motion_vector_processor")
    config = golden.meta["config"]
    dense = np.full((config["T"], config["H"], config["W"], 2), -10000.0)
    t, y, x = golden.inputs["motions_hit_index"].T
    dense[t, y, x] = golden.inputs["motions_hit_value"]
    grid = np.stack([pooled(frame) for frame in dense])
    expected = golden.outputs["pooled_grid_with_13th_frame"]  # [T, 2, rows, columns]
    assert_close(model_motion(grid, grid.shape[2:]).transpose(1, 0, 2, 3), expected, 1e-6)
    assert_close(model_motion(grid, (20, 36)), golden.outputs["motion_20x36_antialias_False"], 1e-5)


def test_fill_needs_both_neighbours_and_leaves_its_input():
    grid = np.random.default_rng(0).normal(size=(24, 2, 3, 4)).astype(np.float32)
    before = grid.copy()
    filled = model_motion(grid, (3, 4))
    np.testing.assert_array_equal(grid, before)
    np.testing.assert_allclose(filled[:, 12], (before[11] + before[13]) / 2)
    np.testing.assert_array_equal(model_motion(grid[:13], (3, 4))[:, 12], before[12])


def test_pixels_undo_the_scaling():
    rows = [(-1, 16, 16, 0, 0, 8, 8, 7, -5, 2)]
    for rescale in (False, True):
        grid = macroblock_grid(structured(rows), 64, 48, rescale)
        np.testing.assert_allclose(to_pixels(grid, 64, 48, rescale)[:, 0, 0], [-3.5, 2.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("keyframes", "total", "max_clips", "expected"),
    [
        (range(0, 84, 12), 84, 8, [12, 36, 60]),
        (range(0, 84, 12), 84, 2, [12, 60]),
        (range(0, 24, 12), 24, 8, [0]),  # one good start is too few: all I frames, and of two the first
        ([0], 5, 8, [0]),
        ([0, 12, 19, 31, 43], 70, 8, [19]),
        ([0, 7, 9], 15, 8, [7]),
        (range(0, 1200, 12), 1200, 4, [12, 396, 780, 1164]),
    ],
)
def test_understanding_starts(keyframes, total, max_clips, expected):
    assert understanding_starts(list(keyframes), total, max_clips) == expected


@given(st.lists(st.integers(1, GROUP), max_size=20), st.integers(0, 11), st.sampled_from([8, 24]), st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_consecutive_clips_are_whole_and_regular(groups, tail, frames, first):
    starts = np.cumsum([0, *groups]).tolist()
    total = starts[-1] + 1 + tail
    items = [(i in starts, i) for i in range(total)]
    clips = list(consecutive_clips(items, frames, first))
    for (a, content), following in zip(clips, [*clips[1:], (total, None)], strict=False):
        assert content == list(range(a, a + frames))
        assert first <= a and a in starts and a + GROUP in starts
        assert not any(a < s < a + GROUP for s in starts)
        assert a + frames <= following[0]
    loose = list(consecutive_clips(items, frames, first, regular=False))
    assert len(loose) >= len(clips)
    expected_first = next((s for s in starts if s >= first and s + frames <= total), None)
    assert (loose[0][0] if loose else None) == expected_first
