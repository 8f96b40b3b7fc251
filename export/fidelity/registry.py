"""Which golden file is measured how.

Contract: a file belongs to the family whose `component` begins as the file's own does; its name plays no part. A
`Case` is one file on one backend. `uncovered` names the files of a folder that no case reads, explanations aside.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.fidelity import keyframe, language, media, motion, tasks, understanding, video, visual
from export.fidelity.backends import BACKENDS, NUMPY, ONNX, TORCH, Engines, OnnxEngines, TorchEngines
from export.fidelity.golden import Golden, load, read_meta
from export.fidelity.measure import Measurement
from runtime.errors import CheckpointError

Measure = Callable[[Golden, Engines], Iterator[Measurement]]
HostMeasure = Callable[[Golden], Iterator[Measurement]]
Files = Callable[[dict[str, Any]], list[str]]
EXPLANATIONS = (".md", ".txt")


def _no_files(meta: dict[str, Any]) -> list[str]:
    return []


def _tokenizer(meta: dict[str, Any]) -> list[str]:
    return [language.TOKENIZER]


def _streams(meta: dict[str, Any]) -> list[str]:
    return [name for name, _ in media.stream_names(meta)]


@dataclass(frozen=True)
class Family:
    """Golden files of one kind.

    Attributes:
        component: what is measured, for people.
        begins: how the component in a file's metadata begins.
        torch, onnx: what to measure over engines of that backend; None where nothing is.
        host: what to measure of the runtime's own arithmetic.
        files: further files of the folder that a case reads.
    """

    component: str
    begins: str
    torch: Measure | None = None
    onnx: Measure | None = None
    host: HostMeasure | None = None
    files: Files = _no_files


def _both(component: str, begins: str, measure: Measure, host: HostMeasure | None = None) -> Family:
    return Family(component, begins, measure, measure, host)


FAMILIES = (
    _both("vector quantiser", "VectorQuantizer", motion.quantizer),
    _both("motion tokenizer", "MotionTransformerTokenizer", motion.motion_tokenizer, motion.motion_tokenizer_host),
    _both(
        "motion condition encoder", "MotionConditionEncoder", motion.condition_encoder, motion.condition_encoder_host
    ),
    _both("token predictor and merger", "TokenPredictor", visual.predictor_and_merger),
    _both("dynamic visual tokenizer", "DynamicVisualTokenizer", visual.visual_tokenizer),
    _both("EVA vision transformer", "EVAVisionTransformer", visual.eva),
    _both("key-frame decoder", "HighresVQDecoder", visual.keyframe_decoder, visual.keyframe_decoder_host),
    Family("video UNet", "UNetSpatioTemporalConditionModel", video.unet_torch, video.unet),
    Family(
        "video detokenizer",
        "VideoDetokenizer.reconstruct_from_token",
        video.detokenizer_torch,
        video.detokenizer_engines,
        video.detokenizer_host,
    ),
    _both("key-frame detokenizer", "VideoLaVITforGeneration.image_decoding", keyframe.keyframe, keyframe.keyframe_host),
    Family(
        "token generation",
        "VideoLaVITforGeneration.generate_",
        language.generation,
        language.generation,
        language.generation_host,
        _tokenizer,
    ),
    Family(
        "understanding",
        "VideoLaVITUnderstandingRunner",
        understanding.understanding,
        understanding.understanding,
        understanding.understanding_host,
        _tokenizer,
    ),
    Family("picture preprocessing", "LaVITImageProcessor", host=media.image_processor),
    Family("motion vectors of a frame", "extract_motions (", host=media.extracted_motion),
    Family("motion of a clip", "MotionVectorProcessor", host=media.motion_processor),
    Family("clips of a video", "extract_motions + ", host=media.video, files=_streams),
    Family("token clean-up", "video_decoding", host=media.token_clean_up),
    Family("order of stages", tasks.COMPONENT, tasks.reference, None, tasks.runtime, _tokenizer),
)


@dataclass(frozen=True)
class Case:
    """One golden file on one backend. `files`: everything it reads, below its folder."""

    path: Path
    component: str
    backend: str
    family: Family
    files: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.path.stem} ({self.backend})"

    def measure(self) -> list[Measurement]:
        """Run the case. What keeps it from running to its end counts as a measurement that failed."""
        found: list[Measurement] = []
        try:
            golden = tasks.load(self.path) if self.path.suffix == ".json" else load(self.path)
            with tempfile.TemporaryDirectory(prefix="videolavit-fidelity-") as folder:
                engines = OnnxEngines(Path(folder)) if self.backend == ONNX else TorchEngines()
                found.extend(self._measurements(golden, engines))
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            found.append(Measurement(f"stopped by {type(error).__name__}: {reason}", float("inf"), 0))
        return found

    def _measurements(self, golden: Golden, engines: Engines) -> Iterator[Measurement]:
        if self.backend == NUMPY and self.family.host is not None:
            return self.family.host(golden)
        measure = self.family.onnx if self.backend == ONNX else self.family.torch
        return measure(golden, engines) if measure is not None else iter(())


def cases(folder: Path) -> list[Case]:
    """Every case of a folder of golden files, in the order of their names.

    Raises CheckpointError when `folder` is none, or a file in it says nothing about itself.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; name the folder with the golden files")
    found = []
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.json"))):
        meta = tasks.read_meta(path) if path.suffix == ".json" else read_meta(path)
        family = _family(str(meta.get("component", "")))
        if family is None:
            continue
        weights = [meta["weights_from"]] if meta.get("weights_from") else []
        files = (path.name, *weights, *family.files(meta))
        measures = {TORCH: family.torch, ONNX: family.onnx, NUMPY: family.host}
        found += [Case(path, family.component, b, family, files) for b in BACKENDS if measures[b] is not None]
    return found


def uncovered(folder: Path, covered: list[Case]) -> list[str]:
    """Files below `folder` that no case reads, explanations aside."""
    read = {name for case in covered for name in case.files}
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in EXPLANATIONS)
    return [name for name in (path.relative_to(folder).as_posix() for path in files) if name not in read]


def _family(component: str) -> Family | None:
    return next((family for family in FAMILIES if component.startswith(family.begins)), None)
