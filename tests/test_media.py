"""Pictures and videos, in and out."""

import json

import media_zoo
import numpy as np
import pytest
from golden import assert_close, load
from PIL import Image

from runtime.errors import MediaError, UsageError
from runtime.images import (
    is_picture,
    load_image,
    picture_metadata,
    resize_image,
    save_image,
    to_signed,
    to_uint8,
    tokenizer_pixels,
)
from runtime.video import probe, read_frames, read_recipe, write_video

METADATA = {"videolavit": json.dumps({"prompt": 'a "red" circle — rouge', "long": "x" * 3000})}


@pytest.mark.parametrize("case", [0, 1])
def test_tokenizer_pixels_golden(case):
    golden = load("k_image_processor")
    image, side = golden.inputs[f"rgb_u8_{case}"], golden.meta["config"]["image_size"]
    np.testing.assert_array_equal(resize_image(image, (side, side)), golden.outputs[f"resized_u8_{case}"])
    assert_close(tokenizer_pixels(image, side), golden.outputs[f"pixels_{case}"], 1e-5)


def test_signed_and_back_is_exact():
    image = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    signed = to_signed(image)
    assert signed.shape == (3, 16, 16) and signed.dtype == np.float32 and signed.min() == -1 and signed.max() == 1
    np.testing.assert_array_equal(to_uint8(signed), image)
    values = np.array([-9, 0, 0.999 / 127.5, 9], np.float32).reshape(1, 1, 1, 4).repeat(3, 1)  # [1, 3, 1, 4]
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 128, 128, 255]  # clamped, rounded


def test_load_image_is_upright_and_opaque(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "turned.png"), np.rot90(pixels, -1))
    Image.fromarray(np.full((2, 2, 4), (255, 0, 0, 0), np.uint8)).save(tmp_path / "clear.png")
    assert (load_image(tmp_path / "clear.png") == 255).all()
    Image.fromarray(np.full((2, 2), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert (load_image(tmp_path / "deep.png") == 128).all()


def test_unusable_pictures_say_why(tmp_path, monkeypatch):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    media_zoo.make(tmp_path / "video.mp4", frames=2)
    save_image(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), {}, False)
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    cases = {
        "nowhere.png": "no such file",
        ".": "is not a file",
        "empty.png": "is empty",
        "text.png": "is not a picture",
        "video.mp4": "is a video.*ask",
        "half.png": "damaged",
    }
    for name, says in cases.items():
        with pytest.raises(MediaError, match=says):
            load_image(tmp_path / name)
    monkeypatch.setattr("runtime.images.MAX_PIXELS", 1000)
    with pytest.raises(MediaError, match="64x64 is too large"):
        load_image(tmp_path / "whole.png")


def test_pictures_are_told_from_videos_by_content(tmp_path):
    save_image(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), {}, False)
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.png").read_bytes())
    write_video(tmp_path / "moving.gif", [np.full((8, 8, 3), v, np.uint8) for v in (0, 90)], 6, {}, False)
    assert is_picture(tmp_path / "a.png") and is_picture(tmp_path / "a.mp4")
    assert not is_picture(tmp_path / "moving.gif")


def test_picture_carries_metadata(tmp_path):
    save_image(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), METADATA, False)
    assert read_recipe(tmp_path / "a.png") == METADATA == picture_metadata(tmp_path / "a.png")


@pytest.mark.parametrize(("name", "size"), [("a.mp4", (96, 64)), ("odd.mp4", (97, 63)), ("a.gif", (97, 63))])
def test_video_round_trip(name, size, tmp_path):
    frames = [media_zoo.scene(i, *size) for i in range(9)]
    path = tmp_path / name
    write_video(path, iter(frames), 6, METADATA, False)
    found = list(read_frames(path))
    assert len(found) == 9
    for a, b in zip(found, frames, strict=True):
        assert np.abs(a[: size[1], : size[0]].astype(int) - b).mean() < 5
    info = probe(path)
    assert info.frames == 9 and info.duration == pytest.approx(1.5, abs=0.07)
    assert info.fps == pytest.approx(6, rel=0.05)
    assert (info.width, info.height) == (
        size if name.endswith("gif") else (size[0] + size[0] % 2, size[1] + size[1] % 2)
    )
    assert read_recipe(path) == METADATA
    assert [p.name for p in tmp_path.iterdir()] == [name]
    before = path.read_bytes()
    write_video(path, iter(frames), 6, METADATA, True)
    assert path.read_bytes() == before


def test_colours_survive(tmp_path):
    colours = [(255, 255, 255), (0, 0, 0), (220, 30, 30), (30, 200, 40), (20, 40, 220)]
    write_video(tmp_path / "a.mp4", [np.full((32, 32, 3), c, np.uint8) for c in colours], 6, {}, False)
    for frame, colour in zip(read_frames(tmp_path / "a.mp4"), colours, strict=True):
        assert np.abs(frame.reshape(-1, 3).astype(int) - colour).max() <= 4


def test_frames_are_consumed_one_at_a_time_and_nothing_stays_after_a_stop(tmp_path):
    def frames():
        yield np.zeros((32, 32, 3), np.uint8)
        yield np.zeros((32, 32, 3), np.uint8)
        raise KeyboardInterrupt

    (tmp_path / "kept.mp4").write_text("old")
    for name in ("a.mp4", "a.gif", "kept.mp4"):
        with pytest.raises(KeyboardInterrupt):
            write_video(tmp_path / name, frames(), 6, {}, True)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.mp4"]
    assert (tmp_path / "kept.mp4").read_text() == "old"


def test_unusable_output_says_why(tmp_path):
    frame = np.zeros((16, 16, 3), np.uint8)
    (tmp_path / "there.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    cases = {
        "a.xyz": r"unknown output type \.xyz; use one of \.mp4, \.gif",
        "no/a.mp4": "does not exist",
        "there.mp4": "--force",
        "folder.mp4": "is a folder",
    }
    for name, says in cases.items():
        with pytest.raises(UsageError, match=says):
            write_video(tmp_path / name, [frame], 6, {}, False)
    with pytest.raises(UsageError, match="no frame"):
        write_video(tmp_path / "none.mp4", [], 6, {}, False)
    with pytest.raises(UsageError, match="frame 1 is"):
        write_video(tmp_path / "uneven.mp4", [frame, frame[:8]], 6, {}, False)
    with pytest.raises(UsageError, match="frame rate"):
        write_video(tmp_path / "still.mp4", [frame], 0, {}, False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.mp4", "there.mp4"]


def test_probe_and_read_upright(tmp_path):
    path = media_zoo.rotated(tmp_path / "phone.mp4", 90, frames=10, rate=5)
    info = probe(path)
    assert (info.width, info.height, info.rotation, info.codec) == (64, 96, 90, "h264")
    assert next(read_frames(path)).shape == (96, 64, 3)
    assert len(list(read_frames(path, fps=10))) == 20


def test_recipe_of_a_strange_file_is_empty(tmp_path):
    assert read_recipe(media_zoo.make(tmp_path / "a.mp4", frames=2)) == {}
    (tmp_path / "broken.mp4").write_bytes(b"abc")
    with pytest.raises(MediaError):
        read_recipe(tmp_path / "broken.mp4")
