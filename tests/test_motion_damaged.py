"""Damaged and hostile files: each ends in a result or in one VideoLavitError, soon, and in little memory.

Contract: run as a script, this file reads the videos it is given in a process of its own, under limits, and prints one
line of JSON for each; a crash, a hang or a traceback of that process fails the test.
"""

import json
import resource
import struct
import subprocess
import sys
from pathlib import Path

import av
import media_zoo
import numpy as np
import pytest
from golden import FOLDER

from runtime.decoding import MAX_GAP
from runtime.errors import MediaError, VideoLavitError
from runtime.motion import sources
from runtime.motion.mpeg4 import MotionSettings
from runtime.video import probe, read_frames

VIDEO = FOLDER.parent / "media" / "video7013.mp4"
CUTS = 52  # places at which every container is cut off
SECONDS = 120  # for all files of one kind; they take about 3
MEMORY = 2 << 30  # address space, bytes
PEAK_MIB = 250  # resident
ROOT = Path(__file__).resolve().parent
# One thread for numpy: every other reserves memory.
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{ROOT.parent}", "PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"}
# A flipped bit in a time stamp can look like a pause, and pauses of up to MAX_GAP are filled. Which bits those are
# depends on how this machine's encoder has written the video.
FRAMES = (MAX_GAP + 10) * 6


def outcome(path):
    try:
        frames = sum(1 for _ in sources.frames(path, MotionSettings()))
        sources.understanding_clips(path, MotionSettings(sparse=True), max_clips=1)
        probe(path)
        next(read_frames(path))
        return {"frames": frames}
    except VideoLavitError as error:
        return {"error": str(error)}


def outcomes(paths, folder):
    """What reading every one of `paths` ends in: {"frames": number} or {"error": text}."""
    listing = folder / "paths.json"
    listing.write_text(json.dumps([str(p) for p in paths]))
    done = subprocess.run(
        [sys.executable, __file__, str(listing)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(paths) + 1
    assert lines.pop()["peak_mib"] < PEAK_MIB
    for path, found in zip(paths, lines, strict=True):
        assert found.get("frames", 1) <= FRAMES, path
        if "error" in found:
            assert str(path) in found["error"] and "\n" not in found["error"], found
    return lines


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


def whole(zoo, suffix):
    path = zoo / f"whole{suffix}"
    codec = {".avi": "mpeg4", ".mpg": "mpeg2video"}.get(suffix, "libx264")
    rate = 25 if suffix == ".mpg" else 30
    return path if path.exists() else media_zoo.make(path, codec=codec, rate=rate, audio=suffix in (".ts", ".mp4"))


def written(path, data):
    path.write_bytes(bytes(data))
    return path


CONTAINERS = [".mp4", ".mkv", ".ts", ".avi", ".mpg", ".h264"]


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_cut_off(suffix, zoo):
    data = whole(zoo, suffix).read_bytes()
    paths = [written(zoo / f"cut{k}{suffix}", data[: len(data) * k // CUTS]) for k in range(CUTS)]
    found = outcomes(paths, zoo)
    assert "is empty" in found[0]["error"]
    if suffix != ".mp4":  # an mp4 file has its table at the end
        assert found[-1]["frames"] >= 10


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_flipped_bits_and_noise(suffix, zoo):
    data = np.frombuffer(whole(zoo, suffix).read_bytes(), np.uint8)
    rng = np.random.default_rng(3)
    paths = []
    for k in range(24):
        damaged = data.copy()
        damaged[rng.integers(0, len(data), 1 << k % 10)] ^= np.uint8(1 << k % 8)
        paths.append(written(zoo / f"flipped{k}{suffix}", damaged))
    for k in range(8):  # the head, where sizes and counts stand
        damaged = data.copy()
        damaged[rng.integers(0, min(len(data), 1000), 2)] = 255
        paths.append(written(zoo / f"head{k}{suffix}", damaged))
    middle = data.copy()
    middle[len(data) // 3 : len(data) // 2] = rng.integers(0, 256, len(data) // 2 - len(data) // 3)
    zeroed = data.copy()
    zeroed[len(data) // 3 : len(data) // 2] = 0
    paths += [written(zoo / f"noise{suffix}", middle), written(zoo / f"zeroed{suffix}", zeroed)]
    paths.append(written(zoo / f"shuffled{suffix}", np.concatenate([data[len(data) // 2 :], data[: len(data) // 2]])))
    outcomes(paths, zoo)


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
def test_what_is_no_video_says_so(name, data, says, zoo):
    path = written(zoo / name, data)
    with pytest.raises(MediaError, match=says) as caught:
        list(sources.frames(path, MotionSettings()))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_random_bytes(zoo):
    rng = np.random.default_rng(1)
    suffixes = [".mp4", ".mkv", ".ts", ".avi", ".mpg", ".h264", ".gif", ".webm", ".flv", ".bin"]
    paths = [written(zoo / f"random{k}{suffixes[k % 10]}", rng.bytes(10 ** (1 + k % 5))) for k in range(40)]
    found = outcomes(paths, zoo)
    assert sum("error" in f for f in found) >= 30


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
        for settings in (MotionSettings(), MotionSettings(sparse=True)):
            with pytest.raises(MediaError, match=says):
                sources.understanding_clips(path, settings)
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
    small = whole(zoo, ".avi").read_bytes()
    lied = bytearray(small)  # the container says 16384x16384, the stream in it does not
    place = lied.index(b"strf") + 12
    assert struct.unpack("<ii", lied[place : place + 8]) == (96, 64)
    lied[place : place + 8] = struct.pack("<ii", 16384, 16384)
    first = media_zoo.make(zoo / "first.h264", frames=30, size=(96, 64))
    second = media_zoo.make(zoo / "second.h264", frames=10, size=(16384, 16))
    paths = [
        media_zoo.make(zoo / "wide.mkv", frames=1, size=(16384, 16), codec="ffv1"),
        written(zoo / "lied.avi", lied),
        media_zoo.joined(zoo / "grows.h264", first, second),
    ]
    found = outcomes(paths, zoo)
    assert "16384x16 is too large" in found[0]["error"]
    assert found[1].get("frames") == 12 or "16384x16384 is too large" in found[1]["error"]
    assert "16384x16 is too large" in found[2]["error"]


def test_leaping_time_stamps_are_refused(zoo):
    path = media_zoo.make(zoo / "leap.mkv", frames=3, times=[0, 100, 10**9])
    for settings in (MotionSettings(), MotionSettings(sparse=True)):
        with pytest.raises(MediaError, match=r"no frame for 1000000 s before 1000000\.0 s; gaps up to 600 s"):
            sources.understanding_clips(path, settings)


def test_frames_minutes_apart_end_soon(zoo):
    """A damaged rate stretches all gaps a little, and the video to weeks; an hour of long ones is filled."""
    path = media_zoo.make(zoo / "sparse.mkv", frames=300, times=[300_000 * i for i in range(300)], size=(16, 16))
    with pytest.raises(MediaError, match=r"no frame for 300 s before 3900.*3600 s of those above 60 s"):
        list(sources.frames(path, MotionSettings(fps=1)))
    for name, count, gap in (("hour", 13, 300), ("slow", 62, 60)):
        path = media_zoo.make(
            zoo / f"{name}.mkv", frames=count, times=[1000 * gap * i for i in range(count)], size=(16, 16)
        )
        assert abs(sum(1 for _ in sources.frames(path, MotionSettings(fps=1))) - (count - 1) * gap) <= 1


KINDS = {
    "empty.mp4": "is empty",
    "noise.mp4": "is not a video",
    "header.mp4": "is not a video",
    "cut.mp4": "is not a video",
    "sound.mp4": "has no video stream",
    "wide.mkv": "16384x16 is too large",
    "flipped.ts": None,
    "cut.mkv": None,
}


@pytest.mark.parametrize("name", KINDS)
def test_command_ends_in_a_result_or_one_line(name, zoo, tmp_path):
    path = tmp_path / name
    data = whole(zoo, ".mp4" if name.endswith(".mp4") else path.suffix).read_bytes()
    if name == "sound.mp4":
        media_zoo.audio_only(path)
    elif name == "wide.mkv":
        media_zoo.make(path, frames=1, size=(16384, 16), codec="ffv1")
    else:
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 16
        contents = {
            "empty": b"",
            "noise": np.random.default_rng(5).bytes(9999),
            "header": data[:40],
            "flipped": flipped,
        }
        written(path, contents.get(path.stem, data[: len(data) * 2 // 3]))
    done = subprocess.run(
        [sys.executable, "-m", "videolavit", "motion", str(path), "-o", str(tmp_path / "motion.npz")],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=ENVIRONMENT,
        preexec_fn=limit,
    )
    says = KINDS[name]
    if says is None:
        assert done.returncode == 0 and np.load(tmp_path / "motion.npz")["grids"].size, done.stderr
        return
    lines = done.stderr.splitlines()
    assert done.returncode == MediaError.exit_code and done.stdout == ""
    assert len(lines) == 1 and str(path) in lines[0] and says in lines[0]
    assert not (tmp_path / "motion.npz").exists()


def limit():
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def main():
    limit()
    for path in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(outcome(Path(path))), flush=True)
    status = Path("/proc/self/status").read_text().splitlines()
    print(json.dumps({"peak_mib": next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024}))


if __name__ == "__main__":
    main()
