"""A benchmark: the roofs, then every stage in a process of its own, then the roofs again.

Contract: `measure` yields what it found as soon as it is there; nothing of a stage stays in memory. The roofs are
measured twice because a machine may be busy at one time and not at the other; the higher figures count.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from runtime.apart import apart
from runtime.bench.context import Bench
from runtime.bench.peer import PeerSpec
from runtime.bench.roofs import Roofs, higher, measure_roofs
from runtime.bench.settings import BenchSettings, StageResult
from runtime.bench.stages import STAGES
from runtime.bundle import Bundle
from runtime.engines import processors

_LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "numpy", "av", "torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and with what was measured. `versions`: library -> version, of those that are installed."""

    processor: str
    cores: int
    threads: int
    memory: int
    system: str
    python: str
    versions: dict[str, str]
    date: str


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A whole benchmark. `roofs` is None where they were not wanted or not to be had."""

    bundle: str
    model: str
    trained: bool
    precisions: dict[str, str]
    settings: BenchSettings
    machine: Machine
    roofs: Roofs | None
    stages: tuple[StageResult, ...]


def missing_engines(bundle: Bundle, stage: str) -> list[str]:
    """Engines of `stage` that the bundle does not have."""
    return [name for name in STAGES[stage].engines if name not in bundle.manifest.engines]


def measure(
    bundle: Bundle,
    stages: Sequence[str],
    settings: BenchSettings,
    peers: Sequence[PeerSpec] = (),
    on_stage: Callable[[StageResult], None] = lambda result: None,
) -> Measurement:
    """Measure `stages`, names of `STAGES`, of which the bundle has the engines; `on_stage` is told of each.

    Raises UsageError for settings the model does not have, EnvironmentProblem for what the machine does not have.
    """
    settings.check(bundle.manifest)
    wanted = settings.count_work and any(entry.backend == "onnx" for entry in bundle.manifest.engines.values())
    roofs = apart("roofs", measure_roofs, settings.options) if wanted else None
    results = []
    for name in stages:
        results.append(apart(f"stage {name}", measure_stage, bundle.path, name, settings, tuple(peers)))
        on_stage(results[-1])
    if roofs is not None:
        roofs = higher(roofs, apart("roofs", measure_roofs, settings.options))
    manifest = bundle.manifest
    return Measurement(
        bundle=bundle.path.name,
        model=manifest.name,
        trained=manifest.trained,
        precisions={name: entry.precision for name, entry in manifest.engines.items()},
        settings=settings,
        machine=machine(settings),
        roofs=roofs,
        stages=tuple(results),
    )


def measure_stage(path: Path, name: str, settings: BenchSettings, peers: tuple[PeerSpec, ...]) -> StageResult:
    """One stage, in this process."""
    bundle = Bundle.open(path, check_hashes=False)  # whoever began the benchmark has checked them
    bench = Bench(bundle, settings, peers)
    with bench.engines:
        rows = STAGES[name].measure(bench)
    return StageResult(
        stage=name,
        rows=tuple(rows),
        peak_rss=bench.peak,
        load_seconds=sum(load.seconds for load in bench.engines.loads),
        notes=tuple(dict.fromkeys(bench.notes)),
    )


def machine(settings: BenchSettings) -> Machine:
    """This machine, and what is installed on it."""
    return Machine(
        processor=_processor(),
        cores=processors(),
        threads=settings.threads or processors(),
        memory=_memory(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=_versions(),
        date=date.today().isoformat(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(names, "") or platform.processor() or platform.machine()


def _memory() -> int:
    """Bytes of memory of the machine; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    total = next((line for line in lines if line.startswith("MemTotal:")), None)
    return int(total.split()[1]) * 1024 if total else 0
