"""What fewer denoising steps cost a model that means something: network calls, seconds, and what is seen afterwards.

    PYTHONPATH=. python benchmarks/samplers.py engines/shapes -n 20 -o docs/benchmarks/samplers.md

Contract: for each held-out caption, every other one of two shapes, the runtime writes the tokens of one clip with its
defaults, of which the best by its tokens is taken. Every row then makes the key frame, or from one key frame the clip,
of the same tokens and the same noise with other options of `videolavit generate`; rows take turns, beginning with
another one each time. Told are

- network calls, where a call that is guided is one of two rows;
- seconds of one denoising loop and all that leads to it, without decoding: the median over captions;
- the distance from where the equation leads: PSNR to the same made with many steps of the second order;
- whether what was asked for is seen in it, as `videolavit evaluate shapes` judges it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from runtime.bench.run import Machine, machine
from runtime.bench.settings import BenchSettings
from runtime.bundle import Bundle, find
from runtime.detokenizers import KeyframeDetokenizer, KeyframeSettings, VideoDetokenizer, VideoSettings
from runtime.diffusion import guided_calls
from runtime.engines import EngineSet, processors
from runtime.errors import UsageError, VideoLavitError
from runtime.files import check_output, published
from runtime.geometry import VAE_FACTOR
from runtime.media_tokens import MotionTokenizer
from runtime.metrics import psnr
from runtime.noise import Noise
from runtime.pipeline import Pipeline
from runtime.progress import Stopwatch, ignore
from runtime.requests import Resolved, VideoRequest, keyframe_schedule, resolve, video_schedule
from runtime.schedulers import make_schedule
from runtime.token_writer import GENERATE
from videolavit.evaluation.context import Context, Settings, described_scene
from videolavit.evaluation.judge import look
from videolavit.evaluation.statistics import bootstrap, wilson
from videolavit.evaluation.verdicts import check_one, check_two
from videolavit.shapes import Scene

Options = dict[str, Any]  # fields of a VideoRequest

WIDE, NARROW = (0.002, 700.0), (0.02, 80.0)  # noise levels: those of the scheduler, and what clips from noise need
EULER: Options = {"video_start": "noise", "video_sampler": "euler", "video_spacing": "karras", "video_sigmas": WIDE}
SECOND: Options = {"video_start": "noise", "video_sampler": "dpmpp-2m", "video_spacing": "karras"}
HEUN: Options = {"video_start": "noise", "video_sampler": "heun", "video_spacing": "karras"}
VIDEO_EXACT: Options = {**HEUN, "video_sigmas": WIDE, "video_steps": 25}
VIDEO_ROWS: tuple[Options, ...] = (
    {},
    {"video_steps": 2, "video_sigmas": (0.02, 0.5)},
    {"video_steps": 3},
    {"video_steps": 6},
    {"video_sigmas": (0.02, 6.0)},
    {"video_steps": 6, **SECOND, "video_spacing": "ays", "video_sigmas": NARROW},
    {"video_steps": 4, **SECOND, "video_spacing": "ays", "video_sigmas": NARROW},
    {"video_steps": 12, **EULER},
    {"video_steps": 6, **EULER, "video_sigmas": NARROW},
    {"video_steps": 8, **SECOND, "video_sigmas": WIDE},
    {"video_steps": 6, **SECOND, "video_sigmas": NARROW},
    {"video_steps": 4, **HEUN, "video_sigmas": NARROW},
)
DDIM: Options = {"keyframe_sampler": "ddim", "keyframe_spacing": "trailing"}
KEYFRAME_EXACT: Options = {"keyframe_sampler": "heun", "keyframe_spacing": "karras", "keyframe_steps": 50}
KEYFRAME_ROWS: tuple[Options, ...] = (
    {},
    {"keyframe_steps": 4},
    {"keyframe_steps": 6},
    {"keyframe_steps": 16, **DDIM},
    {"keyframe_steps": 8, **DDIM},
    {"keyframe_spacing": "karras"},
    {"image_guidance_interval": (0.3, 5.0)},
)


@dataclass(frozen=True)
class Tokens:
    """What the language model wrote of one caption: visual codes [n], motion codes [K]; and the seed of its noise."""

    scene: Scene
    codes: np.ndarray
    motion: np.ndarray
    seed: int


@dataclass
class Row:
    """What was found of one way to take the steps: `calls` in words; seconds, dB and as asked or not by caption."""

    options: Options
    calls: str
    seconds: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)


class Detokenizers:
    """Both detokenizers of a bundle, by options of a request."""

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self.manifest = bundle.manifest
        self._engines = EngineSet(bundle, threads=threads)
        self._watch = Stopwatch()
        self._keyframes = KeyframeDetokenizer(self._engines, self.manifest, ignore, self._watch)
        self._videos = VideoDetokenizer(self._engines, self.manifest, ignore, self._watch)

    def settings(self, options: Options) -> Resolved:
        """A request for a clip with `options`, every field set. Raises UsageError."""
        return resolve(VideoRequest(prompt="a clip", **options), self.manifest.geometry, self.manifest.defaults)

    def keyframe(self, tokens: Tokens, options: Options) -> tuple[np.ndarray, float]:
        """Picture [H, W, 3] uint8, and seconds."""
        settings = self.settings(options)
        before = self._watch.seconds.get("keyframe", 0.0)
        _, picture = self._keyframes.decode(
            tokens.codes, KeyframeSettings.of(settings, settings.keyframe_size), Noise(tokens.seed)
        )
        return picture, self._watch.seconds["keyframe"] - before

    def video(self, tokens: Tokens, keyframe: np.ndarray, options: Options) -> tuple[np.ndarray, float]:
        """Frames [T, H, W, 3] uint8, and seconds without decoding."""
        settings = self.settings(options)
        width, height = settings.size
        latent_size = (height // VAE_FACTOR, width // VAE_FACTOR)
        motion = MotionTokenizer(self._engines, self.manifest.geometry, GENERATE).decode(
            tokens.motion[None], latent_size
        )[0]
        before = self._watch.seconds.get("video", 0.0)
        _, frames = self._videos.decode(
            keyframe, motion, VideoSettings.of(settings, self.manifest), Noise(tokens.seed + 1)
        )
        return frames, self._watch.seconds["video"] - before

    def keyframe_calls(self, options: Options) -> str:
        """Network calls of a key frame, in words."""
        settings = self.settings(options)
        schedule = make_schedule(self.manifest.keyframe_scheduler, settings.keyframe_steps, keyframe_schedule(settings))
        return _calls(guided_calls(schedule, settings.image_guidance, settings.image_guidance_interval))

    def video_calls(self, options: Options) -> str:
        """Network calls of a clip, in words."""
        settings = self.settings(options)
        schedule = make_schedule(self.manifest.video_scheduler, settings.video_steps, video_schedule(settings))
        scale = np.array(settings.video_guidance)
        return _calls(guided_calls(schedule, scale, settings.video_guidance_interval))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="a folder or a name")
    parser.add_argument("-n", type=int, default=20, help="captions (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="Markdown document to write, or to replace")
    parser.add_argument("--threads", type=int, help="of the processor (default: all)")
    arguments = parser.parse_args()
    try:
        if arguments.n < 1:
            raise UsageError(f"-n {arguments.n}: must be at least 1")
        check_output(arguments.output, (".md",), force=True)
        bundle = Bundle.open(find(arguments.bundle))
        text = measure(bundle, arguments.n, arguments.threads)
        with published(arguments.output) as staging:
            staging.write_text(text, encoding="utf-8")
    except VideoLavitError as error:
        sys.exit(f"error: {error}")


def measure(bundle: Bundle, count: int, threads: int | None) -> str:
    """The document, after `count` captions."""
    makers = Detokenizers(bundle, threads)
    keyframe_rows = [Row(options, makers.keyframe_calls(options)) for options in KEYFRAME_ROWS]
    video_rows = [Row(options, makers.video_calls(options)) for options in VIDEO_ROWS]
    with tempfile.TemporaryDirectory(prefix="videolavit-samplers-") as folder, Pipeline(bundle, threads=threads) as own:
        context = Context(own, Path(folder), Settings())
        written = [write_tokens(context, index) for index in range(count)]
        for index, tokens in enumerate(written):
            exact, _ = makers.keyframe(tokens, KEYFRAME_EXACT)
            for row in _turned(keyframe_rows, index):
                picture, seconds = makers.keyframe(tokens, row.options)
                _keep(row, seconds, psnr(picture, exact), seen_in_picture(tokens.scene, picture))
            keyframe, _ = makers.keyframe(tokens, {})
            exact, _ = makers.video(tokens, keyframe, VIDEO_EXACT)
            for row in _turned(video_rows, index):
                frames, seconds = makers.video(tokens, keyframe, row.options)
                distance = mean(psnr(a, b) for a, b in zip(frames, exact, strict=True))
                recorded = context.recorded(frames, context.geometry.fps)
                _keep(row, seconds, distance, seen_in_clip(tokens.scene, recorded))
            print(f"{index + 1} of {count} captions", file=sys.stderr, flush=True)
    here = machine(BenchSettings(threads=threads or processors()))
    return page(bundle, here, count, keyframe_rows, video_rows)


def write_tokens(context: Context, index: int) -> Tokens:
    """What the model writes of caption `index` with its defaults."""
    number = context.number("samplers", index)
    scene, prompt = described_scene(number, 1 + index % 2)
    manifest = context.pipeline.manifest
    request = VideoRequest(prompt=prompt, finalists=1, keyframe_steps=2, video_steps=2)
    clip = next(context.pipeline.generate_video(request, Noise(number)))
    codes = manifest.vocabulary.visual_codes_of(clip.image_ids)
    motion = manifest.vocabulary.motion_codes_of(clip.motion_ids, len(clip.motion_ids))
    return Tokens(scene, codes, motion, number)


def seen_in_picture(scene: Scene, picture: np.ndarray) -> bool:
    """Whether a picture [H, W, 3] shows colour and kind of all shapes of the scene and nothing else."""
    asked = sorted((shape.colour, shape.kind) for shape in scene.shapes)
    return sorted((one.colour, one.kind) for one in look(picture[None])) == asked


def seen_in_clip(scene: Scene, frames: np.ndarray) -> bool:
    """Whether colour, kind and direction of all shapes are seen as described."""
    seen = look(frames)
    if len(scene.shapes) == 1:
        return check_one(scene.shapes[0], seen)["all"]
    return check_two(scene, seen)["both"]


def page(bundle: Bundle, here: Machine, count: int, keyframe_rows: Sequence[Row], video_rows: Sequence[Row]) -> str:
    """The document as Markdown; the first row of each kind is the one to whose seconds others are compared."""
    versions = ", ".join(f"{name} {version}" for name, version in here.versions.items())
    lines = [
        "# Fewer denoising steps: what they save and what they cost",
        "",
        f"Made by `python {shlex.join(sys.argv)}` on {here.date}.",
        f"Bundle `{bundle.manifest.name}`, weights {bundle.manifest.source[:12]}, on",
        f"{here.processor}, {here.cores} processors, {here.threads} threads used; Python {here.python}, {versions}.",
        "",
        f"{count} held-out captions, every other one of two shapes; a line makes the same tokens with the same noise.",
        "Seconds are of one denoising loop, medians, and the lines take turns. `dB to exact` is the mean PSNR to",
        f"`{flags(VIDEO_EXACT)}`, of key frames to",
        f"`{flags(KEYFRAME_EXACT)}`, from the same noise; from the moved key frame",
        "a clip comes out otherwise, however many steps it takes. `as asked` is the share in which colour,",
        "kind and direction of every shape are seen as described (of a key frame colour and kind); what",
        "the language model wrote wrongly no sampler can mend, so compare lines. In brackets 95 % intervals.",
        "",
    ]
    for title, rows in (("A clip from its key frame", video_rows), ("A key frame", keyframe_rows)):
        lines += [f"## {title}", "", "| options | network calls | s | of the default's | dB to exact | as asked |"]
        lines.append("|---|---|---:|---:|---:|---:|")
        usual = median(rows[0].seconds)
        for row in rows:
            seconds, near = median(row.seconds), bootstrap(row.distances)
            share = wilson(sum(row.right), count)
            lines.append(
                f"| {f'`{flags(row.options)}`' if row.options else 'the default'} | {row.calls} | {seconds:.2f} "
                f"| {seconds / usual:.2f} | {mean(row.distances):.1f} ({near[0]:.1f} to {near[1]:.1f}) "
                f"| {mean(row.right):.0%} ({share[0]:.0%} to {share[1]:.0%}) |"
            )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def flags(options: Options) -> str:
    """Options as `videolavit generate` takes them."""
    return " ".join(f"--{name.replace('_', '-')} {_word(value)}" for name, value in options.items())


def _word(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    whole = all(isinstance(part, int) for part in value)  # a size; else noise levels
    return ("x" if whole else "-").join(f"{part:g}" for part in value)


def _calls(guided: Sequence[bool]) -> str:
    alone = len(guided) - sum(guided)
    return f"{len(guided)}, {alone} of one row" if alone else f"{len(guided)}"


def _turned(rows: Sequence[Row], by: int) -> list[Row]:
    by %= len(rows)
    return [*rows[by:], *rows[:by]]


def _keep(row: Row, seconds: float, distance: float, right: bool) -> None:
    row.seconds.append(seconds)
    row.distances.append(distance)
    row.right.append(right)


if __name__ == "__main__":
    main()
