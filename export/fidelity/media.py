"""Golden cases of media (k, l, m), all on the host: pictures, motion vectors, clips of a real video, token clean-up."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame

from export.fidelity.golden import Golden
from export.fidelity.measure import Measurement, close, equal, pictures, relative, within
from runtime.images import resize_image, to_signed, tokenizer_pixels
from runtime.motion.clips import understanding_starts
from runtime.motion.grid import HOLE, HOLE_LIMIT, deviation, grid_shape, macroblock_grid, model_motion
from runtime.motion.mpeg4 import VectorDecoder, motion_vectors, rgb
from runtime.vocabulary import Vocabulary

PIXELS, MOTION, STATISTICS, ONE_ROUNDING = 1e-5, 1e-5, 0.05, 1e-7
IMAGE_SIZE = 224  # side of the tokenizer's pixels in video cases, whose files do not say
FIELDS = (
    *("source", "w", "h", "src_x", "src_y", "dst_x", "dst_y"),
    *("motion_x", "motion_y", "motion_scale"),
)


def image_processor(golden: Golden) -> Iterator[Measurement]:
    """Picture to pixels of the visual tokenizer (reference semantics §11.5)."""
    side = golden.config["image_size"]
    for index, image in enumerate(golden.listed(golden.inputs, "rgb_u8")):
        resized = golden.outputs[f"resized_u8_{index}"]
        yield pictures("resized picture", resize_image(image, (side, side)), resized)
        yield close("pixels", tokenizer_pixels(image, side), golden.outputs[f"pixels_{index}"], PIXELS)


def extracted_motion(golden: Golden) -> Iterator[Measurement]:
    """Vectors of single frames to macroblock grids at both scales (§11.2).

    The reference fills a map of every pixel; ours goes to the grid at once, so the stored map is pooled.
    """
    height, width = golden.config["H"], golden.config["W"]
    for name in golden.outputs:
        found = re.fullmatch(r"rescale_(True|False)/frame(\d+)_yx", name)
        if found:
            frame, rescale = int(found[2]), found[1] == "True"
            yx, value = golden.outputs[name], golden.outputs[name.replace("_yx", "_value")]
            grid = macroblock_grid(_structured(golden.inputs[f"frame{frame}_mvs"]), width, height, rescale)
            expected = _pooled(yx, value, width, height)
            yield relative("macroblock grid", grid, expected.astype(np.float32), ONE_ROUNDING)
    for name, image in golden.inputs.items():
        if name.endswith("_bgr_u8"):
            stored = golden.outputs[name.replace("bgr", "rgb")]
            yield equal("colours", rgb(VideoFrame.from_ndarray(image, "bgr24")), stored)


def motion_processor(golden: Golden) -> Iterator[Measurement]:
    """Dense motion of a clip to the model's motion input (§11.3)."""
    c = golden.config
    index, value = golden.inputs["motions_hit_index"], golden.inputs["motions_hit_value"]
    grids = np.stack(
        [_grid_of(index[index[:, 0] == t, 1:], value[index[:, 0] == t], c["W"], c["H"]) for t in range(c["T"])]
    )
    whole = model_motion(grids, grids.shape[2:]).transpose(1, 0, 2, 3)
    yield close("macroblock grid", whole, golden.outputs["pooled_grid_with_13th_frame"], MOTION)
    for name, expected in golden.outputs.items():
        size = re.fullmatch(r"motion_(\d+)x(\d+)_antialias_False", name)
        if size:
            yield close("model motion", model_motion(grids, (int(size[1]), int(size[2]))), expected, MOTION)


def video(golden: Golden) -> Iterator[Measurement]:
    """A stored re-encoded video: frame types, grids of all frames, chosen clips, their motion and key frames (§11)."""
    outputs = golden.outputs
    first, *others = streams(golden)
    yield from _frames(golden, first)
    for other in others:
        yield from _frames(golden, other)
    keyframes = [i for i, frame in enumerate(first.frames) if frame.key_frame]
    yield equal("I frames", keyframes, outputs["i_frame_indices"])
    length, size = outputs["motion_final"].shape[2], outputs["motion_final"].shape[-2:]
    total = len(first.frames)
    starts: list[int] = []  # of the clips whose motion is stored
    for name, expected in outputs.items():
        if name.startswith("selected_indices_max"):
            most = int(name.removeprefix("selected_indices_max"))
            chosen = understanding_starts(keyframes, total, most, length)
            yield equal("chosen clips", chosen, expected)
            starts = chosen if len(chosen) == len(outputs["motion_final"]) else starts
    clips = [first.clip(start, length) for start in starts]
    for index, clip in enumerate(clips):
        if f"clip{index}_pooled_grid" in outputs:
            yield close("grid of a clip", clip, outputs[f"clip{index}_pooled_grid"], MOTION)
    yield close("model motion", np.stack([model_motion(clip, size) for clip in clips]), outputs["motion_final"], MOTION)
    images = [rgb(first.frames[start]) for start in starts]
    yield within("key frames, mean", [_channels(x).mean(0) for x in images], outputs["keyframe_mean_rgb"], STATISTICS)
    yield within(
        "key frames, deviation", [_channels(x).std(0) for x in images], outputs["keyframe_std_rgb"], STATISTICS
    )
    pixels = [tokenizer_pixels(image, IMAGE_SIZE).reshape(3, -1) for image in images]
    yield within("pixels, mean", [x.mean(1) for x in pixels], outputs["keyframe_visual_mean"], STATISTICS)
    yield within("pixels, deviation", [x.std(1) for x in pixels], outputs["keyframe_visual_std"], STATISTICS)


def token_clean_up(golden: Golden) -> Iterator[Measurement]:
    """Generated ids to exactly a clip's codes, key frames to the detokenizer's range (§12.5, §12.2)."""
    expected = golden.outputs["motion_codes"]  # [n, K]
    for ids, codes in zip(golden.listed(golden.inputs, "motion_tokens"), expected, strict=True):
        yield equal("motion codes", Vocabulary().motion_codes_of(ids, len(codes)), codes)
    signed = np.stack([to_signed(frame) for frame in golden.inputs["key_frames_u8"]])
    yield close("key frames", signed, golden.outputs["key_frame_tensor"], PIXELS)


@dataclass(frozen=True)
class Stream:
    """A re-encoded video beside the golden file. `suffix`: of what the golden file holds about it."""

    path: Path
    suffix: str

    @property
    def rescale(self) -> bool:
        return not self.suffix  # the tokenizer's scale for the first stream, the detokenizer's for others

    @cached_property
    def frames(self) -> list[Any]:
        """Decoded frames, in order; pixels of I frames only."""
        with av.open(str(self.path)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
            return list(VectorDecoder(pixels_of_p_frames=False).decode(packets))

    @cached_property
    def grids(self) -> list[np.ndarray]:
        return [macroblock_grid(motion_vectors(f), f.width, f.height, self.rescale) for f in self.frames]

    def clip(self, start: int, length: int) -> np.ndarray:
        """Grids [T, 2, rows, columns] of the frames from `start` on; zero behind the video's end."""
        found = self.grids[start : start + length]
        return np.stack(found + [np.zeros_like(found[0])] * (length - len(found)))


def streams(golden: Golden) -> list[Stream]:
    """The re-encoded streams of a video case, named after the recorded command lines."""
    return [Stream(golden.path.parent / name, suffix) for name, suffix in stream_names(golden.meta)]


def stream_names(meta: dict[str, Any]) -> list[tuple[str, str]]:
    """(path below the golden folder, suffix) of every stream of a video case."""
    found: list[tuple[str, str]] = []
    for command in meta["commands"]:
        name, fps = re.search(r"-i (\S+)\.\w+ .*fps=(\d+)", command).groups()  # type: ignore[union-attr]
        found.append((f"media/{Path(name).name}_fps{fps}_mpeg4.m4v", f"_fps{fps}" if found else ""))
    return found


def _frames(golden: Golden, stream: Stream) -> Iterator[Measurement]:
    kinds = ["I" if frame.key_frame else "P" for frame in stream.frames]
    yield equal("frame types", kinds, list(golden.meta[f"frame_types{stream.suffix}"]))
    digests = [hashlib.sha256(grid.astype("<f4").tobytes()).hexdigest() for grid in stream.grids]
    yield equal("grids of all frames", digests, golden.meta[f"pooled_sha256{stream.suffix}"])
    positions = [_positions(frame) for frame in stream.frames]
    name = f"{stream.suffix.removeprefix('_')}_mv_positions" if stream.suffix else "mv_rows_per_frame_positions"
    if name in golden.outputs:
        yield equal("places with vectors", positions, golden.outputs[name])


def _positions(frame: Any) -> int:
    """How many pixels of a frame have a vector."""
    vectors = motion_vectors(frame)
    if not len(vectors):
        return 0
    x = np.clip(vectors["dst_x"].astype(np.int64), 0, frame.width - 1)
    y = np.clip(vectors["dst_y"].astype(np.int64), 0, frame.height - 1)
    return len(np.unique(y * frame.width + x))


def _structured(rows: np.ndarray) -> np.ndarray:
    """Rows [n, 10] of the reference's extractor as FFmpeg's motion vectors."""
    return np.array([tuple(row) for row in rows], dtype=[(name, "<i4") for name in FIELDS])


def _pooled(yx: np.ndarray, value: np.ndarray, width: int, height: int) -> np.ndarray:
    """Values [n, 2] at pixels [n, 2] -> grid [2, rows, columns], largest of every macroblock, holes zero."""
    rows, columns = grid_shape(width, height)
    grid = np.full((2, rows, columns), HOLE)
    for component, values in zip(grid, value.T, strict=True):
        np.maximum.at(component, (yx[:, 0] // 16, yx[:, 1] // 16), values)
    return np.where(grid < HOLE_LIMIT, 0, grid)


def _grid_of(yx: np.ndarray, value: np.ndarray, width: int, height: int) -> np.ndarray:
    """Grid of already normalised values [n, 2] at pixels [n, 2]: the vectors that have them go through the runtime."""
    vectors = np.zeros(len(yx), dtype=[(name, "<f8") for name in FIELDS])
    vectors["dst_y"], vectors["dst_x"] = yx.T
    vectors["source"] = vectors["motion_scale"] = 1
    vectors["motion_x"], vectors["motion_y"] = (value * deviation(False) * (width, height)).T
    return macroblock_grid(vectors, width, height, rescale=False)


def _channels(image: np.ndarray) -> np.ndarray:
    return image.reshape(-1, 3).astype(np.float64)
