"""Motion of real, odd and damaged files."""

import gc
import hashlib
import os
import platform
import zipfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import media_zoo
import numpy as np
import pytest
from click.testing import CliRunner
from golden import FOLDER, assert_close, load
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import decoding
from runtime.errors import MediaError, UsageError
from runtime.frame_rate import Timed, at_rate
from runtime.geometry import Geometry
from runtime.media import load_media
from runtime.motion import mpeg4, selftest, sources, sparse
from runtime.motion.commands import motion
from runtime.motion.grid import macroblock_grid, model_motion
from runtime.motion.mpeg4 import MotionSettings, VectorDecoder, encode, motion_vectors, reencode, rgb
from runtime.video import read_frames

VIDEO = FOLDER.parent / "media" / "video7013.mp4"
REFERENCE = MotionSettings(slices=3)  # what ffmpeg took where the golden numbers were made


@pytest.fixture(scope="session")
def zoo(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("zoo")


def digest(grid):
    return hashlib.sha256(np.ascontiguousarray(grid, dtype="<f4").tobytes()).hexdigest()


def digests(frames):
    return [digest(f.grid if f.grid is not None else np.zeros((2, 15, 20), np.float32)) for f in frames]


@pytest.mark.parametrize(("fps", "rescale", "suffix"), [(6, True, ""), (12, False, "_fps12")])
def test_stored_stream_gives_the_reference_grids(fps, rescale, suffix):
    meta = load("l_video_video7013").meta
    with av.open(str(FOLDER / "media" / f"video7013_fps{fps}_mpeg4.m4v")) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        decoded = list(VectorDecoder(pixels_of_p_frames=False).decode(packets))
    found = [digest(macroblock_grid(motion_vectors(f), f.width, f.height, rescale)) for f in decoded]
    assert "".join("I" if f.key_frame else "P" for f in decoded) == meta[f"frame_types{suffix}"]
    assert found == meta[f"pooled_sha256{suffix}"]


@pytest.mark.parametrize(("fps", "rescale", "suffix"), [(6, True, ""), (12, False, "_fps12")])
def test_whole_path_gives_the_reference_grids(fps, rescale, suffix):
    meta = load("l_video_video7013").meta
    frames = list(sources.frames(VIDEO, MotionSettings(fps=fps, slices=3, rescale=rescale)))
    assert "".join(f.kind for f in frames) == meta[f"frame_types{suffix}"]
    assert digests(frames) == meta[f"pooled_sha256{suffix}"]


def test_understanding_clips_equal_the_reference():
    golden = load("l_video_video7013")
    clips = sources.understanding_clips(VIDEO, REFERENCE, max_clips=8)
    assert [c.frame_index for c in clips] == golden.outputs["selected_indices_max8"].tolist()
    assert_close(np.stack([model_motion(c.grid, (20, 36)) for c in clips]), golden.outputs["motion_final"], 1e-5)
    for k in (0, 1):
        assert_close(clips[k].grid, golden.outputs[f"clip{k}_pooled_grid"], 1e-6)
    pixels = np.stack([c.keyframe.reshape(-1, 3) for c in clips]).astype(np.float64)
    assert_close(pixels.mean(1), golden.outputs["keyframe_mean_rgb"], 0.05)
    assert_close(pixels.std(1), golden.outputs["keyframe_std_rgb"], 0.05)


@pytest.fixture(scope="module")
def long_video(zoo):
    """A minute, with a key frame every two seconds."""
    return media_zoo.make(zoo / "long.mp4", frames=720, size=(160, 96), rate=12, options={"g": "24"})


@pytest.fixture
def encoded_frames(monkeypatch):
    """Number of frames in every run of the encoder."""
    counts = []

    def counted(frames, *arguments):
        counts.append(0)
        for packet in encode(frames, *arguments):
            counts[-1] += 1
            yield packet

    monkeypatch.setattr(mpeg4, "encode", counted)
    monkeypatch.setattr(sparse, "encode", counted)
    return counts


def assert_same_clips(found, expected):
    assert [c.frame_index for c in found] == [c.frame_index for c in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.grid, b.grid)
        np.testing.assert_array_equal(a.keyframe, b.keyframe)


def test_clips_that_were_not_held_are_encoded_again_and_alone(monkeypatch, long_video, encoded_frames):
    held = sources.understanding_clips(long_video, MotionSettings(), max_clips=2)
    monkeypatch.setattr(sources, "HELD_BYTES", 0)
    again = sources.understanding_clips(long_video, MotionSettings(), max_clips=2)
    assert_same_clips(again, held)
    assert encoded_frames == [360, 360, 36, 60] and all(c.exact for c in again)


@pytest.mark.parametrize("damage", ["other frames", "no frames", "error"])
def test_clips_encoded_again_are_checked(damage, monkeypatch, long_video, encoded_frames):
    held = sources.understanding_clips(long_video, MotionSettings(), max_clips=2)

    def wrong(source, settings, parts):
        if damage == "error":
            raise MediaError("cannot be read from the middle")
        packets = sparse.encoded(source, settings, parts)
        return ((index - 1, packet) for index, packet in packets) if damage == "other frames" else iter(())

    monkeypatch.setattr(sources, "HELD_BYTES", 0)
    monkeypatch.setattr(sources, "encoded", wrong)
    assert_same_clips(sources.understanding_clips(long_video, MotionSettings(), max_clips=2), held)
    assert encoded_frames[:2] == [360, 360] and encoded_frames[-1] >= 324  # read as a whole, up to the last clip


def test_overlapping_clips_are_cut_alike(monkeypatch, zoo):
    path = media_zoo.make(zoo / "cuts.mp4", frames=90, rate=6, cut=31)
    held = sources.understanding_clips(path, MotionSettings(), 8, frames_per_clip=40)
    monkeypatch.setattr(sources, "HELD_BYTES", 0)
    again = sources.understanding_clips(path, MotionSettings(), 8, frames_per_clip=40)
    assert len(held) > 1
    assert_same_clips(again, held)


def test_sparse_clips_equal_those_of_the_whole_video(long_video, encoded_frames):
    whole = sources.understanding_clips(long_video, MotionSettings(), max_clips=3)
    found = sources.understanding_clips(long_video, MotionSettings(sparse=True), max_clips=3)
    assert_same_clips(found, whole)
    assert encoded_frames == [360, 36, 60, 60]
    assert all(c.exact for c in whole) and not any(c.exact for c in found)


def test_sparse_reads_a_short_or_untimed_video_as_a_whole(zoo):
    for path in (VIDEO, media_zoo.make(zoo / "untimed.h264", frames=400, rate=6)):
        found = sources.understanding_clips(path, MotionSettings(sparse=True), max_clips=2)
        assert_same_clips(found, sources.understanding_clips(path, MotionSettings(), max_clips=2))
        assert all(c.exact for c in found)


def test_sparse_keeps_its_places_where_a_cut_moves_the_groups(zoo):
    path = media_zoo.make(zoo / "moved.mp4", frames=300, rate=6, cut=103)
    whole = sources.understanding_clips(path, MotionSettings(), max_clips=2)
    found = sources.understanding_clips(path, MotionSettings(sparse=True), max_clips=2)
    assert [c.frame_index for c in whole] == [12, 259]
    assert [c.frame_index for c in found] == [12, 276] and not any(c.exact for c in found)


@pytest.mark.parametrize(
    ("starts", "warm_up", "expected"),
    [
        ([12], 36, [(0, 36, (12,))]),
        ([120], 36, [(84, 144, (120,))]),
        ([120], 30, [(84, 144, (120,))]),  # back to a key frame
        ([120], 0, [(120, 144, (120,))]),
        ([120, 168], 36, [(84, 192, (120, 168))]),  # they meet
        ([120, 288], 36, [(84, 144, (120,)), (252, 300, (288,))]),
    ],
)
def test_stretches(starts, warm_up, expected):
    found = sparse.stretches(starts, 24, warm_up, range(0, 300, 12), 300)
    assert [(s.first, s.last, s.starts) for s in found] == expected


def test_reconstruction_clips_are_consecutive_and_lazy():
    settings_ = MotionSettings(fps=12, rescale=False)
    clips = list(sources.reconstruction_clips(VIDEO, settings_))
    assert [c.frame_index for c in clips] == [0, 24, 48, 72, 96, 120, 144]
    whole = list(sources.frames(VIDEO, settings_, images=True))
    for clip in clips:
        part = whole[clip.frame_index : clip.frame_index + 24]
        np.testing.assert_array_equal(clip.keyframe, part[0].image)
        for grid, frame in zip(clip.grid, part, strict=True):
            np.testing.assert_array_equal(grid, frame.grid if frame.grid is not None else np.zeros_like(grid))
    later = next(sources.reconstruction_clips(VIDEO, settings_, start_s=2.5))
    assert (later.frame_index, later.time_s) == (36, 3.0)
    with pytest.raises(MediaError, match=r"too short.*192 frames at 12"):
        next(sources.reconstruction_clips(VIDEO, settings_, start_s=14))


def test_scene_cut_starts_a_group_and_is_avoided(zoo):
    path = media_zoo.make(zoo / "cut.mp4", frames=90, rate=12, cut=19)
    kinds = "".join(f.kind for f in sources.frames(path, MotionSettings(fps=12)))
    assert kinds[:13] == "I" + "P" * 11 + "I" and kinds[19] == "I"
    assert [c.frame_index for c in sources.reconstruction_clips(path, MotionSettings(fps=12))] == [0, 31, 55]


def test_skipped_source_frames_change_nothing(monkeypatch, zoo):
    path = media_zoo.make(zoo / "b_frames.mp4", frames=200, size=(160, 96), options={"bf": "3", "b-adapt": "0"})
    fast = [(f.kind, f.image.tobytes(), f.grid) for f in sources.frames(path, MotionSettings(), images=True)]
    marks = []
    mark = decoding._mark_unused
    monkeypatch.setattr(
        decoding, "_mark_unused", lambda *a: (marks.append(unused) or (p, unused) for p, unused in mark(*a))
    )
    list(sources.frames(path, MotionSettings()))
    assert sum(marks) > 100
    monkeypatch.setattr(decoding, "SKIPPABLE", frozenset())
    slow = [(f.kind, f.image.tobytes(), f.grid) for f in sources.frames(path, MotionSettings(), images=True)]
    assert [a[:2] for a in fast] == [b[:2] for b in slow]
    for (_, _, a), (_, _, b) in zip(fast, slow, strict=True):
        np.testing.assert_array_equal(a, b)


def test_frames_are_freed_as_they_are_read(zoo):
    path = media_zoo.make(zoo / "heavy.mp4", frames=60, size=(1280, 720), rate=6, options={"preset": "ultrafast"})
    gc.disable()  # or it would hide pixels that only it can free
    try:
        before = resident_bytes()
        assert sum(1 for _ in sources.frames(path, MotionSettings())) == 60
        grown = resident_bytes() - before
    finally:
        gc.enable()
    assert grown < 90 << 20  # the codecs' own buffers; 60 frames of source and result would be 158 MiB


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_concurrent_reading_gives_the_same():
    alone = digests(sources.frames(VIDEO, MotionSettings()))
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: digests(sources.frames(VIDEO, MotionSettings())), range(3))) == [alone] * 3


def test_slices_change_vectors_only():
    one, three = (list(sources.frames(VIDEO, MotionSettings(slices=n), images=True)) for n in (1, 3))
    assert digests(one) != digests(three)
    assert [f.kind for f in one] == [f.kind for f in three]
    np.testing.assert_array_equal(one[12].image, three[12].image)


def test_motion_points_where_things_move(zoo):
    path = media_zoo.make(zoo / "drift.mp4", frames=30, rate=6)
    grids = [f.grid for f in sources.frames(path, MotionSettings()) if f.grid is not None]
    assert np.median([g[0, :, 2:] for g in grids]) == pytest.approx(2 / 96 / 0.00993703, rel=0.3)  # 2 pixels right


@given(st.lists(st.fractions(0, 3, max_denominator=1000), min_size=1, max_size=30), st.sampled_from([6, 12]))
@settings(max_examples=80, deadline=None)
def test_rate_fills_each_slot_with_the_latest_frame(times, rate):
    times = sorted(times)
    end = times[-1] + Fraction(1, 3)
    chosen = list(at_rate((Timed(i, t, t + Fraction(1, 3)) for i, t in enumerate(times)), Fraction(rate)))
    nearest = [int(t * rate + Fraction(1, 2)) for t in times]  # halves away from zero
    assert len(chosen) == int(end * rate + Fraction(1, 2))
    for slot_, index in enumerate(chosen):
        assert index == max(i for i, n in enumerate(nearest) if n <= max(slot_, nearest[0]))


def test_settings_are_checked():
    for wrong in ({"fps": 0}, {"fps": 5000}, {"slices": 0}, {"slices": 17}, {"warm_up": -1}):
        with pytest.raises(UsageError):
            MotionSettings(**wrong)


def test_command_writes_archive_and_overlay(tmp_path):
    archive, overlay = tmp_path / "motion.npz", tmp_path / "arrows.mp4"
    arguments = [str(VIDEO), "-o", str(archive), "--overlay", str(overlay), "--slices", "3"]
    result = CliRunner().invoke(motion, arguments)
    assert result.exit_code == 0, result.output
    assert "84 (320x240)" in result.stdout
    with np.load(archive, allow_pickle=False) as stored:
        assert [digest(g) for g in stored["grids"]] == load("l_video_video7013").meta["pooled_sha256"]
        assert "".join(stored["types"]) == load("l_video_video7013").meta["frame_types"]
        np.testing.assert_allclose(stored["times"][:3], [0, 1 / 6, 2 / 6])
    drawn = list(read_frames(overlay))
    plain = [f.image for f in sources.frames(VIDEO, REFERENCE, images=True)]
    assert len(drawn) == 84
    red, green, _ = drawn[12][2, 160].astype(int)
    assert red > green + 80  # the border of a key frame
    assert np.abs(drawn[30].astype(int) - plain[30]).mean() > 2
    before = archive.read_bytes()
    again = CliRunner().invoke(motion, arguments)
    assert isinstance(again.exception, UsageError) and "--force" in str(again.exception)
    assert archive.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["arrows.mp4", "motion.npz"]
    assert zipfile.ZipFile(archive).testzip() is None


def test_sparse_command_stores_the_clips_and_marks_them(tmp_path):
    video = media_zoo.make(tmp_path / "long.mp4", frames=840, size=(64, 48), rate=6, options={"g": "24"})
    archive = tmp_path / "motion.npz"
    result = CliRunner().invoke(motion, [str(video), "-o", str(archive), "--sparse"])
    assert result.exit_code == 0, result.output
    assert "not checked to be exact" in result.stdout
    clips = sources.understanding_clips(video, MotionSettings())
    times = np.concatenate([clip.time_s + np.arange(24) / 6 for clip in clips])
    with np.load(archive, allow_pickle=False) as stored:
        assert not stored["exact"] and '"sparse": true' in str(stored["settings"])
        np.testing.assert_allclose(stored["times"], times)
        np.testing.assert_array_equal(stored["grids"], np.concatenate([clip.grid for clip in clips]))
    # A short video is read as a whole, and then the result is exact.
    result = CliRunner().invoke(motion, [str(VIDEO), "-o", str(archive), "--sparse", "--force", "--slices", "3"])
    assert "(exact)" in result.stdout and "84 (320x240)" in result.stdout
    with np.load(archive, allow_pickle=False) as stored:
        assert stored["exact"]
        assert [digest(g) for g in stored["grids"]] == load("l_video_video7013").meta["pooled_sha256"]


@pytest.mark.parametrize("arguments", [["clip.mp4", "--source", "codec"], ["tcp://127.0.0.1:9"]])
def test_sparse_is_for_files_that_are_encoded(arguments):
    result = CliRunner().invoke(motion, [*arguments, "--sparse"])
    assert isinstance(result.exception, UsageError) and "--sparse" in str(result.exception)


def test_sparse_media_says_so(long_video):
    geometry = Geometry()
    whole, found = (load_media(str(long_video), geometry, 3, sparse=sparse) for sparse in (False, True))
    assert whole.exact and not found.exact
    np.testing.assert_array_equal(found.motions, whole.motions)


def test_failed_command_leaves_nothing(tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(bytes(100))
    result = CliRunner().invoke(
        motion, [str(broken), "-o", str(tmp_path / "m.npz"), "--overlay", str(tmp_path / "o.mp4")]
    )
    assert isinstance(result.exception, MediaError)
    assert [p.name for p in tmp_path.iterdir()] == ["broken.mp4"]


def test_packets_are_one_a_frame_and_say_their_type():
    packets = list(reencode(VIDEO, MotionSettings()))
    decoded = list(VectorDecoder(pixels_of_p_frames=True).decode(packets))
    assert [p.is_keyframe for p in packets] == [f.key_frame for f in decoded]
    assert rgb(decoded[0]).shape == (240, 320, 3)


def test_selftest_notices_another_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = selftest.encoder_is_exact()
    monkeypatch.setattr(selftest, "MotionSettings", lambda slices: MotionSettings(slices=3))
    assert not selftest.encoder_is_exact(), "three slices give other vectors"
    if platform.machine() == "x86_64" and av.__version__.startswith(("15.1", "17.0")):
        assert exact
