"""Whether this machine's MPEG-4 encoder gives the reference's motion vectors.

Contract: encodes a small synthetic clip and compares every vector with what the tested build gives (PyAV 15.1 and
17.0 on x86-64, which equal the ffmpeg command line bit for bit). Other FFmpeg versions and processors choose
slightly different vectors; results stay usable, but are not bit-equal to the reference's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from av.video.frame import VideoFrame

from runtime.motion.mpeg4 import MotionSettings, VectorDecoder, encode, motion_vectors

EXPECTED = "0c73e4ca009391a9121c267e82e9f9fa0dfb72fdf4ec888dcabe9532638e2a96"
FRAMES, HEIGHT, WIDTH = 24, 288, 352
ONE = 65536  # one pixel in fixed point
COLUMNS = ("source", "w", "h", "src_x", "src_y", "dst_x", "dst_y", "motion_x", "motion_y", "motion_scale")


def encoder_is_exact() -> bool:
    """Encode the clip here and compare its vectors with the recorded ones."""
    return _digest() == EXPECTED


def _digest() -> str:
    """SHA-256 over frame types and all vectors of the clip."""
    digest = hashlib.sha256()
    for frame in VectorDecoder(pixels_of_p_frames=True).decode(encode(_clip(), MotionSettings(slices=1))):
        digest.update(b"I" if frame.key_frame else b"P")
        vectors = motion_vectors(frame)
        for column in COLUMNS if len(vectors) else ():
            digest.update(vectors[column].astype("<i8").tobytes())
    return digest.hexdigest()


def _clip() -> Iterator[VideoFrame]:
    """A soft texture that is zoomed and panned by fractions of a pixel: every half-pel routine is used.

    Integers only, and the legacy generator, whose stream is frozen: the same pixels with every numpy.
    """
    noise = np.random.RandomState(0).randint(0, 256, (HEIGHT, WIDTH)).astype(np.int64)
    soft = np.mean([np.roll(noise, (i, j), (0, 1)) for i in range(3) for j in range(3)], axis=0).astype(np.int64)
    texture = (128 + (soft - 128) * 3).clip(16, 235)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for index in range(FRAMES):
        scale = ONE - 500 * index
        row = (y - HEIGHT // 2) * scale + HEIGHT // 2 * ONE
        column = (x - WIDTH // 2) * scale + WIDTH // 2 * ONE + 20000 * index
        top, left = (row // ONE).clip(0, HEIGHT - 2), (column // ONE).clip(0, WIDTH - 2)
        down, right = row // 256 % 256, column // 256 % 256  # weights of the lower and right neighbours, of 256
        upper = texture[top, left] * (256 - right) + texture[top, left + 1] * right
        lower = texture[top + 1, left] * (256 - right) + texture[top + 1, left + 1] * right
        planes = np.full((HEIGHT * 3 // 2, WIDTH), 128, np.uint8)
        planes[:HEIGHT] = (upper * (256 - down) + lower * down) // ONE
        yield VideoFrame.from_ndarray(planes, format="yuv420p")
