"""Motion from a video's own vectors, compared with the exact source and with known movement."""

from fractions import Fraction

import media_zoo
import numpy as np
import pytest
from click.testing import CliRunner
from golden import FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import MediaError, UsageError, VideoLavitError
from runtime.motion import sources
from runtime.motion.agreement import agreement
from runtime.motion.approximate import ApproximateClip, ApproximateFrame
from runtime.motion.codec import CODECS, CodecFile
from runtime.motion.commands import motion
from runtime.motion.grid import to_pixels
from runtime.motion.mpeg4 import MotionSettings
from runtime.motion.select import open_source
from runtime.motion.trace import CELL, VectorTrace, cell_field, field_shape, macroblock_motion

VIDEO = FOLDER.parent / "media" / "video7013.mp4"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return tmp_path_factory.mktemp("codec_zoo")


def vectors(*rows):
    """(source, w, h, dst_x, dst_y, motion_x, motion_y, scale) as FFmpeg gives them."""
    names = ("source", "w", "h", "dst_x", "dst_y", "motion_x", "motion_y", "motion_scale")
    kinds = ("<i4", "u1", "u1", "<i2", "<i2", "<i4", "<i4", "<u2")
    return np.array([tuple(row) for row in rows], dtype=list(zip(names, kinds, strict=True)))


def test_cells_take_the_vectors_of_their_blocks():
    field = cell_field(
        vectors(
            (-1, 16, 16, 8, 8, -8, 4, 4),  # moved 2 right and 1 up
            (-1, 8, 16, 20, 8, -4, 0, 2),
            (-1, 16, 8, 8, 20, 0, -12, 4),
            (-1, 8, 8, 44, 28, 4, 4, 4),
            (1, 16, 16, 40, 8, 100, 100, 4),  # from the future: not used
            (-1, 16, 16, 56, 8, 8, 8, 4),  # beside the picture
        ),
        width=48,
        height=32,
    )
    assert field.shape == (2, *field_shape(48, 32)) == (2, 4, 6)
    x = [[2, 2, 2, 0, 0, 0], [2, 2, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, -1]]
    y = [[-1, -1, 0, 0, 0, 0], [-1, -1, 0, 0, 0, 0], [3, 3, 0, 0, 0, 0], [0, 0, 0, 0, 0, -1]]
    np.testing.assert_array_equal(field, [x, y])
    assert not cell_field(np.empty(0), 48, 32).any()


def test_trace_follows_what_moves():
    """A patch that moves 8 pixels a picture has moved 24 after three, where it came to; what stood still, none."""
    trace = VectorTrace()
    trace.add(Fraction(0), np.zeros((2, 4, 8), np.float32))
    for picture in (1, 2, 3):
        field = np.zeros((2, 4, 8), np.float32)
        field[0, 1, 1 + picture] = CELL
        trace.add(Fraction(picture), field)
    moved = trace.sample(Fraction(3))
    assert moved[0, 1, 4] == 3 * CELL
    assert not moved[1].any() and not moved[0, (0, 2, 3)].any() and not moved[0, 1, 5:].any()
    assert not trace.sample(Fraction(3)).any(), "counted once"


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8, unique=True), st.integers(-3, 3), st.integers(-3, 3))
@settings(max_examples=50, deadline=None)
def test_even_motion_is_shared_by_time(samples, x, y):
    """However moments fall between pictures, each gets its share and the shares make the whole."""
    trace = VectorTrace()
    for picture in range(6):
        trace.add(Fraction(picture), np.full((2, 4, 4), 0, np.float32) + np.float32([[[x]], [[y]]]))
    previous, total = Fraction(0), np.zeros((2, 4, 4))
    for moment in sorted(Fraction(n, 8) for n in samples):
        moved = trace.sample(moment)
        np.testing.assert_allclose(moved[0], x * float(moment - previous), atol=1e-5)
        total, previous = total + moved, moment
    np.testing.assert_allclose(total[1], y * float(previous), atol=1e-5)


def test_median_drops_strays():
    field = np.full((2, 6, 6), 3, np.float32)
    field[:, 2, 3] = 90
    np.testing.assert_array_equal(macroblock_motion(field), np.full((2, 3, 3), 3))


# Figures measured on this video: 0.610, 0.399, 0.590 at 6 frames per second and 0.523, 0.547, 0.722 at 12. On a longer
# 596x336 one: 0.929, 0.313, 0.602 and 0.917, 0.242, 0.790.
@pytest.mark.parametrize(("fps", "x", "y", "close"), [(6, 0.58, 0.37, 0.57), (12, 0.50, 0.52, 0.70)])
def test_agreement_with_the_exact_source(fps, x, y, close):
    settings_ = MotionSettings(fps=fps)
    own = list(CodecFile(VIDEO, settings_).frames())
    exact = list(sources.frames(VIDEO, settings_))
    assert len(own) == len(exact) and [f.time_s for f in own] == [f.time_s for f in exact]
    found = agreement(own, exact, rescale=True)
    assert found.correlation_x > x and found.correlation_y > y and found.within_one_pixel > close
    assert found.blocks == 300 * sum(a.grid is not None and b.grid is not None for a, b in zip(own, exact, strict=True))
    shifted = agreement(own[3:], exact, rescale=True)
    assert shifted.correlation_x < found.correlation_x - 0.2, "the figures can fail"


def test_agreement_is_a_measure():
    frames = list(CodecFile(VIDEO, MotionSettings()).frames())[:5]
    same = agreement(frames, frames, rescale=True)
    assert (same.correlation_x, same.within_one_pixel) == (pytest.approx(1), 1)
    with pytest.raises(MediaError, match="no frame with motion in common"):
        agreement(frames[:1], frames[:1], rescale=True)


def test_layout_is_that_of_the_exact_source():
    frames = list(CodecFile(VIDEO, MotionSettings()).frames(images=True))
    assert "".join(f.kind for f in frames) == ("I" + "P" * 11) * 7
    assert all(isinstance(f, ApproximateFrame) and not f.exact for f in frames)
    assert all((f.grid is None) == (f.kind == "I") for f in frames)
    assert frames[5].grid.dtype == np.float32 and frames[5].grid.shape == (2, 15, 20)
    exact = next(f for f in sources.frames(VIDEO, MotionSettings(), images=True) if f.index == 30)
    assert np.abs(frames[30].image.astype(int) - exact.image).mean() < 4
    raw = next(f for f in CodecFile(VIDEO, MotionSettings(rescale=False)).frames() if f.index == 5)
    np.testing.assert_allclose(frames[5].grid, raw.grid * 10, rtol=1e-5)
    without = list(CodecFile(VIDEO, MotionSettings()).frames())
    assert all(np.array_equal(a.grid, b.grid) for a, b in zip(frames, without, strict=True) if a.grid is not None), (
        "vectors do not depend on the loop filter"
    )


def test_clips_are_chosen_like_those_of_the_exact_source():
    exact = sources.understanding_clips(VIDEO, MotionSettings())
    own = CodecFile(VIDEO, MotionSettings()).understanding_clips()
    assert [(c.index, c.frame_index, c.time_s) for c in own] == [(c.index, c.frame_index, c.time_s) for c in exact]
    frames = list(CodecFile(VIDEO, MotionSettings()).frames(images=True))
    for clip in own:
        assert isinstance(clip, ApproximateClip) and not clip.exact and clip.grid.shape == (24, 2, 15, 20)
        assert not clip.grid[0].any() and not clip.grid[12].any() and clip.grid[1].any()
        np.testing.assert_array_equal(clip.keyframe, frames[clip.frame_index].image)
        np.testing.assert_array_equal(clip.grid[7], frames[clip.frame_index + 7].grid)
    assert len(CodecFile(VIDEO, MotionSettings()).understanding_clips(max_clips=2)) == 2
    twelve = CodecFile(VIDEO, MotionSettings(fps=12))
    assert [c.frame_index for c in twelve.reconstruction_clips()] == [0, 24, 48, 72, 96, 120, 144]
    assert next(twelve.reconstruction_clips(start_s=2.5)).frame_index == 36
    with pytest.raises(MediaError, match="192 frames at 12"):
        next(twelve.reconstruction_clips(start_s=14))


DRIFTING = {
    "h264.mp4": {},
    "b_frames.mp4": {"options": {"bf": "3", "b-adapt": "0"}},
    "pyramid.mkv": {"options": {"x264-params": "bframes=5:b-adapt=0:b-pyramid=normal:ref=1"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "qpel.mkv": {"codec": "mpeg4", "options": {"bf": "2", "flags": "+qpel+mv4"}},
    "mpeg1.mpg": {"codec": "mpeg1video", "rate": 25},
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25, "options": {"bf": "2", "g": "60"}},
    "h263.avi": {"codec": "h263", "size": (176, 144)},
    "flash.flv": {"codec": "flv"},
    "wmv.avi": {"codec": "wmv2"},
    "msmpeg4.avi": {"codec": "msmpeg4"},
    "real.rm": {"codec": "rv20"},
    "raw.h264": {"rate": 25},
    "odd.mp4": {"size": (98, 70)},
}


@pytest.mark.parametrize("name", DRIFTING)
def test_known_motion_is_found(name, zoo):
    """The scene drifts right two pixels a source frame."""
    given_ = {"frames": 75, "size": (160, 96)} | DRIFTING[name]
    path = media_zoo.make(zoo / name, **given_)
    rate = given_.get("rate", 30)
    frames = list(CodecFile(path, MotionSettings()).frames())
    assert len(frames) == len(list(sources.frames(path, MotionSettings())))
    moving = [to_pixels(f.grid, f.width, f.height, True) for f in frames[1:-1] if f.grid is not None]
    assert np.median([m[0, :, 2:] for m in moving]) == pytest.approx(2 * rate / 6, rel=0.15)
    assert abs(np.median([m[1] for m in moving])) < 0.5


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_vectors_turn_with_the_pixels(degrees, mirrored, zoo):
    path = media_zoo.rotated(zoo / f"turn{degrees}{mirrored}.mp4", degrees, mirrored, frames=40, rate=12)
    own = list(CodecFile(path, MotionSettings()).frames(images=True))
    exact = list(sources.frames(path, MotionSettings(), images=True))
    assert own[1].grid.shape == exact[1].grid.shape and own[0].image.shape == exact[0].image.shape
    assert np.abs(own[0].image.astype(int) - exact[0].image).mean() < 8
    means = [
        np.median(
            [to_pixels(f.grid, f.width, f.height, True).reshape(2, -1) for f in frames if f.grid is not None], (0, 2)
        )
        for frames in (own, exact)
    ]
    np.testing.assert_allclose(means[0], means[1], atol=0.6)
    assert np.abs(means[0]).max() > 3


def test_a_stream_that_changes_size_keeps_the_first(zoo):
    small = media_zoo.make(zoo / "small.ts", frames=30, size=(96, 64), rate=25).read_bytes()
    later = [1200 + 40 * i for i in range(60)]
    large = media_zoo.make(zoo / "large.ts", frames=60, size=(192, 128), rate=25, times=later).read_bytes()
    path = zoo / "both.ts"
    path.write_bytes(small + large)
    frames = list(CodecFile(path, MotionSettings()).frames(images=True))
    assert {(f.width, f.height, f.image.shape) for f in frames} == {(96, 64, (64, 96, 3))}
    assert len(frames) == len(list(sources.frames(path, MotionSettings())))
    late = [to_pixels(f.grid, 96, 64, True) for f in frames[10:-1] if f.grid is not None]
    assert np.median([m[0] for m in late]) == pytest.approx(25 / 6, rel=0.2), "two pixels of the large one are one"


@pytest.mark.parametrize(
    ("name", "make", "codec"),
    [
        ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}, "hevc"),
        ("vp9.webm", {"codec": "libvpx-vp9"}, "vp9"),
        ("vp8.webm", {"codec": "libvpx"}, "vp8"),
        ("mjpeg.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}, "mjpeg"),
        ("lossless.mkv", {"codec": "ffv1"}, "ffv1"),
    ],
)
def test_codecs_without_vectors_say_so(name, make, codec, zoo):
    path = media_zoo.make(zoo / name, frames=10, rate=10, **make)
    with pytest.raises(
        MediaError, match=rf"{name}: its codec {codec} gives no motion vectors.*--source mpeg4"
    ) as caught:
        list(CodecFile(path, MotionSettings()).frames())
    assert "\n" not in str(caught.value)
    with pytest.raises(MediaError, match=codec):
        open_source(path, "codec", MotionSettings())
    source = open_source(path, "codec", MotionSettings(), fallback="mpeg4")
    assert (source.name, source.exact) == ("mpeg4", True) and len(list(source.frames())) == 6
    assert codec not in CODECS


def outcome(path):
    try:
        return len(list(CodecFile(path, MotionSettings()).frames())), len(
            CodecFile(path, MotionSettings()).understanding_clips()
        )
    except VideoLavitError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return error


@pytest.mark.parametrize("suffix", [".mkv", ".ts", ".mp4"])
def test_damaged_files_end_in_a_result_or_one_error(suffix, zoo):
    whole = media_zoo.make(zoo / f"whole{suffix}", frames=60).read_bytes()
    rng = np.random.default_rng(4)
    results = []
    for k in range(8):
        path = zoo / f"damaged{k}{suffix}"
        path.write_bytes(whole[: len(whole) * k // 8])
        results.append(outcome(path))
        flipped = np.frombuffer(whole, np.uint8).copy()
        flipped[rng.integers(0, len(whole), 2**k)] ^= 1 << k
        path.write_bytes(flipped.tobytes())
        results.append(outcome(path))
    assert any(isinstance(r, tuple) and r[0] > 0 for r in results)


def test_sources_are_selected_by_name(tmp_path):
    assert (open_source(VIDEO, "mpeg4", MotionSettings()).name, open_source(VIDEO, "codec", MotionSettings()).name) == (
        "mpeg4",
        "codec",
    )
    exact = open_source(VIDEO, "mpeg4", MotionSettings())
    assert exact.exact and len(exact.understanding_clips(max_clips=1)) == 1
    assert next(exact.reconstruction_clips()).frame_index == 0
    for address, source, problem in (
        ("ftp://host/a.mp4", "mpeg4", UsageError),
        ("rtsp://127.0.0.1:1/", "nvdec", UsageError),
        (tmp_path / "nowhere.mp4", "codec", MediaError),
    ):
        with pytest.raises(problem):
            open_source(address, source, MotionSettings())


def test_command_says_what_it_used(tmp_path, zoo):
    output = tmp_path / "motion.npz"
    result = CliRunner().invoke(motion, [str(VIDEO), "-o", str(output), "--source", "codec", "--duration", "4"])
    assert result.exit_code == 0, result.output
    assert "codec (approximate)" in result.stdout and "24 (320x240)" in result.stdout
    with np.load(output, allow_pickle=False) as stored:
        assert stored["grids"].shape == (24, 2, 15, 20)
        assert str(stored["motion_source"]) == "codec" and not stored["exact"]
    hevc = media_zoo.make(
        zoo / "camera.mp4", frames=20, rate=10, codec="libx265", options={"x265-params": "log-level=none"}
    )
    refused = CliRunner().invoke(motion, [str(hevc), "--source", "codec"])
    assert isinstance(refused.exception, MediaError)
    result = CliRunner().invoke(motion, [str(hevc), "--source", "codec", "--fallback", "mpeg4"])
    assert "mpeg4 (exact)" in result.stdout and "read with mpeg4" in result.stderr
