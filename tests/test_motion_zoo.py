"""Motion of every kind of video (`media_zoo.ZOO`): what holds for all of them."""

from fractions import Fraction

import media_zoo
import motion_parity
import numpy as np
import pytest
from golden import FOLDER

from runtime.decoding import open_video
from runtime.motion import sources
from runtime.motion.grid import macroblock_grid
from runtime.motion.mpeg4 import MotionSettings, VectorDecoder, encode, motion_vectors, reencode
from runtime.video import probe

RATE = Fraction(6)
LUMA = np.array([0.299, 0.587, 0.114])
every_video = pytest.mark.parametrize("name", media_zoo.ZOO)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return tmp_path_factory.mktemp("zoo")


def test_zoo_is_large():
    assert len(media_zoo.ZOO) >= 40


@every_video
def test_frames_and_clips(name, zoo):
    path, expected = media_zoo.specimen(name, zoo), media_zoo.ZOO[name]
    frames = list(sources.frames(path, MotionSettings(), images=True))
    width, height = expected.size
    assert len(frames) == expected.count
    assert [f.index for f in frames] == list(range(expected.count)) and frames[0].kind == "I"
    for frame in frames:
        assert (frame.width, frame.height) == expected.size and frame.image.shape == (height, width, 3)
        assert (frame.grid is None) == (frame.kind == "I")
        if frame.grid is not None:
            assert frame.grid.shape == (2, -(-height // 16), -(-width // 16)) and np.isfinite(frame.grid).all()
    still = np.zeros((2, -(-height // 16), -(-width // 16)), np.float32)
    for clip in sources.understanding_clips(path, MotionSettings()):
        part = frames[clip.frame_index : clip.frame_index + 24]
        np.testing.assert_array_equal(clip.keyframe, part[0].image)
        grids = [still if f.grid is None else f.grid for f in part]
        np.testing.assert_array_equal(clip.grid, grids + [still] * (24 - len(part)))
        assert clip.exact
    info = probe(path)
    assert (info.width, info.height) == expected.size


@every_video
def test_first_frame_is_the_scene(name, zoo):
    """Upright, in its colours and not mixed with another: rotation, range, chroma and depth are undone."""
    specimen = media_zoo.ZOO[name]
    path = media_zoo.specimen(name, zoo)
    image = next(sources.frames(path, MotionSettings(), images=True)).image.astype(np.float64)
    grey = name.startswith("grey")
    near = []
    for index in range(10 if max(specimen.size) < 1000 else 1):  # any source frame of the first slot
        scene = specimen.shown(index).astype(np.float64)
        near.append(np.abs(image - (scene @ LUMA)[..., None] if grey else image - scene).mean())
    assert min(near) < 8


@every_video
def test_grids_follow_the_dense_definition(name, zoo):
    path = media_zoo.specimen(name, zoo)
    for frame in VectorDecoder(pixels_of_p_frames=False).decode(reencode(path, MotionSettings())):
        vectors = motion_vectors(frame)
        rows = [vectors[c].astype(np.int64) for c in motion_parity.COLUMNS] if len(vectors) else np.zeros((10, 0), int)
        expected = motion_parity.dense_grid(np.stack(rows, 1), frame.width, frame.height)
        np.testing.assert_array_equal(macroblock_grid(vectors, frame.width, frame.height, True), expected)


@every_video
def test_streaming_equals_whole_file_and_threads_change_nothing(name, zoo):
    path = media_zoo.specimen(name, zoo)
    streamed = [bytes(packet) for packet in reencode(path, MotionSettings())]
    with open_video(path) as source:
        source.stream.codec_context.thread_count = 4
        source.stream.codec_context.thread_type = "AUTO"
        whole = list(source.frames_at(RATE))
    assert [bytes(packet) for packet in encode(whole, MotionSettings())] == streamed


@every_video
def test_parts_equal_the_whole(name, zoo):
    """Any part of a video, sought, has the frames that reading all of it gives."""
    path, count = media_zoo.specimen(name, zoo), media_zoo.ZOO[name].count
    with open_video(path) as source:
        span = source.span()
    if span is None:
        assert name.startswith(("no_time_stamps", "resized")), "only these cannot be sought"
        return
    with open_video(path) as source:
        whole = [picture(f) for f in source.frames_at(RATE)]
    with open_video(path) as source:
        for first in sorted({count - 1, count // 2, 2, 1, 0}, reverse=True):
            found = [picture(f) for f in source.frames_between(RATE, first, first + 3)]
            assert found == whole[first : first + 3], first


def picture(frame):
    """Pixels of all planes, without what pads their lines."""
    planes = [
        np.frombuffer(p, np.uint8).reshape(p.height, p.line_size) for p in frame.reformat(format="yuv420p").planes
    ]
    return [plane[:, : -(-frame.width // (1 if i == 0 else 2))].tobytes() for i, plane in enumerate(planes)]


needs_reference = pytest.mark.skipif(
    motion_parity.reference_python() is None,
    reason=f"needs ffmpeg, and motion-vector-extractor here or in the Python named by {motion_parity.VARIABLE}",
)


@needs_reference
@every_video
def test_equals_the_ffmpeg_command_line(name, zoo, tmp_path):
    agreement = motion_parity.compare(media_zoo.specimen(name, zoo), motion_parity.reference_python(), tmp_path)
    assert agreement.exact, agreement


@needs_reference
def test_real_video_equals_the_ffmpeg_command_line(tmp_path):
    video = FOLDER.parent / "media" / "video7013.mp4"
    agreement = motion_parity.compare(video, motion_parity.reference_python(), tmp_path)
    assert agreement.exact, agreement
