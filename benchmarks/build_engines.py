"""What building TensorRT-RTX engines takes: seconds, memory and bytes, per engine; see docs/benchmarks/engines.md.

Contract: engines of a preset, or of `slice`, the official widths with two layers of everything, are written with random
weights and built one after the other; ONNX and plan are deleted before the next. Needs no GPU and runs nothing. A
refused engine is a row with the reason. CPU seconds are the builder's own.

    PYTHONPATH=. python benchmarks/build_engines.py slice --precision fp16 -o docs/benchmarks/engines.md
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from dataclasses import replace
from pathlib import Path

from onnx import TensorProto

from export.graphs.registry import ENGINES, GRAPHS, LANGUAGE_MODEL
from export.hollow import trace_hollow
from export.language_model.writing import write_language_model
from export.narrow import narrow
from export.settings import Buckets, EngineSettings, Precision, default_precision
from export.stream import write_streamed
from export.tensorrt import build_plans
from runtime.backends import tensorrt_library
from runtime.errors import VideoLavitError
from videolavit.checkpoints import RandomWeights
from videolavit.config import PRESETS, ModelConfig

HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=("slice", *PRESETS))
    parser.add_argument("--precision", default="fp16", help="of all engines that have it (default: %(default)s)")
    parser.add_argument("--flavour", default="native", choices=("native", "plain"))
    parser.add_argument("--capabilities", default="8.6,8.9,12.0")
    parser.add_argument("--capacity", type=int, default=1024, help="positions of the cache (default: %(default)s)")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    config = sliced(PRESETS["video-lavit-7b"]) if arguments.preset == "slice" else PRESETS[arguments.preset]
    lines = [
        f"`{arguments.preset}`, {tensorrt_library.version('tensorrt-rtx')}, for {arguments.capabilities}, no GPU:",
        "",
        "| engine | precision | ONNX MiB | plan MiB | layers | seconds | CPU seconds | builder's peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in arguments.engines.split(","):
        settings = EngineSettings(
            backend="tensorrt-rtx",
            precision=default_precision(name, arguments.precision, "tensorrt-rtx"),
            flavour=arguments.flavour if name == LANGUAGE_MODEL else None,
            buckets=Buckets(cache_capacities=(min(arguments.capacity, config.language_model.max_positions),)),
            compute_capabilities=tuple(arguments.capabilities.split(",")),
        )
        lines.append(row(name, config, settings))
        print(lines[-1], flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


def row(name: str, config: ModelConfig, settings: EngineSettings) -> str:
    """Build one engine; its line of the table."""
    with tempfile.TemporaryDirectory(prefix="videolavit-build-") as folder:
        try:
            files = write(name, config, settings, Path(folder) / f"{name}.onnx")
            before = cpu_of_children()
            built = build_plans(name, files[0], Path(folder), config, settings)
        except VideoLavitError as error:
            return f"| {name} | {settings.precision} | {error} ||||||"
        cpu = cpu_of_children() - before
        size = sum(path.stat().st_size for path in files) / MIB
        plan = sum(one.path.stat().st_size for one in built) / MIB
        seconds, peak = sum(one.seconds for one in built), max(one.peak_rss for one in built) / MIB
        cells = f"{size:.1f} | {plan:.1f} | {built[0].layers} | {seconds:.1f} | {cpu:.1f} | {peak:.0f}"
        return f"| {name} | {settings.precision} | {cells} |"


def write(name: str, config: ModelConfig, settings: EngineSettings, path: Path) -> list[Path]:
    """The engine's ONNX files with random weights."""
    weights = RandomWeights(config, seed=0)
    if name == LANGUAGE_MODEL:
        tensors = ((key, tensor.numpy()) for key, tensor in weights.tensors(name))
        return write_language_model(config.language_model, config.vocabulary.size, tensors, path, settings)
    traced = trace_hollow(config, GRAPHS[name])
    precision: Precision = settings.precision
    return write_streamed(narrow(traced, HALF[precision]) if precision in HALF else traced, weights, path)


def sliced(config: ModelConfig) -> ModelConfig:
    """Two layers of everything at the widths of `config`, which keeps every kind of operator at its real size."""
    visual = config.visual_tokenizer
    return replace(
        config,
        name=f"{config.name}, two layers",
        motion_tokenizer=replace(config.motion_tokenizer, stages=(1, 1, 1, 1)),
        motion_encoder=replace(config.motion_encoder, depth=2),
        visual_tokenizer=replace(visual, eva=replace(visual.eva, layers=2), layers=2),
        keyframe_decoder=replace(config.keyframe_decoder, depth=2),
        keyframe_unet=replace(config.keyframe_unet, transformer_layers=(None, 1, 1), layers_per_block=1),
        video_unet=replace(config.video_unet, layers_per_block=1),
        language_model=replace(config.language_model, layers=2),
    )


def cpu_of_children() -> float:
    """CPU seconds of processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
