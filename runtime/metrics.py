"""How alike two pictures are: PSNR and SSIM, as commonly defined for 8-bit pictures.

Contract: both take uint8 [H, W, 3] pictures of one size and work on all channels.
"""

from __future__ import annotations

import numpy as np

_SIGMA = 1.5  # of SSIM's Gaussian window (Wang et al. 2004)
_RADIUS = 5


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; 100 for equal pictures."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 100.0 if error == 0 else min(100.0, 10 * float(np.log10(255.0**2 / error)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity, -1 to 1 (Wang et al. 2004, 11x11 Gaussian window, K1 = 0.01, K2 = 0.03)."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return float(similarity.mean())


def _blur(picture: np.ndarray) -> np.ndarray:
    """Gaussian blur of [H, W, C], edges reflected."""
    taps = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
    taps /= taps.sum()
    for axis in (0, 1):
        pad = [(0, 0)] * picture.ndim
        pad[axis] = (_RADIUS, _RADIUS)
        padded = np.pad(picture, pad, mode="symmetric")
        size = picture.shape[axis]
        picture = sum(weight * np.take(padded, range(k, k + size), axis=axis) for k, weight in enumerate(taps))
    return picture
