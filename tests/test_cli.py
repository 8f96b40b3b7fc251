"""The command as a user meets it: results, and one clear line with the right exit code for every mistake."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from videolavit.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
VIDEO = ROOT / "tests" / "data" / "media" / "video7013.mp4"
STEPS = ["--keyframe-steps", "2", "--video-steps", "2"]
QUICK = [*STEPS, "--size", "64x64"]
TOLD = [*QUICK, "--candidates", "4"]  # where a prompt can choose among them; the default's many take longer
SCHEDULE = ["--keyframe-sampler", "heun", "--keyframe-spacing", "ays", "--image-guidance-interval", "0.3-5"]
SCHEDULE += ["--video-spacing", "exponential", "--video-sigmas", "0.02-80.5", "--video-start", "motion"]


class Run:
    """Outcome of one command: exit code, stdout, stderr."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIDEOLAVIT_BUNDLE", raising=False)

    def call(*arguments: object) -> Run:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Run(int(stop.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    pixels = np.zeros((90, 120, 3), np.uint8)
    pixels[20:60, 30:70] = (220, 30, 30)
    Image.fromarray(pixels).save(path)
    return path


def make_video(path: Path, frames: int, *, audio_only: bool = False) -> Path:
    with av.open(str(path), "w") as container:
        if audio_only:
            stream = container.add_stream("aac", rate=44100)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 44100
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            return path
        stream = container.add_stream("libx264", rate=Fraction(24))
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(frames):
            pixels = np.full((64, 96, 3), 60, np.uint8)
            x = (index * 2) % 64
            pixels[16:40, x : x + 24] = (200, 40, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def frames_of(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


# --- results ---------------------------------------------------------------------------------------------------


def test_generate_writes_a_clip_with_its_recipe(run, tmp_path: Path) -> None:
    done = run("generate", "a red circle moving right", "-o", "a.mp4", "--seed", "5", *TOLD)
    assert done.code == 0, done.err
    assert "seed 5" in done.out
    assert "untrained" not in done.err
    assert frames_of(tmp_path / "a.mp4") == 24
    recipe = json.loads(run("inspect", "a.mp4").out)
    assert recipe["settings"]["prompt"] == "a red circle moving right"
    assert recipe["seed"] == 5
    sidecar = json.loads((tmp_path / "a.mp4.json").read_text())
    assert sidecar["seconds"]["video"] > 0
    assert sidecar["peak_rss_bytes"] >= max(sidecar["stage_peak_rss_bytes"].values()) > 0
    assert sidecar["stage_peak_rss_bytes"].keys() == sidecar["seconds"].keys()
    assert sidecar["engine_bytes"]["video_unet"] > 0
    assert run("generate", "a red circle moving right", "-o", "b.mp4", "--seed", "5", *TOLD).code == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", 'it\'s a "star"', "--size", "96x64", "--top-k", "7", *STEPS, "--candidates", "4"],
        ["generate", "--image", "picture.png", "--greedy", *QUICK],
        ["generate", "a star", "--video-guidance-interval", "0.5-60", "--video-sampler", "dpmpp-2m", *SCHEDULE, *TOLD],
        ["imagine", "a star", "--keyframe-steps", "2", "--candidates", "4"],
        ["reconstruct", str(VIDEO), "--motion", "tokens", "--start", "1.5", "--video-steps", "2", "--size", "64x64"],
    ],
    ids=["text", "image", "schedule", "imagine", "reconstruct"],
)
def test_inspect_prints_the_command_that_makes_the_same_file(
    run, tmp_path: Path, picture: Path, arguments: list[str]
) -> None:
    name = "a.png" if arguments[0] == "imagine" else "a.mp4"
    assert run(*arguments, "-o", name).code == 0
    first = (tmp_path / name).read_bytes()
    again = run("inspect", name).err.partition("make it again: videolavit ")[2]
    done = run(*shlex.split(again), "--force")
    assert done.code == 0, done.err
    assert (tmp_path / name).read_bytes() == first


def test_seed_is_drawn_printed_and_recorded(run, tmp_path: Path) -> None:
    done = run("generate", "a star", "-o", "a.mp4", "--json", *TOLD)
    seed = done.events[-1]["seed"]
    assert json.loads((tmp_path / "a.mp4.json").read_text())["seed"] == seed


def test_long_video_drops_the_repeated_frame(run, tmp_path: Path) -> None:
    done = run("generate", "a star", "-o", "a.mp4", "--clips", "2", "--memory-budget", "2M", "--json", *TOLD)
    assert done.code == 0, done.err
    [plan] = [event for event in done.events if event["event"] == "memory plan"]
    assert plan["budget_bytes"] == 2 << 20 and len(plan["loads"]) > len(plan["engine_bytes"])
    assert done.events[-1]["frames"] == 24 + 23 == frames_of(tmp_path / "a.mp4")
    assert {e["stage"] for e in done.events if e["event"] == "progress"} >= {"image tokens", "motion tokens", "video"}


def test_image_to_video_size_count_and_gif(run, tmp_path: Path, picture: Path) -> None:
    done = run("generate", "--image", picture, "-o", "a.gif", "--size", "96x64", "--count", "2", "--seed", "1", *STEPS)
    assert done.code == 0, done.err
    for name in ("a-1.gif", "a-2.gif"):
        with Image.open(tmp_path / name) as made:
            assert made.size == (96, 64)
            assert made.n_frames == 24


def test_batch_makes_every_job(run, tmp_path: Path, picture: Path) -> None:
    jobs = [{"out": "one.mp4", "prompt": "a red circle"}, {"out": "two.mp4", "image": str(picture), "seed": 3}]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    done = run("generate", "--batch", "jobs.jsonl", *QUICK)
    assert done.code == 0, done.err
    assert frames_of(tmp_path / "one.mp4") == frames_of(tmp_path / "two.mp4") == 24


def test_imagine_from_text_and_from_a_picture(run, tmp_path: Path, picture: Path) -> None:
    done = run("imagine", "a red circle", "-o", "a.png", "--keyframe-steps", "2", "--seed", "1")
    assert done.code == 0, done.err
    with Image.open(tmp_path / "a.png") as made:
        assert made.size == (128, 128)
    assert json.loads(run("inspect", "a.png").out)["task"] == "imagine"
    assert run("imagine", "bluer", "--image", picture, "-o", "b.png", "--keyframe-steps", "2").code == 0


@pytest.mark.parametrize("route", ["raw", "tokens"])
def test_reconstruct_compares_with_the_source(run, tmp_path: Path, route: str) -> None:
    done = run("reconstruct", VIDEO, "-o", "r.mp4", "--motion", route, "--compare", "--video-steps", "2", "--json")
    assert done.code == 0, done.err
    result = done.events[-1]
    assert result["frames"] == 24
    assert 0 < result["psnr"] < 60
    with av.open(str(tmp_path / "r.mp4")) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (256, 128)


def test_ask_answers_on_stdout_alone(run, picture: Path) -> None:
    for media in (picture, VIDEO):
        done = run("ask", media, "what moves?", "--max-answer-tokens", "4", "--max-clips", "2")
        assert done.code == 0, done.err
        assert "untrained" not in done.err
    events = run("ask", picture, "what moves?", "--max-answer-tokens", "4", "--json").events
    assert events[-1]["question"] == "what moves?"


def test_ask_answers_every_question_about_one_file(run, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ["--max-answer-tokens", "4", "--json", "--seed", "1", "--sample"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("what moves?\n"))
    done = run("ask", picture, "what moves?", "where?", "--chat", *short)
    assert done.code == 0, done.err
    results = [event for event in done.events if event["event"] == "result"]
    assert [result["question"] for result in results] == ["what moves?", "where?", "what moves?"]
    alone = [run("ask", picture, question, *short).events[-1] for question in ("what moves?", "where?")]
    assert [result["answer"] for result in results] == [alone[0]["answer"], alone[1]["answer"], alone[0]["answer"]]
    assert all(result["first_token_seconds"] > 0 for result in results)


def test_inspect_shows_the_bundle(run) -> None:
    done = run("inspect", "shapes")
    assert done.code == 0
    assert "video_unet" in done.out
    assert "untrained" in done.out or "trained weights" in done.out
    assert "kept once loaded" in done.out
    assert "released: " in run("inspect", "shapes", "--memory-budget", "3M").out
    assert json.loads(run("inspect", "shapes", "--json").out)["name"] == "shapes"


def test_doctor_finds_a_machine_that_can_run_the_demo(run) -> None:
    done = run("doctor")
    assert done.code == 0, done.out
    assert "motion vectors" in done.out
    assert all(
        json.loads(line)["state"] in ("ok", "missing", "inexact") for line in run("doctor", "--json").out.splitlines()
    )


@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_every_command_has_help(run, command: str) -> None:
    done = run(*([command] if command else []), "--help")
    assert done.code == 0
    assert "Usage:" in done.out


# --- mistakes --------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, picture: Path) -> Path:
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("this is not a video\n" * 50)
    (tmp_path / "empty.png").write_bytes(b"")
    make_video(tmp_path / "sound.mp4", 0, audio_only=True)
    make_video(tmp_path / "one.mp4", 1)
    make_video(tmp_path / "fine.mp4", 80)
    whole = VIDEO.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 20])
    (tmp_path / "there.mp4").write_text("keep me")
    flipped = Path(shutil.copytree(ROOT / "engines" / "shapes", tmp_path / "flipped"))
    engine = max(flipped.rglob("*.onnx"), key=lambda p: p.stat().st_size)
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 4
    engine.write_bytes(bytes(data))
    strange = Path(shutil.copytree(ROOT / "engines" / "shapes", tmp_path / "strange"))
    manifest = json.loads((strange / "bundle.json").read_text())
    (strange / "bundle.json").write_text(json.dumps({**manifest, "colour": "blue"}))
    (tmp_path / "bad.jsonl").write_text('{"out": "x.mp4", "promt": "typo"}\n')
    return tmp_path


MISTAKES = [
    # media
    (["reconstruct", "missing.mp4"], 6, "missing.mp4"),
    (["reconstruct", "empty.mp4"], 6, "empty"),
    (["reconstruct", "text.mp4"], 6, "text.mp4"),
    (["reconstruct", "sound.mp4"], 6, "no video"),
    (["reconstruct", "cut.mp4"], 6, "cut.mp4"),
    (["reconstruct", "one.mp4"], 6, "too short"),
    (["reconstruct", "picture.png"], 6, "picture"),
    (["reconstruct", "fine.mp4", "--start", "500"], 6, "too short"),
    (["motion", "missing.mp4"], 6, "missing.mp4"),
    (["motion", "text.mp4"], 6, "text.mp4"),
    (["motion", "picture.png"], 6, "picture"),
    (["ask", "missing.mp4", "what?"], 6, "missing.mp4"),
    (["ask", "empty.png", "what?"], 6, "empty"),
    (["ask", "text.mp4", "what?"], 6, "text.mp4"),
    (["ask", "sound.mp4", "what?"], 6, "no video"),
    (["generate", "x", "--image", "missing.png"], 6, "missing.png"),
    (["generate", "x", "--image", "fine.mp4"], 6, "video"),
    (["imagine", "x", "--image", "text.mp4"], 6, "text.mp4"),
    # bundles
    (["generate", "x", "--bundle", "nowhere"], 4, "nowhere"),
    (["generate", "x", "--bundle", "flipped"], 4, "SHA-256"),
    (["generate", "x", "--bundle", "strange"], 4, "colour"),
    (["ask", "picture.png", "what?", "--bundle", "flipped"], 4, "SHA-256"),
    (["inspect", "nowhere"], 4, "nowhere"),
    (["inspect", "there.mp4"], 6, "there.mp4"),
    (["inspect", "fine.mp4"], 6, "no recipe"),
    # outputs
    (["generate", "x", "-o", "nofolder/a.mp4"], 2, "nofolder"),
    (["generate", "x", "-o", "there.mp4"], 2, "--force"),
    (["generate", "x", "-o", "a.txt"], 2, ".txt"),
    (["imagine", "x", "-o", "a.mp4"], 2, ".mp4"),
    (["generate", "x", "-o", "/proc/a.mp4"], 2, "/proc"),
    # values
    (["generate", ""], 2, "PROMPT"),
    (["generate", "   "], 2, "PROMPT"),
    (["generate"], 2, "PROMPT"),
    (["ask", "picture.png", ""], 2, "QUESTION"),
    (["ask", "picture.png"], 2, "QUESTION"),
    (["generate", "word " * 3000], 2, "positions"),
    (["ask", "picture.png", "word " * 3000], 2, "positions"),
    (["generate", "x", "--size", "100x100"], 2, "multiples of 32"),
    (["generate", "x", "--size", "65536x65536"], 2, "multiples of 32"),
    (["generate", "x", "--size", "big"], 2, "WIDTHxHEIGHT"),
    (["generate", "x", "--clips", "0"], 2, "--clips"),
    (["generate", "x", "--clips", "90"], 2, "--clips"),
    (["generate", "x", "--video-steps", "1"], 2, "--video-steps"),
    (["generate", "x", "--video-sigmas", "5"], 2, "LOW-HIGH"),
    (["generate", "x", "--video-sigmas", "5-1"], 2, "--video-sigmas 5-1"),
    (["generate", "x", "--video-sigmas", "0-1"], 2, "above 0"),
    (["generate", "x", "--image-guidance-interval", "5-5"], 2, "--image-guidance-interval"),
    (["generate", "x", "--video-sampler", "ddim"], 2, "--video-sampler"),
    (["generate", "x", "--video-start", "picture"], 2, "'noise', 'motion'"),
    (["generate", "x", "--keyframe-sampler", "ddim", "--keyframe-spacing", "ays"], 2, "key frame: spacing ays"),
    (["generate", "x", "--temperature", "0"], 2, "--temperature"),
    (["generate", "x", "--temperature", "nan"], 2, "--temperature"),
    (["generate", "x", "--memory-budget", "lots"], 2, "lots"),
    (["generate", "x", "--seed", "-1"], 2, "--seed"),
    (["generate", "--batch", "bad.jsonl"], 2, "promt"),
    (["generate", "--batch", "none.jsonl"], 2, "none.jsonl"),
    (["generate", "x", "--batch", "bad.jsonl"], 2, "--batch"),
    (["nonsense"], 2, "nonsense"),
    (["generate", "x", "--nonsense"], 2, "--nonsense"),
    (["verify", "shapes", "missing"], 4, "missing"),
    (["export", "missing", "-o", "e"], 4, "missing"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), MISTAKES, ids=[" ".join(a)[:60] for a, _, _ in MISTAKES])
def test_a_mistake_is_one_clear_line(run, files: Path, arguments: list[str], code: int, words: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
    done = run(*arguments)
    complaint = [line for line in done.err.splitlines() if line.lower().startswith("error: ")]
    assert done.code == code, done.err
    assert len(complaint) == 1, done.err
    assert words in complaint[0]
    assert "Traceback" not in done.err
    assert {path: path.stat().st_mtime_ns for path in files.rglob("*")} == before, "something was left behind"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(run, files: Path) -> None:
    (files / "locked").mkdir(mode=0o500)
    done = run("generate", "x", "-o", "locked/a.mp4")
    assert done.code == 2
    assert "not writable" in done.err


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, kind: signal.Signals) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "videolavit",
            "generate",
            "a star",
            "-o",
            "a.mp4",
            "--clips",
            "5",
            "--candidates",
            "4",
            "--json",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        # A suite in the background of a script ignores Ctrl-C, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:  # wait until the video stage runs, so that the output is half-written
        if '"stage":"video"' in line:
            break
    process.send_signal(kind)
    assert process.wait(timeout=30) == 130
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []
