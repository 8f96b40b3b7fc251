"""The .npz file of a video's motion.

Contract: the file loads with `numpy.load(path)` and no pickle. Its arrays, for N frames:

- `grids` float32 [N, 2, rows, columns]: motion as in `runtime.motion`, zero in I frames;
- `types` one-letter strings [N]: `I` or `P`;
- `times` float64 [N]: seconds from the start of the video; these leap where a sparse reading left frames out;
- `size` int64 [2]: width and height, pixels;
- `deviation` float64 [2]: grids times this are shares of (width, height) per frame;
- `source`, `settings` strings: name of the video file or stream, and how it was read, as JSON;
- `motion_source` string and `exact` bool: `mpeg4`, `codec` or `nvdec` (`runtime.motion.select`), and whether the motion
  is that of the model's training encoder or only resembles it.

Grids go through a file on the way, so memory does not grow with the length of the video.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryFile
from typing import IO

import numpy as np

from runtime.files import check_output, published, writing
from runtime.motion.grid import deviation, grid_shape
from runtime.motion.mpeg4 import MotionSettings
from runtime.motion.select import MotionSource
from runtime.motion.sources import MotionFrame

SUFFIXES = (".npz",)


class MotionArchive:
    """Collects frames in `grids`, an open temporary file, and writes them to one file; use `open_archive`."""

    def __init__(self, grids: IO[bytes]) -> None:
        self._grids = grids
        self._types: list[str] = []
        self._times: list[float] = []
        self._size = (0, 0)

    def add(self, frame: MotionFrame) -> None:
        """Append one frame; all have the same size."""
        self._size = (frame.width, frame.height)
        grid = frame.grid if frame.grid is not None else np.zeros((2, *grid_shape(*self._size)), np.float32)
        self._grids.write(grid.astype("<f4").tobytes())
        self._types.append(frame.kind)
        self._times.append(frame.time_s)

    def write(self, target: Path, name: str, settings: MotionSettings, source: MotionSource) -> None:
        """Write everything added so far to `target`; `name` is the video's, `source` gave the frames."""
        shape = (len(self._types), 2, *grid_shape(*self._size))
        settings_ = {
            "fps": str(settings.rate),
            "slices": settings.slices,
            "rescale": settings.rescale,
            "sparse": settings.sparse,
        }
        small = {
            "types": np.array(self._types, dtype="U1"),
            "times": np.array(self._times, dtype=np.float64),
            "size": np.array(self._size, dtype=np.int64),
            "deviation": deviation(settings.rescale),
            "source": np.array(name),
            "motion_source": np.array(source.name),
            "exact": np.array(source.exact),
            "settings": np.array(json.dumps(settings_)),
        }
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("grids.npy", "w", force_zip64=True) as member:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_2_0(member, header)
                self._grids.seek(0)
                copyfileobj(self._grids, member)
            for name, array in small.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)


@contextmanager
def open_archive(
    path: Path, name: str, settings: MotionSettings, source: MotionSource, force: bool
) -> Iterator[MotionArchive]:
    """Yield an archive to add frames to; `path` appears when the block succeeds. UsageError if it cannot be written."""
    check_output(path, SUFFIXES, force)
    with TemporaryFile(dir=path.parent) as grids:
        archive = MotionArchive(grids)
        yield archive
        with published(path) as staging, writing(path):
            archive.write(staging, name, settings, source)
