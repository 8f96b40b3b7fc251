"""The hardware decoder's source, without a GPU: statistics in the documented format, and a library that is not there.

No test here has met real hardware; the format of the statistics is that of PyNvVideoCodec's documentation and samples.
"""

import sys
from types import SimpleNamespace

import av
import media_zoo
import numpy as np
import pytest
from golden import FOLDER

from runtime.errors import EnvironmentProblem, MediaError
from runtime.motion import nvdec
from runtime.motion.agreement import agreement
from runtime.motion.codec import CodecFile
from runtime.motion.mpeg4 import MotionSettings, motion_vectors
from runtime.motion.nvdec import NvdecFile, problem, statistics_field
from runtime.motion.select import open_source

VIDEO = FOLDER.parent / "media" / "video7013.mp4"
INTRA, INTER, SKIP, PCM = 0, 1, 2, 3


def statistics(blocks, **changes):
    """What `ParseDecodeStats` gives for `blocks` of (cu_type, mv0_x, mv0_y)."""
    kinds, x, y = (list(column) for column in zip(*blocks, strict=True))
    none = [0] * len(blocks)
    return {"qp_luma": [30] * len(blocks), "cu_type": kinds, "mv0_x": x, "mv0_y": y, "mv1_x": none, "mv1_y": none} | (
        changes
    )


def test_statistics_become_a_field():
    # 48x20 pixels: 3x2 blocks, the lower row cut
    found = statistics_field(
        statistics([(INTER, -8, 4), (SKIP, 2, 0), (INTRA, 77, 77), (PCM, 5, 5), (INTER, 0, 0), (7, 9, 9)]), 48, 20
    )
    assert found.shape == (2, 4, 6) and found.dtype == np.float32
    x, y = found[:, ::2, ::2]
    np.testing.assert_array_equal(x, [[2, -0.5, 0], [0, 0, 0]])  # away from the reference, quarter pixels
    np.testing.assert_array_equal(y, [[-1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(found, found[:, ::2, ::2].repeat(2, 1).repeat(2, 2))


def test_b_pictures_are_left_out():
    blocks = [(INTER, 4, 4)] * 6
    assert statistics_field(statistics(blocks, mv1_x=[0, 0, 1, 0, 0, 0]), 48, 20) is None
    still = statistics(blocks, cu_type=[INTRA] * 6, mv1_x=[9] * 6)  # what an intra block holds there means nothing
    assert not statistics_field(still, 48, 20).any()


@pytest.mark.parametrize("changes", [{"mv0_x": [1, 2]}, {"cu_type": []}])
def test_statistics_of_another_size_are_refused(changes):
    with pytest.raises(MediaError, match="do not fit 48x20"):
        statistics_field(statistics([(INTER, 0, 0)] * 6, **changes), 48, 20)


def test_absence_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", None)
    assert "not installed" in problem() and "videolavit[nvdec]" in problem()
    with pytest.raises(EnvironmentProblem, match="driver 590"):
        open_source(VIDEO, "nvdec", MotionSettings())
    assert open_source(VIDEO, "nvdec", MotionSettings(), fallback="mpeg4").name == "mpeg4"


def test_a_missing_driver_is_one_line(monkeypatch):
    def broken(name):
        raise RuntimeError("Failed to load NVENC library: libnvidia-encode.so.1\n\n=== TROUBLESHOOTING ===\n1. ...")

    monkeypatch.setattr(nvdec, "import_module", broken)
    assert "cannot load (Failed to load NVENC library" in problem() and "\n" not in problem()


class Frame:
    """A decoded picture as the library hands it out, made from FFmpeg's vectors."""

    def __init__(self, frame: av.VideoFrame, supported: bool) -> None:
        self._frame = frame
        self._pixels = frame.to_ndarray(format="rgb24")
        vectors = motion_vectors(frame)
        count = frame.width * frame.height // 256
        moved = np.zeros((2, 2, count), int)  # past and future; x and y
        kinds = np.zeros(count, int)
        if len(vectors):
            block = vectors["dst_y"] // 16 * (frame.width // 16) + vectors["dst_x"] // 16
            future = (vectors["source"] > 0).astype(int)
            moved[future, 0, block], moved[future, 1, block] = vectors["motion_x"], vectors["motion_y"]
            kinds[block] = INTER
        names = ("mv0_x", "mv0_y", "mv1_x", "mv1_y")
        self._statistics = {"qp_luma": [20] * count, "cu_type": kinds.tolist()}
        self._statistics |= dict(zip(names, moved.reshape(4, count).tolist(), strict=True))
        self.decode_stats_size = 64 * count if supported else 0

    def ParseDecodeStats(self):
        return self._statistics

    def __dlpack__(self, **options):
        return self._pixels.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._pixels.__dlpack_device__()


@pytest.fixture
def library(monkeypatch):
    """Stands in for PyNvVideoCodec; `supported` off is a driver that silently exports nothing."""
    fake = SimpleNamespace(OutputColorType=SimpleNamespace(RGB="RGB"), supported=True)

    def decoder(path, use_device_memory, output_color_type, enableDecodeStats):
        assert not use_device_memory and output_color_type == "RGB" and enableDecodeStats
        with av.open(path) as container:
            container.streams.video[0].codec_context.options = {"flags2": "+export_mvs"}
            return [Frame(frame, fake.supported) for frame in container.decode(video=0)]

    fake.SimpleDecoder = decoder
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", fake)
    return fake


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return media_zoo.make(tmp_path_factory.mktemp("nvdec") / "clip.mp4", frames=30, rate=12)


def test_whole_path_resembles_the_codec_source(library):
    assert problem() is None
    source = NvdecFile(VIDEO, MotionSettings())
    assert (source.name, source.exact) == ("nvdec", False)
    found = list(source.frames(images=True))
    expected = list(CodecFile(VIDEO, MotionSettings()).frames(images=True))
    assert [(f.index, f.time_s, f.kind) for f in found] == [(f.index, f.time_s, f.kind) for f in expected]
    assert np.abs(found[12].image.astype(int) - expected[12].image).mean() < 4
    close = agreement(found, expected, rescale=True)
    assert close.correlation_x > 0.8 and close.within_one_pixel > 0.75


def test_it_is_selected_by_name(library, clip):
    source = open_source(clip, "nvdec", MotionSettings())
    assert isinstance(source, NvdecFile)
    assert [(c.frame_index, c.exact) for c in source.understanding_clips()] == [(0, False)]


def test_a_driver_without_statistics_is_said(library, clip):
    library.supported = False
    with pytest.raises(EnvironmentProblem, match="exports no decode statistics"):
        open_source(clip, "nvdec", MotionSettings())
    assert open_source(clip, "nvdec", MotionSettings(), fallback="mpeg4").name == "mpeg4"


def test_unfit_files_are_said(library, clip, tmp_path):
    old = media_zoo.make(tmp_path / "old.avi", frames=6, codec="mpeg4")
    turned = media_zoo.rotated(tmp_path / "turned.mp4", 90, frames=6)
    for path, says in ((old, "mpeg4 gives no decode statistics"), (turned, "stored turned")):
        with pytest.raises(MediaError, match=says):
            list(NvdecFile(path, MotionSettings()).frames())

    def refuses(*arguments, **options):
        raise ValueError("HW decoder faced error\nmore")

    library.SimpleDecoder = refuses
    with pytest.raises(EnvironmentProblem, match=r"cannot open it \(HW decoder faced error\)"):
        list(NvdecFile(clip, MotionSettings()).frames())
