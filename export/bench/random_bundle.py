"""A bundle of random weights at the sizes of a preset, for a benchmark without any weights.

Contract: `plan` says what the engines that the stages need will take, and `check` refuses before anything is written
when this machine has no room. `write` streams weights straight into the engines (`export.engine`), so that memory holds
a tensor at a time; nothing is compared with torch. The bundle is complete but for the engines that no stage asked for.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.bench.source import Source
from export.build import manifest_of
from export.engine import Built, build_apart
from export.graphs.registry import LANGUAGE_MODEL, components_of
from export.plan import BYTES, available_memory
from export.settings import EngineChoice, EngineSettings, ExportSettings, Precision
from runtime.backends.onnxruntime import choose_provider
from runtime.bench.settings import BenchSettings
from runtime.bench.stages import STAGES
from runtime.bundle import Bundle, write_manifest
from runtime.errors import EnvironmentProblem
from runtime.geometry import VAE_FACTOR
from videolavit.config import ModelConfig
from videolavit.inventory import inventory

GIB = 2**30
# Peak features of an engine, in multiples of its first width at full size; `bench --preset shapes --random-weights` in
# fp32 with key frames of 256x256 to 512x512 had at most 58 and 6.3.
UNET_FEATURES = 60
KEYFRAME_VAE_FEATURES = 7
PROCESS = 300 * 2**20  # bytes of a process with ONNX Runtime and nothing loaded
WRITER = 900 * 2**20  # of one with torch and the exporter
TORCH = 400 * 2**20  # of torch, beside weights
TENSOR_FORMS = 4  # a tensor is in memory as it is drawn, stored, widened and encoded
# Bytes that a parameter takes when ONNX Runtime has an engine loaded on a CPU. Floats are stored in 16 bits and widened
# to 32; integers are packed a second time. 7 billion parameters in int4 took 0.93.
RUNNING: dict[str, float] = {"fp32": 6.0, "fp16": 6.0, "bf16": 6.0, "int8": 2.3, "int4": 1.2}


@dataclass(frozen=True)
class Need:
    """What one engine takes.

    Attributes:
        engine, precision: which.
        parameters: of the component it is made from.
        disk: bytes of its files.
        writing: most bytes of memory while it is written.
        running: most bytes of memory while it is measured, activations included.
    """

    engine: str
    precision: Precision
    parameters: int
    disk: int
    writing: int
    running: int


def engines_of(stages: Sequence[str]) -> list[str]:
    """Engines that `stages` need, in the order of the stages."""
    return list(dict.fromkeys(name for stage in stages for name in STAGES[stage].engines))


def plan(
    config: ModelConfig, stages: Sequence[str], precision: Precision, settings: BenchSettings, copies: int = 0
) -> list[Need]:
    """What every engine will take, with `copies` of its weights in float32 beside it for peers.

    Integer precisions are the language model's; other engines are then in fp32 on a CPU, as in the profile `cpu`, and
    in fp16 elsewhere. Raises UsageError for a precision that the language model cannot have.
    """
    floats: Precision = "fp32" if choose_provider(settings.provider) == "cpu" else "fp16"
    export = ExportSettings(
        default=EngineSettings(precision=precision if precision in ("fp32", "fp16") else floats),
        engines={LANGUAGE_MODEL: EngineChoice(precision=precision)},
    )
    return [_need(config, name, export.for_engine(name).precision, settings, copies) for name in engines_of(stages)]


def check(needs: Sequence[Need], folder: Path) -> None:
    """Raise EnvironmentProblem when disk or memory will not do."""
    disk, free = sum(need.disk for need in needs), shutil.disk_usage(folder).free
    if disk > free:
        raise EnvironmentProblem(
            f"{folder}: the engines take {disk / GIB:.1f} GiB, {free / GIB:.1f} GiB are free; set TMPDIR to a folder "
            "with more room, or measure fewer --stages or --layers"
        )
    memory = available_memory()
    largest = max(needs, key=lambda need: max(need.writing, need.running))
    most = max(largest.writing, largest.running)
    if most > memory:
        doing = "run" if largest.running >= largest.writing else "write"
        raise EnvironmentProblem(
            f"{largest.engine} in {largest.precision}: takes about {most / GIB:.1f} GiB of memory to {doing}, "
            f"{memory / GIB:.1f} GiB are free; take fewer --layers, a smaller --size, a narrower --precision, "
            "or leave its stages out with --stages"
        )


def write(
    source: Source,
    folder: Path,
    needs: Sequence[Need],
    on_engine: Callable[[int], None] = lambda count: None,
) -> Bundle:
    """Write the engines of `needs` as a bundle into the empty `folder`; `on_engine` is told how many are done.

    Raises EnvironmentProblem when a process that writes dies, UsageError when the disk is full.
    """
    checkpoint = source.checkpoint()
    built: list[Built] = []
    for need in needs:
        own = EngineSettings(precision=need.precision)
        built.append(build_apart(checkpoint, need.engine, folder, own, compare=False))
        on_engine(len(built))
    write_manifest(folder, manifest_of(checkpoint, folder, built, source="random"))
    return Bundle.open(folder, check_hashes=False)


def _need(config: ModelConfig, name: str, precision: Precision, settings: BenchSettings, copies: int) -> Need:
    sizes = [math.prod(shape) for part in components_of(name) for shape in inventory(config, part).values()]
    parameters = sum(sizes)
    head = config.vocabulary.size * config.language_model.hidden_size  # of the table and of the last matrix alike
    disk = parameters * BYTES[precision]
    if name == "token_embedding":
        parameters, disk = head, head * BYTES[precision]
    elif name == LANGUAGE_MODEL:
        parameters -= head
        # The last matrix of an int4 model is int8.
        disk = (parameters - head) * BYTES[precision] + head * BYTES["int8" if precision == "int4" else precision]
    return Need(
        engine=name,
        precision=precision,
        parameters=parameters,
        disk=int(disk),
        writing=WRITER + TENSOR_FORMS * 4 * max(sizes),
        running=PROCESS
        + int(parameters * RUNNING[precision])
        + copies * (TORCH + 4 * parameters)
        + _activations(config, name, settings),
    )


def _activations(config: ModelConfig, name: str, settings: BenchSettings) -> int:
    """Bytes of the largest activations of an engine at the sizes that are measured, roughly.

    For UNets these are `UNET_FEATURES` for each channel and place of the first level in both branches (attention holds
    a part of its scores at a time); for decoders of pictures a few layers of features at full size; all in float32.
    """
    geometry = config.geometry
    size = settings.size or geometry.video_size
    keyframe = settings.keyframe_size or geometry.keyframe_size
    cells = size[0] * size[1] // VAE_FACTOR**2
    keyframe_cells = keyframe[0] * keyframe[1] // VAE_FACTOR**2
    if name == "video_unet":
        return 4 * UNET_FEATURES * 2 * geometry.frames * cells * config.video_unet.block_out_channels[0]
    if name == "keyframe_unet":
        return 4 * UNET_FEATURES * 2 * keyframe_cells * config.keyframe_unet.block_out_channels[0]
    if name == "video_vae_decoder":
        chunk = config.defaults.decode_chunk
        return 4 * 4 * chunk * math.prod(size) * config.video_vae.block_out_channels[1]
    if name == "keyframe_vae_decoder":
        return 4 * KEYFRAME_VAE_FEATURES * math.prod(keyframe) * config.keyframe_vae.block_out_channels[1]
    if name == LANGUAGE_MODEL:
        llm = config.language_model
        positions = max(settings.contexts) + settings.tokens
        cache = 2 * llm.layers * 2 * llm.kv_heads * (llm.hidden_size // llm.heads) * positions * 4  # two rows
        return cache + 2 * 4 * positions * (4 * llm.hidden_size + 3 * llm.intermediate_size)
    return 0
