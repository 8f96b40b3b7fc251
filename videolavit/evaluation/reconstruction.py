"""Parts that rebuild videos from a key frame and motion: held-out scenes, and real videos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np

from runtime.commands.reconstruct import Originals
from runtime.geometry import Geometry
from runtime.images import resize_image
from runtime.metrics import psnr, ssim
from runtime.motion.sources import MotionClip, MotionSettings, reconstruction_clips
from runtime.noise import Noise
from runtime.requests import ReconstructionRequest
from videolavit.evaluation.context import Context, Settings
from videolavit.evaluation.record import Measure, Part, Record
from videolavit.evaluation.verdicts import described
from videolavit.shapes import Scene, render, sample_scene

SOURCE_SIDE = 256  # pixels of the video that is rebuilt: a macroblock of it is a cell of the model's motion
MEDIA_CLIPS = 4  # of a real video at most
RAW, TOKENS, ZERO, REPEAT = "raw", "tokens", "zero", "repeat"
_WORDS = {RAW: "raw", TOKENS: "tokens", REPEAT: "repeating", ZERO: "zero motion"}
_PSNR = tuple(Measure(key=f"psnr {name}", label=f"PSNR, {words}", unit="dB") for name, words in _WORDS.items())


@dataclass(frozen=True)
class Rebuilt:
    """A clip and its versions: `raw`, `tokens`, `zero` (no motion) and `repeat` (the key frame); [T, H, W, 3] each."""

    original: np.ndarray
    versions: dict[str, np.ndarray]

    def values(self) -> dict[str, float]:
        """PSNR (dB) and SSIM of each version, means over the frames after the key frame; and what motion gains."""
        values = {}
        for name, frames in self.versions.items():
            pairs = list(zip(self.original[1:], frames[1:], strict=True))
            values[f"psnr {name}"] = float(np.mean([psnr(*pair) for pair in pairs]))
            values[f"ssim {name}"] = float(np.mean([ssim(*pair) for pair in pairs]))
            values[f"clip {name}"] = psnr(self.original[1:], frames[1:])
        for name in (RAW, TOKENS):
            for other in (REPEAT, ZERO):
                values[f"{name} over {other}"] = values[f"psnr {name}"] - values[f"psnr {other}"]
        values["clip raw over repeat"] = values["clip raw"] - values["clip repeat"]
        return values


def motion_clips(video: Path, geometry: Geometry) -> Iterator[MotionClip]:
    """The clips of `video`, whole ones only, as `videolavit reconstruct` takes them. MediaError if it has none."""
    settings = MotionSettings(fps=geometry.reconstruction_fps, rescale=False)
    return reconstruction_clips(video, settings, geometry.frames)


def rebuild(context: Context, video: Path, seed: int, clips: int) -> Iterator[Rebuilt]:
    """The first `clips` clips of `video` in every version, each written and decoded again."""
    geometry = context.geometry
    originals = Originals(video, geometry.reconstruction_fps)
    for clip in islice(motion_clips(video, geometry), clips):
        original = np.stack(list(originals.of(clip, geometry.frames, geometry.video_size)))
        keyframe = resize_image(clip.keyframe, geometry.video_size)
        made = {
            RAW: _made(context, clip, clip.grid, seed),
            TOKENS: _made(context, clip, clip.grid, seed, through_tokens=True),
            ZERO: _made(context, clip, np.zeros_like(clip.grid), seed),
            REPEAT: np.repeat(keyframe[None], len(original), axis=0),
        }
        yield Rebuilt(
            original, {name: context.recorded(frames, geometry.reconstruction_fps) for name, frames in made.items()}
        )


def _made(
    context: Context, clip: MotionClip, motion: np.ndarray, seed: int, through_tokens: bool = False
) -> np.ndarray:
    request = ReconstructionRequest(keyframe=clip.keyframe, motion=motion, through_tokens=through_tokens)
    return context.pipeline.reconstruct(context.resolved(request), Noise(seed)).frames


class Reconstruction(Part):
    """Held-out scenes rebuilt."""

    name = "reconstruction"
    title = "Moving scenes rebuilt"
    about = (
        "Held-out scenes in which all shapes move, from their key frame and their motion vectors, as read or through "
        "motion tokens. They are compared with repeating the key frame and with the same model given zero motion. PSNR "
        "and SSIM are means over the frames after the key frame; PSNR of whole clips is of their mean squared error."
    )
    every = 4
    measures = (
        Measure(key="raw over repeat", label="raw motion over repeating the key frame", unit="dB", target=6.0),
        Measure(key="tokens over repeat", label="motion tokens over repeating the key frame", unit="dB"),
        Measure(key="raw over zero", label="raw motion over zero motion", unit="dB"),
        Measure(key="tokens over zero", label="motion tokens over zero motion", unit="dB"),
        Measure(key="clip raw over repeat", label="raw motion over repeating, PSNR of whole clips", unit="dB"),
        Measure(key="better", label="raw motion better than both baselines"),
        *_PSNR,
        *(Measure(key=f"ssim {name}", label=f"SSIM, {words}", unit="") for name, words in _WORDS.items()),
    )

    def run(self, context: Context, index: int) -> list[Record]:
        number = context.number(self.name, index)
        scene = moving_scene(number)
        video = context.video("source", render(scene, SOURCE_SIDE), context.geometry.reconstruction_fps)
        rebuilt = next(rebuild(context, video, number, 1))
        values = rebuilt.values()
        return [
            Record(
                part=self.name,
                index=index,
                seed=number,
                prompt=described(scene),
                expected=f"above repeating {values['psnr repeat']:.1f} dB and zero motion {values['psnr zero']:.1f} dB",
                seen=f"raw {values['psnr raw']:.1f} dB, tokens {values['psnr tokens']:.1f} dB",
                checks={"better": min(values["raw over repeat"], values["raw over zero"]) > 0},
                values=values,
                strips=context.strips(index, original=rebuilt.original, **rebuilt.versions),
            )
        ]


class Media(Part):
    """Real videos rebuilt."""

    name = "media"
    title = "Real videos rebuilt"
    about = (
        f"The first {MEDIA_CLIPS} clips of each video given by `--media`, from their key frames and motion. The model "
        "never saw the like; what counts is that true motion is better than none."
    )
    measures = (
        Measure(key="better", label="videos for which true motion beats zero motion", target=1.0),
        Measure(key="raw over zero", label="raw motion over zero motion", unit="dB", target=0.0),
        Measure(key="tokens over zero", label="motion tokens over zero motion", unit="dB"),
        Measure(key="raw over repeat", label="raw motion over repeating the key frame", unit="dB"),
        *_PSNR,
    )

    def items(self, wanted: int, settings: Settings) -> int:
        return len(settings.media)

    def run(self, context: Context, index: int) -> list[Record]:
        number = context.number(self.name, index)
        path = context.settings.media[index]
        clips = list(rebuild(context, path, number, MEDIA_CLIPS))
        each = [clip.values() for clip in clips]
        values = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
        return [
            Record(
                part=self.name,
                index=index,
                seed=number,
                prompt=f"{path.name} (clips: {len(clips)})",
                expected=f"above zero motion {values['psnr zero']:.2f} dB",
                seen=f"raw {values['psnr raw']:.2f} dB, tokens {values['psnr tokens']:.2f} dB",
                checks={"better": values["raw over zero"] > 0},
                values=values,
                strips=context.strips(index, original=clips[0].original, **clips[0].versions),
            )
        ]


def moving_scene(number: int) -> Scene:
    """A held-out scene in which every shape moves."""
    scenes = (sample_scene(number + k, split="held-out") for k in count())
    return next(scene for scene in scenes if all(shape.motion.deed == "move" for shape in scene.shapes))
