"""How fast motion is read, in how much memory, and whether it equals the reference's; see docs/benchmarks/motion.md.

Contract: every measurement is a process of its own; sources take turns, so that a busy machine is busy for all of them
alike; medians over repeats. CPU seconds include those of child processes; importing libraries is not counted, for any
side. Needs `ffmpeg` and, here or under --reference-python, motion-vector-extractor.

    python -m venv build/reference && build/reference/bin/pip install motion-vector-extractor
    PYTHONPATH=. python benchmarks/motion.py --reference-python build/reference/bin/python -o docs/benchmarks/motion.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import av
import numpy as np
from av.video.frame import VideoFrame
from motion_exactness import exactness_table
from motion_warm_up import warm_up_table
from usage import cpu_seconds, peak_kib

HERE = Path(__file__).resolve().parent
REFERENCE = "reference"
SOURCES = ("mpeg4", "mpeg4 auto", "mpeg4 sparse", "codec")
# name: width, height, frames per second, seconds; (least CPU ratio, most MiB) of source mpeg4, least ratio of sparse
CLIPS = {
    "480p30, 13 s": (854, 480, 30, 13),
    "1080p60, 10 s": (1920, 1080, 60, 10),
    "480p30, 2 min": (854, 480, 30, 120),
}
BUDGETS = {"480p30, 13 s": (3.5, 150, None), "1080p60, 10 s": (5.5, 300, None), "480p30, 2 min": (4.0, 150, 6.0)}

HEAD = """# Motion: time, memory, exactness

Written by `benchmarks/motion.py`; how to run it stands at its top.

What is measured is the way from a video file to what the model reads of it: at most eight clips, each a key frame and
the motion of 24 frames at 6 frames per second.

- `reference`: the ffmpeg command line re-encodes to a temporary file, motion-vector-extractor reads that, and every
  frame's pixels and dense float64 map of vectors are held until the clips are chosen (reference semantics §11.1 to
  §11.4, as they stand there; `benchmarks/motion_reference.py`). ffmpeg decodes with eight threads.
- `mpeg4`: the same re-encoding in this process, on one thread, with nothing done that the result does not need: source
  frames that fill no slot and to which no frame refers are not decoded, of the re-encoded frames only the clips' are,
  without pixels but for the key frames, and vectors go straight into the macroblock grid. One slice a frame, the
  default: the same on every machine, and equal to ffmpeg's where that takes one slice.
- `mpeg4 auto`: with as many slices as ffmpeg takes on this machine; bit for bit what the reference gives here.
- `mpeg4 sparse`: only the clips are encoded, each after a warm-up, and the source is sought instead of read through.
  Key frames are where a video without scene cuts has them.
- `codec`: the vectors in the source stream itself; these resemble the reference's.

Ratios are of median CPU seconds, children included; in brackets are the least and the most of all runs. On a shared
machine even CPU seconds vary, so a ratio this close to its budget may fall on either side of it in another run.

1080p60 is the case with the least to gain: most of its time goes into decoding the source frames to which others refer
and into encoding, and neither can be left out with the result still exact.
"""


def film(path: Path, width: int, height: int, rate: int, seconds: int) -> Path:
    """Write a video: a camera that wanders over a soft landscape by fractions of a pixel, things that cross it, and
    the noise of a sensor; x264 at its defaults. Without scene cuts."""
    rng = np.random.default_rng(0)
    land = _landscape(rng, height * 2, width * 2)
    grain = rng.normal(0, 2, (8, height, width, 1)).astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(rate * seconds):
            at = index / rate
            picture = _window(
                land, width / 2 * (1 + np.sin(at * 0.21)), height / 2 * (1 + np.cos(at * 0.17)), *grain.shape[1:3]
            )
            for k in range(5):
                side = height // 8 + 10 * k
                x = int((width - side) * (0.5 + 0.5 * np.sin(at * (0.5 + 0.2 * k) + k)))
                y = int((height - side) * (0.5 + 0.5 * np.cos(at * (0.4 + 0.1 * k) + 2 * k)))
                picture[y : y + side, x : x + side] = land[:side, k * side : (k + 1) * side] * 0.7 + 20 * k
            shown = (picture + grain[index % 8]).clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def _landscape(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Float32 [height, width, 3]: noise of several sizes, the finer the fainter."""
    total = np.full((height, width, 3), 110, np.float32)
    for size, strength in ((128, 60), (32, 30), (8, 14), (4, 8)):
        coarse = rng.normal(0, strength, (height // size + 2, width // size + 2, 3)).astype(np.float32)
        rows = np.linspace(0, coarse.shape[0] - 1.001, height)
        columns = np.linspace(0, coarse.shape[1] - 1.001, width)
        r, c = rows.astype(int), columns.astype(int)
        dr, dc = (rows - r).astype(np.float32)[:, None, None], (columns - c).astype(np.float32)[None, :, None]
        upper = coarse[r][:, c] * (1 - dc) + coarse[r][:, c + 1] * dc
        lower = coarse[r + 1][:, c] * (1 - dc) + coarse[r + 1][:, c + 1] * dc
        total += upper * (1 - dr) + lower * dr
    return total


def _window(land: np.ndarray, x: float, y: float, height: int, width: int) -> np.ndarray:
    """The part of `land` whose corner is at (x, y), between pixels."""
    left, top = min(int(x), land.shape[1] - width - 1), min(int(y), land.shape[0] - height - 1)
    right, down = x - left, y - top
    part = land[top : top + height + 1, left : left + width + 1]
    part = part[:, :-1] * np.float32(1 - right) + part[:, 1:] * np.float32(right)
    return part[:-1] * np.float32(1 - down) + part[1:] * np.float32(down)


def repeated(source: Path, target: Path, times: int) -> Path:
    """Write `source` `times` over, one after the other, without encoding it again."""
    with av.open(str(target), "w") as output:
        writer = None
        shift = 0
        for _ in range(times):
            with av.open(str(source)) as container:
                stream = container.streams.video[0]
                if writer is None:
                    writer = output.add_stream_from_template(stream)
                end = 0
                for packet in container.demux(stream):
                    if packet.dts is None:
                        continue
                    end = max(end, packet.pts + packet.duration)
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, writer
                    output.mux(packet)
                shift += end
    return target


def worker(source: str, video: Path) -> None:
    """Read the clips for understanding once and print what that took."""
    from runtime.motion.mpeg4 import MotionSettings
    from runtime.motion.select import SOURCES, open_source

    word, _, mode = source.partition(" ")
    name = next(known for known in SOURCES if known == word)
    settings = MotionSettings(sparse=mode == "sparse", slices="auto" if mode == "auto" else 1)
    before, began = cpu_seconds(), time.perf_counter()
    clips = open_source(video, name, settings).understanding_clips(max_clips=8)
    result = {"wall_s": time.perf_counter() - began, "cpu_s": cpu_seconds() - before, "clips": len(clips)}
    print(json.dumps(result | {"peak_kib": peak_kib(), "exact": all(clip.exact for clip in clips)}))


def measure(source: str, video: Path, reference_python: str) -> dict[str, float]:
    if source == REFERENCE:
        command = [reference_python, str(HERE / "motion_reference.py"), "clips", str(video)]
    else:
        command = [sys.executable, __file__, "--worker", source, str(video)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)  # noqa: S603
    return json.loads(done.stdout.splitlines()[-1])


def interleaved(sources: Iterable[str], video: Path, repeats: int, python: str) -> dict[str, dict[str, float]]:
    """Medians by source, and the least and most CPU seconds."""
    runs: dict[str, list[dict[str, float]]] = {source: [] for source in sources}
    for number in range(repeats):
        for source, found in runs.items():
            found.append(measure(source, video, python))
            print(f"{video.name} {number + 1}/{repeats} {source}: {found[-1]}", file=sys.stderr, flush=True)
    results = {source: {key: median(run[key] for run in found) for key in found[0]} for source, found in runs.items()}
    for source, found in runs.items():
        results[source] |= {"least_cpu_s": min(r["cpu_s"] for r in found), "most_cpu_s": max(r["cpu_s"] for r in found)}
    return results


def table(name: str, length: float, results: dict[str, dict[str, float]]) -> Iterator[str]:
    yield f"| {name} | CPU s | ratio to reference | wall s | × real time | peak MiB | clips |"
    yield "|---|---|---|---|---|---|---|"
    for source, found in results.items():
        ratio = f"{results[REFERENCE]['cpu_s'] / found['cpu_s']:.1f}" if REFERENCE in results else "–"
        cpu = f"{found['cpu_s']:.2f} ({found['least_cpu_s']:.2f}–{found['most_cpu_s']:.2f})"
        wall, speed, peak = found["wall_s"], length / found["wall_s"], found["peak_kib"] / 1024
        yield f"| {source} | {cpu} | {ratio} | {wall:.2f} | {speed:.0f} | {peak:.0f} | {found['clips']:.0f} |"
    yield ""


def budgets(results: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    yield "| budget | wanted | measured | |"
    yield "|---|---|---|---|"
    for name, (ratio, peak, sparse) in BUDGETS.items():
        if name not in results:
            continue
        reference, mpeg4, auto, thin = (
            results[name].get(s) for s in (REFERENCE, "mpeg4", "mpeg4 auto", "mpeg4 sparse")
        )
        if reference and mpeg4 and auto and thin:
            rows = [("CPU ratio", ratio, reference["cpu_s"] / mpeg4["cpu_s"], True)]
            rows += [("CPU ratio, auto", ratio, reference["cpu_s"] / auto["cpu_s"], True)]
            rows += [("peak MiB", peak, max(mpeg4["peak_kib"], auto["peak_kib"]) / 1024, False)]
            if sparse:
                rows += [("CPU ratio, sparse", sparse, reference["cpu_s"] / thin["cpu_s"], True)]
            for what, wanted, found, least in rows:
                held = "held" if (found >= wanted if least else found <= wanted) else "**missed**"
                yield f"| {name}: {what} | {'≥' if least else '≤'} {wanted:g} | {found:.1f} | {held} |"
    yield ""


def length_of(video: Path) -> float:
    with av.open(str(video)) as container:
        return (container.duration or 0) / av.time_base


def machine(python: str | None) -> Iterator[str]:
    model = next((s.split(":")[1].strip() for s in _lines("/proc/cpuinfo") if s.startswith("model name")), "?")
    yield f"- {os.cpu_count()} × {model}, {platform.machine()}, {platform.system()}, shared with other work"
    yield f"- Python {platform.python_version()}, PyAV {av.__version__}, numpy {np.__version__}"
    if python:
        ffmpeg = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True)  # noqa: S607
        query = "from importlib.metadata import version; print(version('motion-vector-extractor'))"
        extractor = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True)  # noqa: S603
        build = ffmpeg.stdout.splitlines()[0].split(" Copyright")[0]
        yield f"- {build}, motion-vector-extractor {extractor.stdout.strip()}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", type=Path, help="more videos to measure")
    parser.add_argument("--reference-python", default=sys.executable if find_spec("mvextractor") else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=[*CLIPS], default=[*CLIPS], help="generated clips to measure")
    parser.add_argument("--hour", action="store_true", help="also read an hour of 480p, to see that memory stays flat")
    parser.add_argument("--no-exactness", action="store_true", help="leave out the comparisons of vectors")
    parser.add_argument("--work", type=Path, help="keep the generated clips in this folder")
    parser.add_argument("-o", "--output", type=Path, help="Markdown file; without it, standard output")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        target = stack.enter_context(arguments.output.open("w")) if arguments.output else sys.stdout
        for line in _report(arguments, work):
            print(line, file=target, flush=True)  # at once: it takes most of an hour, and a part is worth keeping


def _report(arguments: argparse.Namespace, work: Path) -> Iterator[str]:
    python = arguments.reference_python
    sources = ((REFERENCE,) if python else ()) + SOURCES
    yield HEAD.rstrip()
    yield ""
    yield f"Measured {date.today().isoformat()} with `{shlex.join(['python', 'benchmarks/motion.py', *sys.argv[1:]])}`:"
    yield ""
    yield from machine(python)
    yield f"- medians of {arguments.repeats} runs of every source in turn, each in its own process"
    yield ""
    yield "## CPU time and memory"
    yield ""
    results = {}
    for name in arguments.only:
        video = _generated(work, name)
        results[name] = interleaved(sources, video, arguments.repeats, python)
        yield from table(name, CLIPS[name][3], results[name])
    for video in arguments.videos:
        length = length_of(video)
        yield from table(
            f"{video.name}, {length:.0f} s", length, interleaved(sources, video, arguments.repeats, python)
        )
    yield from budgets(results)
    if arguments.hour:
        hour = work / "hour.mp4"
        if not hour.exists():
            repeated(_generated(work, "480p30, 2 min"), hour, 30)
        yield "## One hour of 480p"
        yield ""
        yield from table("480p30, 60 min", 3600, interleaved(("mpeg4", "mpeg4 sparse"), hour, 1, python))
    if not arguments.no_exactness:
        yield from warm_up_table([_generated(work, name) for name in arguments.only] + arguments.videos)
    if python and not arguments.no_exactness:
        yield from exactness_table(arguments.videos, python, work)


def _generated(work: Path, name: str) -> Path:
    video = work / f"{name.replace(', ', '_').replace(' ', '')}.mp4"
    return video if video.exists() else film(video, *CLIPS[name])


if __name__ == "__main__":
    main()
