"""The reference's way to a video's motion: the ffmpeg command line, then motion-vector-extractor, then dense maps.

Contract: reference semantics §11.1 to §11.4 as they stand there, with nothing saved: every frame's pixels and a dense
float64 map of its vectors are held until the clips are chosen. Runs alone, in any environment that has numpy and
motion-vector-extractor, with `ffmpeg` on the path; it shares no code with the runtime, so that it can judge
it.

    python motion_reference.py clips VIDEO           time the way to the clips; prints JSON
    python motion_reference.py dump VIDEO OUT.npz    store frame types, vectors and key frames for comparison
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from mvextractor.videocap import VideoCap
from usage import cpu_seconds, peak_kib

HOLE = -10000.0
DEVIATION = np.array([0.0993703, 0.1130276]) / 10
GROUP = 12


def reencode(video: Path, fps: str, target: Path) -> None:
    """§11.1: `-threads` before `-i` belongs to the decoder, the encoder takes ffmpeg's default."""
    command = ["ffmpeg", "-threads", "8", "-loglevel", "error", "-y", "-i", str(video)]
    command += ["-filter:v", f"fps={fps}", "-b:v", "8000k", "-c:v", "mpeg4", "-f", "rawvideo", str(target)]
    subprocess.run(command, check=True)  # noqa: S603


def extracted(stream: Path) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """(pixels BGR uint8 [H, W, 3], vectors int [N, 10], frame type) of every frame."""
    capture = VideoCap()
    if not capture.open(str(stream)):
        raise SystemExit(f"{stream}: cannot be opened")
    while True:
        found = capture.read()
        if not found[0]:
            break
        yield found[1], found[2], found[3]
    capture.release()


def dense_map(vectors: np.ndarray, height: int, width: int) -> np.ndarray:
    """§11.2: float64 [H, W, 2]; of several vectors at one pixel the last stays."""
    dense = np.full((height, width, 2), HOLE)
    if len(vectors):
        x = vectors[:, 5].clip(0, width - 1)
        y = vectors[:, 6].clip(0, height - 1)
        values = vectors[:, 0:1] * vectors[:, 7:9] / vectors[:, 9:10] / np.array([width, height])
        dense[y, x] = values / DEVIATION
    return dense


def pooled(maps: list[np.ndarray]) -> np.ndarray:
    """§11.3: float32 [T, 2, rows, columns] of the dense maps of a clip."""
    stack = np.stack(maps).transpose(0, 3, 1, 2).astype(np.float32)  # [T, 2, H, W]
    count, _, height, width = stack.shape
    padded = np.pad(stack, [(0, 0), (0, 0), (0, -height % 16), (0, -width % 16)], constant_values=HOLE)
    rows, columns = padded.shape[2] // 16, padded.shape[3] // 16
    # Rows first: numpy is quickest along whole lines, about as quick as torch's max-pool.
    bands = padded.reshape(count, 2, rows, 16, columns * 16).max(axis=3)
    grid = bands.reshape(count, 2, rows, columns, 16).max(axis=4)
    return np.where(grid < -1000, np.float32(0), grid)


def starts(types: list[str], max_clips: int, frames: int) -> list[int]:
    """§11.4."""
    keys = [i for i, kind in enumerate(types) if kind == "I"]
    kept = keys
    if len(keys) > 1:
        regular = [a for a, b in pairwise(keys) if b == a + GROUP]
        whole = [a for a in regular if a + frames <= len(types)]
        kept = whole if len(whole) >= 2 else keys
    if len(kept) / 2 <= max_clips:
        return kept[1::2] if len(kept) > 2 else kept[0::2]
    second = kept[1::2]
    if len(second) > max_clips:
        second = [second[int(i)] for i in np.linspace(0, len(second) - 1, max_clips)]
    return second


def clips(video: Path, fps: str = "6", max_clips: int = 8, frames: int = 24) -> list[tuple[np.ndarray, np.ndarray]]:
    """(key frame RGB, grids [T, 2, rows, columns]) of the clips chosen for understanding."""
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder) / f"{video.name.split('.')[0]}.mp4"
        reencode(video, fps, stream)
        pictures, motions, types = [], [], []
        for bgr, vectors, kind in extracted(stream):
            pictures.append(np.ascontiguousarray(bgr[..., ::-1]))
            motions.append(dense_map(vectors, *bgr.shape[:2]))
            types.append(kind)
    chosen = []
    for start in starts(types, max_clips, frames):
        part = motions[start : start + frames]
        part += [np.full_like(part[0], HOLE)] * (frames - len(part))
        chosen.append((pictures[start], pooled(part)))
    return chosen


def dump(video: Path, target: Path, fps: str = "6") -> None:
    """Frame types, every vector, and the pixels of key frames."""
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder) / "stream.mp4"
        reencode(video, fps, stream)
        types, counts, rows, pictures = [], [], [], []
        for bgr, vectors, kind in extracted(stream):
            types.append(kind)
            counts.append(len(vectors))
            rows.append(np.asarray(vectors).reshape(-1, 10))
            if kind == "I":
                pictures.append(bgr[..., ::-1])
    np.savez(
        target,
        types=np.array(types, dtype="U1"),
        counts=np.array(counts, dtype=np.int64),
        vectors=np.concatenate(rows) if rows else np.zeros((0, 10), np.int64),
        keyframes=np.stack(pictures) if pictures else np.zeros((0, 0, 0, 3), np.uint8),
    )


def main() -> None:
    task, video = sys.argv[1], Path(sys.argv[2])
    if task == "dump":
        dump(video, Path(sys.argv[3]))
        return
    before, began = cpu_seconds(), time.perf_counter()
    found = clips(video)
    result = {"wall_s": time.perf_counter() - began, "cpu_s": cpu_seconds() - before, "clips": len(found)}
    print(json.dumps(result | {"peak_kib": peak_kib()}))


if __name__ == "__main__":
    main()
