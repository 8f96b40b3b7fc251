"""What building TensorRT-RTX engines takes: bytes, seconds and memory, for each engine and GPU.

Contract: engines of a preset, or of `slice`, the official widths with two layers of everything, are written with random
weights, streamed as an export does, and built one after the other; ONNX and plans are deleted before the next. Writing
and every build have a process of their own, whose peak resident memory is its own. Needs no GPU and runs no plan. An
engine that is refused is a row with the reason. The document is written again after every engine, so what was measured
stays when the rest is ended.

    PYTHONPATH=. python benchmarks/build_engines.py slice -o docs/benchmarks/engines.md
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steps import measured
from usage import cpu_seconds

from export.commands import choose
from export.engine import write_engine
from export.graphs.registry import ENGINES, LANGUAGE_MODEL
from export.settings import Backend, Buckets, EngineSettings
from export.tensorrt import build_plans
from runtime.backends import tensorrt_library
from runtime.errors import VideoLavitError
from runtime.files import published
from videolavit.checkpoints import Checkpoint, RandomWeights
from videolavit.config import PRESETS, ModelConfig, two_layers
from videolavit.evaluation.report import machine

BACKEND: Backend = "tensorrt-rtx"
MIB = 2**20
COLUMNS = (
    *("engine", "precision", "ONNX MiB", "written in s", "writer's peak MiB"),
    *("for", "plan MiB", "layers", "built in s", "CPU s", "builder's peak MiB"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=("slice", *PRESETS))
    parser.add_argument("--precision", default="fp16", help="as `videolavit export` takes it (default: %(default)s)")
    parser.add_argument("--flavour", default="native", choices=("native", "plain"))
    parser.add_argument(
        "--capabilities",
        nargs="+",
        default=["8.6", "8.9", "12.0"],
        help="each makes a plan; 8.6,8.9 makes one for both (default: 8.6 8.9 12.0)",
    )
    parser.add_argument("--capacity", type=int, default=1024, help="positions of the cache (default: %(default)s)")
    parser.add_argument("--engines", default=",".join(ENGINES), help="separated by commas (default: all)")
    parser.add_argument("-o", "--output", type=Path, help="Markdown document to write")
    arguments = parser.parse_args()
    config = two_layers(PRESETS["video-lavit-7b"]) if arguments.preset == "slice" else PRESETS[arguments.preset]
    chosen = choose(None, BACKEND, arguments.precision, None)
    buckets = Buckets(cache_capacities=(min(arguments.capacity, config.language_model.max_positions),))
    lines = [line_of(COLUMNS), line_of(["---"] * len(COLUMNS))]
    print(*lines, sep="\n")
    for name in arguments.engines.split(","):
        settings = replace(chosen.for_engine(name), buckets=buckets)
        if name == LANGUAGE_MODEL:
            settings = replace(settings, flavour=arguments.flavour)
        for line in rows(name, config, settings, arguments.capabilities):
            print(line, flush=True)
            lines.append(line)
            if arguments.output:
                with published(arguments.output) as staging:
                    staging.write_text("\n".join([*head(arguments, config), *lines]) + "\n", encoding="utf-8")


def head(arguments: argparse.Namespace, config: ModelConfig) -> list[str]:
    """What the document says above its table."""
    flags = f"--precision {arguments.precision} --flavour {arguments.flavour} --capacity {arguments.capacity}"
    return [
        "# Building TensorRT-RTX engines",
        "",
        f"Written by `benchmarks/build_engines.py {arguments.preset} {flags}` with random weights of `{config.name}`;",
        "do not edit. Built without a GPU, not run. Seconds are of the machine as it was, CPU seconds the builder's.",
        "",
        f"{tensorrt_library.version(BACKEND)} on {machine()}.",
        "",
    ]


def rows(name: str, config: ModelConfig, settings: EngineSettings, capabilities: Sequence[str]) -> Iterator[str]:
    """Write one engine and build its plans; their lines of the table."""
    first = [name, settings.precision]
    with tempfile.TemporaryDirectory(prefix="videolavit-build-") as folder:
        written = measured(write, name, config, settings, Path(folder))
        if "problem" in written:
            yield line_of([*first, written["problem"]])
            return
        first += [f"{written['bytes'] / MIB:.1f}", f"{written['s']:.1f}", f"{written['peak RSS GiB'] * 1024:.0f}"]
        for targets in capabilities:
            own = replace(settings, compute_capabilities=tuple(targets.split(",")))
            built = measured(build, name, config, own, Path(folder))
            yield line_of([*first, targets, *built_cells(built)])


def write(name: str, config: ModelConfig, settings: EngineSettings, folder: Path) -> dict[str, Any]:
    """The engine's ONNX files in `folder`, and their bytes; or why not."""
    checkpoint = Checkpoint(config, tokenizer=b"", weights=RandomWeights(config, seed=0))
    try:
        files = write_engine(checkpoint, name, folder / f"{name}.onnx", settings)
    except VideoLavitError as error:
        return {"problem": str(error)}
    return {"bytes": sum(path.stat().st_size for path in files)}


def build(name: str, config: ModelConfig, settings: EngineSettings, folder: Path) -> dict[str, Any]:
    """The engine's plans, measured and deleted; or why not."""
    before = cpu_seconds()
    try:
        plans = build_plans(name, folder / f"{name}.onnx", folder / "plans", config, settings)
    except VideoLavitError as error:
        return {"problem": str(error)}
    size = sum(plan.path.stat().st_size for plan in plans)
    for plan in plans:
        plan.path.unlink()
    return {
        "bytes": size,
        "layers": plans[0].layers,
        "build s": sum(plan.seconds for plan in plans),
        "cpu": cpu_seconds() - before,
        "peak": max(plan.peak_rss for plan in plans),
    }


def built_cells(built: dict[str, Any]) -> list[str]:
    """The cells of a plan."""
    if "problem" in built:
        return [built["problem"]]
    cells = [f"{built['bytes'] / MIB:.1f}", str(built["layers"]), f"{built['build s']:.1f}"]
    return [*cells, f"{built['cpu']:.1f}", f"{built['peak'] / MIB:.0f}"]


def line_of(cells: Sequence[str]) -> str:
    """A line of the table; cells that are left out at its end are empty."""
    filled = [cell.replace("|", "/") for cell in cells]
    return f"| {' | '.join([*filled, *[''] * (len(COLUMNS) - len(filled))])} |"


if __name__ == "__main__":
    main()
