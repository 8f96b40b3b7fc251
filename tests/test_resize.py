"""runtime.resize equals torch's bicubic interpolation."""

import numpy as np
import pytest
import torch
from golden import assert_close, load
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.motion.grid import model_motion
from runtime.resize import bicubic

sides = st.integers(1, 80)


@given(sides, sides, sides, sides, st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_equals_torch(height, width, h, w, seed):
    x = np.random.default_rng(seed).normal(size=(2, 3, height, width)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x), (h, w), mode="bicubic", align_corners=False, antialias=False
    )
    assert_close(bicubic(x, (h, w)), expected.numpy(), 1e-5)


def test_same_size_is_untouched():
    x = np.ones((2, 3, 4), np.float32)
    assert bicubic(x, (3, 4)) is x


@pytest.mark.parametrize("size", [(20, 36), (3, 4)])
def test_motion_resize_golden(size):
    golden = load("k_motion_vector_processor")
    grid = golden.outputs["pooled_grid_with_13th_frame"]  # the fill of frame 12 leaves a filled one as it is
    expected = golden.outputs[f"motion_{size[0]}x{size[1]}_antialias_False"]
    assert_close(model_motion(grid, size), expected, 1e-5)
