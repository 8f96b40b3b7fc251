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
from runtime.errors import MediaError, UsageError, VideoLavitError
from runtime.frame_rate import Timed, at_rate
from runtime.motion import selftest, sources
from runtime.motion.commands import motion
from runtime.motion.grid import macroblock_grid, model_motion
from runtime.motion.mpeg4 import MotionSettings, VectorDecoder, motion_vectors, reencode, rgb
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


def test_clips_of_a_long_video_are_read_in_a_second_pass(monkeypatch):
    held = sources.understanding_clips(VIDEO, MotionSettings(), max_clips=2)
    monkeypatch.setattr(sources, "HELD_BYTES", 0)
    again = sources.understanding_clips(VIDEO, MotionSettings(), max_clips=2)
    assert [c.frame_index for c in held] == [c.frame_index for c in again]
    for a, b in zip(held, again, strict=True):
        np.testing.assert_array_equal(a.grid, b.grid)
        np.testing.assert_array_equal(a.keyframe, b.keyframe)


def test_overlapping_clips_are_cut_alike(monkeypatch, zoo):
    path = media_zoo.make(zoo / "cuts.mp4", frames=90, rate=6, cut=31)
    held = sources.understanding_clips(path, MotionSettings(), 8, frames_per_clip=40)
    monkeypatch.setattr(sources, "HELD_BYTES", 0)
    again = sources.understanding_clips(path, MotionSettings(), 8, frames_per_clip=40)
    assert len(held) > 1 and [c.frame_index for c in held] == [c.frame_index for c in again]
    for a, b in zip(held, again, strict=True):
        np.testing.assert_array_equal(a.grid, b.grid)


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
    path = media_zoo.make(zoo / "long.mp4", frames=60, size=(1280, 720), rate=6, options={"preset": "ultrafast"})
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


# frames, kind of file -> frames at 6 per second. Counts and choices were compared with the ffmpeg command line.
VFR = [0, 20, 50, 55, 60, 300, 310, 800, 810, 1600, 1650, 1700, 1710, 1720, 2500]
X265 = {"x265-params": "log-level=none"}
ZOO = {
    "ntsc.mp4": ({"rate": Fraction(24000, 1001)}, 15),
    "fast.mp4": ({"rate": Fraction(60000, 1001), "frames": 100}, 10),
    "slow.mp4": ({"rate": 3, "frames": 12}, 24),
    "odd.mkv": ({"size": (97, 63), "codec": "ffv1"}, 12),
    "odd444.mkv": ({"size": (97, 63), "codec": "ffv1", "pix_fmt": "yuv444p"}, 12),
    "vfr.mkv": ({"frames": len(VFR), "times": VFR}, 15),
    "late.mp4": ({"frames": 30, "times": [1500 + 33 * i for i in range(30)], "audio": True}, 15),
    "late_alone.mkv": ({"frames": 30, "times": [1500 + 33 * i for i in range(30)]}, 6),
    "stream.ts": ({"audio": True}, 12),
    "program.mpg": ({"codec": "mpeg2video", "rate": 25}, 14),
    "no_time_stamps.h264": ({"rate": 25}, 14),
    "old.avi": ({"codec": "mpeg4", "options": {"bf": "2"}}, 12),
    "full_range.avi": ({"codec": "mjpeg", "pix_fmt": "yuvj420p"}, 12),
    "ten_bit.mp4": ({"codec": "libx265", "pix_fmt": "yuv420p10le", "options": X265}, 12),
    "alpha.mkv": ({"codec": "ffv1", "pix_fmt": "bgra"}, 12),
    "moving.gif": ({"codec": "gif", "pix_fmt": "rgb8", "rate": 10, "frames": 20}, 12),
    "portrait.webm": ({"codec": "libvpx-vp9", "size": (48, 112), "frames": 20, "rate": 10}, 12),
}


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name, zoo):
    given_, count = ZOO[name]
    path = media_zoo.make(zoo / name, **given_)
    frames = list(sources.frames(path, MotionSettings(), images=True))
    width, height = given_.get("size", (96, 64))
    assert len(frames) == count
    assert frames[0].kind == "I" and frames[0].grid is None
    assert frames[0].image.shape == (height, width, 3)
    first = frames[0].image.astype(int)
    assert min(np.abs(first - media_zoo.scene(i, width, height)).mean() for i in range(10)) < 8
    moving = [f.grid for f in frames if f.grid is not None]
    assert all(g.shape == (2, -(-height // 16), -(-width // 16)) and np.isfinite(g).all() for g in moving)
    clips = sources.understanding_clips(path, MotionSettings())
    assert clips[0].grid.shape == (24, *moving[0].shape) and not clips[0].grid[count - clips[0].frame_index :].any()


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_comes_before_everything(degrees, mirrored, zoo):
    path = media_zoo.rotated(zoo / f"turned{degrees}{mirrored}.mp4", degrees, mirrored, frames=10, rate=6)
    shown = media_zoo.scene(0, 96, 64)
    shown = np.rot90(shown, -degrees // 90)
    if mirrored:  # the header's matrix mirrors x after the turn
        shown = shown[:, ::-1]
    for image in (next(sources.frames(path, MotionSettings(), images=True)).image, next(read_frames(path))):
        assert image.shape == shown.shape
        assert np.abs(image.astype(int) - shown).mean() < 8


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


def damaged(zoo, name, data):
    path = zoo / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("empty.mp4", b"", "is empty"),
        ("zeros.mp4", bytes(5000), "not a video"),
        ("text.mp4", b"This is not a video at all.\n" * 50, "not a video"),
        ("notes.txt", b"plain text\n" * 50, "no video stream"),
        ("noise.mp4", np.random.default_rng(0).bytes(20000), "not a video"),
        ("header.mp4", VIDEO.read_bytes()[:40], "not a video"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n", "list.m3u8"),
    ],
)
def test_unusable_files_say_why(name, data, says, zoo):
    path = damaged(zoo, name, data)
    with pytest.raises(MediaError, match=says) as caught:
        list(sources.frames(path, MotionSettings()))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_folder_audio_and_pictures_say_why(zoo):
    picture = zoo / "picture.png"
    with av.open(str(picture), "w") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    cases = {
        zoo / "nowhere.mp4": "no such file",
        zoo: "is not a file",
        media_zoo.audio_only(zoo / "sound.mp4"): "has no video stream",
        picture: "is a picture",
        media_zoo.make(zoo / "one.mp4", frames=1): "too short.*1 frames at 6",
    }
    for path, says in cases.items():
        with pytest.raises(MediaError, match=says):
            sources.understanding_clips(path, MotionSettings())
    with pytest.raises(MediaError, match="24 frames at 6"):
        next(sources.reconstruction_clips(zoo / "one.mp4", MotionSettings()))


def test_cover_art_is_not_video(zoo):
    path = zoo / "song.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        container.mux(cover.encode(av.VideoFrame(32, 32, "yuvj420p")))
        container.mux(cover.encode(None))
        for packet in media_zoo._silence(sound, 5):
            container.mux(packet)
    with pytest.raises(MediaError, match="has no video stream"):
        list(sources.frames(path, MotionSettings()))


def test_huge_frames_are_refused(zoo):
    path = media_zoo.make(zoo / "wide.mkv", frames=1, size=(8208, 16), codec="ffv1")
    with pytest.raises(MediaError, match="8208x16 is too large"):
        list(sources.frames(path, MotionSettings()))


def test_leaping_time_stamps_are_refused(zoo):
    path = media_zoo.make(zoo / "leap.mkv", frames=3, times=[0, 100, 10**9])
    with pytest.raises(MediaError, match=r"no frame for .* s after"):
        list(sources.frames(path, MotionSettings()))


def outcome(path):
    try:
        return len(list(sources.frames(path, MotionSettings())))
    except VideoLavitError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return error


@pytest.mark.parametrize("suffix", [".mkv", ".ts", ".mp4"])
def test_truncated_and_flipped_files_end_in_a_result_or_one_error(suffix, zoo):
    whole = media_zoo.make(zoo / f"whole{suffix}", frames=60, audio=suffix == ".ts").read_bytes()
    rng = np.random.default_rng(3)
    results = []
    for k in range(8):
        results.append(outcome(damaged(zoo, f"cut{k}{suffix}", whole[: len(whole) * k // 8])))
        flipped = np.frombuffer(whole, np.uint8).copy()
        flipped[rng.integers(0, len(whole), 2**k)] ^= 1 << k
        results.append(outcome(damaged(zoo, f"flipped{k}{suffix}", flipped.tobytes())))
    assert any(isinstance(r, int) and r > 0 for r in results)


def test_settings_are_checked():
    for wrong in ({"fps": 0}, {"fps": 5000}, {"slices": 0}, {"slices": 17}):
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
