"""ONNX -> TensorRT plan, for TensorRT and TensorRT-RTX.

Contract: each plan is built by a process of its own, which gives all memory back when it ends and whose death, of
hunger for memory above all, is an error here and no more. What is refused is one line naming engine, node and operator.
Nothing is left under the plan's name unless it is whole.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import onnx

from export.graphs.registry import LANGUAGE_MODEL
from export.settings import EngineSettings, check_fp8
from export.tensorrt_shapes import Profile, Range, capacities, profiles
from export.tensorrt_worker import Report, Request, Spans
from runtime.backends import cuda, tensorrt_library
from runtime.backends.tensorrt_plan import PLAN
from runtime.bundle import BuiltFor
from runtime.errors import EnvironmentProblem, UsageError
from runtime.files import cache_folder, writing
from videolavit.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class BuiltPlan:
    """A plan: its file, what it runs on, layers of its network, seconds and peak resident bytes of its build."""

    path: Path
    built_for: BuiltFor
    layers: int
    seconds: float
    peak_rss: int


def build_plans(
    engine: str,
    model: Path,
    folder: Path,
    config: ModelConfig,
    settings: EngineSettings,
) -> list[BuiltPlan]:
    """Build the plans of `engine` from its ONNX file into `folder`; several when its cache has several fixed lengths.

    Args:
        engine: name in `export.graphs.registry`, also with a task before it, which only names the file.

    Raises:
        EnvironmentProblem: the library or the GPU it needs is missing, or the machine's memory did not suffice.
        UsageError: TensorRT does not take the graph, or the settings ask for what it cannot do.
    """
    plain = engine.rpartition("/")[2]
    if plain != LANGUAGE_MODEL or settings.attention == "plain":
        shapes = profiles(plain, config, settings.buckets)
        return [build_plan(engine, model, folder / f"{engine}{PLAN}", shapes, settings)]
    built = []
    for length in capacities(config, settings.buckets):
        shapes = profiles(plain, config, settings.buckets, length)
        built.append(build_plan(engine, model, folder / f"{engine}.c{length}{PLAN}", shapes, settings))
    return built


def build_plan(
    engine: str, model: Path, target: Path, shapes: Sequence[Profile], settings: EngineSettings
) -> BuiltPlan:
    """Build one plan for the optimisation profiles `shapes`. Raises as `build_plans`."""
    built_for = BuiltFor(
        library=tensorrt_library.version(settings.backend),
        compute_capabilities=_compute_capabilities(engine, settings),
    )
    check_fp8(engine, replace(settings, compute_capabilities=built_for.compute_capabilities))
    if settings.refittable:
        _need_gpu(engine)
    first, *rest = shapes
    alike = {dim: span for dim, span in first.items() if all(profile[dim] == span for profile in rest)}
    request = Request(
        backend=settings.backend,
        model=str(model.resolve()),
        target=str(target.resolve()),
        profiles=_with_inputs(model, shapes),
        fixed={dim: span.low for dim, span in alike.items() if span.low == span.high},
        workspace=settings.workspace,
        compute_capabilities=settings.compute_capabilities if settings.backend == "tensorrt-rtx" else (),
        without_weights=settings.refittable,
        tf32=settings.precision != "fp32",
        timing_cache=_timing_cache(built_for) if settings.backend == "tensorrt" else None,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    report = _run(engine, request)
    if report.problem is not None:
        kind = UsageError if report.exit_code == UsageError.exit_code else EnvironmentProblem
        raise kind(f"engine {engine}: {report.problem}")
    return BuiltPlan(target, built_for, report.layers, report.seconds, report.peak_rss)


def _timing_cache(built_for: BuiltFor) -> str | None:
    """File in which the library keeps what it measured on this GPU, if it may; TensorRT-RTX measures nothing."""
    folder = cache_folder()
    if folder is None:
        return None
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    name = f"{built_for.library} {' '.join(built_for.compute_capabilities)}.timing".replace(" ", "-")
    return str(folder.resolve() / name)


def _compute_capabilities(engine: str, settings: EngineSettings) -> tuple[str, ...]:
    """What the plan will run on; empty for all that TensorRT-RTX covers. Full TensorRT builds for the GPU it sees."""
    if settings.backend == "tensorrt-rtx":
        return settings.compute_capabilities
    here = cuda.open_device().compute_capability
    if settings.compute_capabilities not in ((), (here,)):
        raise UsageError(
            f"engine {engine}: TensorRT builds for the GPU of this machine, {here}, not for "
            f"{', '.join(settings.compute_capabilities)}; run the export there, or take --backend tensorrt-rtx"
        )
    return (here,)


def _need_gpu(engine: str) -> None:
    """The builder leaves weights out only where it can reach a GPU, whatever GPU the plan is for."""
    try:
        cuda.open_device()
    except EnvironmentProblem as error:
        raise EnvironmentProblem(
            f"engine {engine}: a plan without weights can only be built where there is a GPU, or build it with weights "
            f"({error})"
        ) from error


def _with_inputs(model: Path, shapes: Sequence[Profile]) -> tuple[dict[str, Spans], ...]:
    """Ranges of the free dimensions -> ranges of the inputs that have any. Raises UsageError for one left open."""
    graph = onnx.load(model, load_external_data=False).graph
    declared = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in graph.input}
    free = {name: dims for name, dims in declared.items() if any(isinstance(dim, str) for dim in dims)}
    for name, dims in free.items():
        unknown = [dim for dim in dims if isinstance(dim, str) and dim not in shapes[0]]
        if unknown:
            raise UsageError(f"{model}: input {name} has a free dimension {unknown[0]} without sizes; export it again")
    return tuple({name: _spans(dims, profile) for name, dims in free.items()} for profile in shapes)


def _spans(dims: Sequence[int | str], profile: Profile) -> Spans:
    ranges = [Range(dim, dim, dim) if isinstance(dim, int) else profile[dim] for dim in dims]
    return tuple(r.low for r in ranges), tuple(r.best for r in ranges), tuple(r.high for r in ranges)


def _run(engine: str, request: Request) -> Report:
    command = [sys.executable, "-m", "export.tensorrt_worker"]
    done = subprocess.run(command, cwd=ROOT, input=msgspec.json.encode(request), capture_output=True, check=False)  # noqa: S603
    if done.returncode:
        raise EnvironmentProblem(f"engine {engine}: {_end(done)}")
    return msgspec.json.decode(done.stdout, type=Report)


def _end(done: subprocess.CompletedProcess[bytes]) -> str:
    """Why a builder ended that did not report."""
    if done.returncode == -signal.SIGKILL:
        return "the TensorRT builder was killed, most likely for want of memory; free some, or lower the workspace"
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["without a word"]
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
    return f"the TensorRT builder ended with {how}: {last[0]}"
