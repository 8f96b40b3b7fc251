"""What an export will cost, before anything starts.

Contract: `plan_components` counts what each component's engines will weigh and what memory and time it takes to make
them; `check_fits` refuses what this machine has no room for. Sizes of files are within a few per cent; memory and
time are estimates from the figures below, measured on two cores.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.calibration import calibrated_with
from export.graphs.registry import LANGUAGE_MODEL
from export.settings import EngineSettings, ExportSettings
from export.tensorrt_shapes import capacities
from runtime.errors import EnvironmentProblem
from videolavit.config import ModelConfig
from videolavit.inventory import inventory, module_of

# A weight on disk; checkpoints are in half.
BYTES = {"fp32": 2.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.07, "int8": 1.07, "int4": 0.57}
PROCESS = 900 * 2**20  # torch, the exporter and ONNX Runtime, bytes
TRACING = 6.0  # seconds an engine takes whatever its size
READING = 60e6  # parameters written per second
COMPARING = 25e6  # parameters compared per second
IN_TORCH = 6  # bytes of memory a parameter takes there: float32, and what is read of the file
BUILDING = 4  # bytes TensorRT's builder needs for a byte of weights; 3.2 to 4.3 were seen for 1 to 2 GB, 3 for 4 GB


@dataclass(frozen=True)
class Planned:
    """What a component contributes.

    Attributes:
        parameters: elements of its tensors.
        engines: those made from it.
        precisions: of these engines, in the same order.
        bytes: of their files.
        memory: most resident bytes while they are made.
        seconds: to make them.
    """

    component: str
    parameters: int
    engines: tuple[str, ...]
    precisions: tuple[str, ...]
    bytes: int
    memory: int
    seconds: float


def plan_components(
    config: ModelConfig, engines: Mapping[str, tuple[str, ...]], settings: ExportSettings, compare: bool = True
) -> list[Planned]:
    """Component name -> engines made from it, as a plan; components without engines are left out."""
    return [_planned(config, component, names, settings, compare) for component, names in engines.items() if names]


def check_fits(plan: Sequence[Planned], target: Path) -> None:
    """Raise EnvironmentProblem when disk or memory will not do for `plan`."""
    disk = sum(part.bytes for part in plan)
    free = shutil.disk_usage(target.parent if target.parent.is_dir() else Path.cwd()).free
    if disk > free:
        raise EnvironmentProblem(f"{target}: needs {_gib(disk)}, {_gib(free)} are free; choose another place")
    largest = max(plan, key=lambda part: part.memory)
    memory = available_memory()
    if largest.memory > memory:
        raise EnvironmentProblem(
            f"component {largest.component}: its export takes about {_gib(largest.memory)} of memory, "
            f"{_gib(memory)} are free; add --no-compare, which needs less, or use another machine"
        )


def available_memory() -> int:
    """Bytes that this machine can give to a process without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _planned(
    config: ModelConfig, component: str, names: tuple[str, ...], settings: ExportSettings, compare: bool
) -> Planned:
    largest = max(math.prod(shape) for shape in inventory(config, component).values())
    parameters = _parameters(config, component)
    chosen = [settings.for_engine(name) for name in names]
    files, seconds, memory = 0, 0.0, 0
    for name, own, used in zip(names, chosen, _shares(config, component, parameters, names), strict=True):
        files += int(used * BYTES[own.precision]) * _plans(name, own, config)
        seconds += TRACING + used / READING + (parameters / COMPARING if compare else 0)
        # One of the parts may be nearly all of its component, but the embedding never is.
        most = used if module_of(component) == LANGUAGE_MODEL else parameters
        need = 3 * 4 * largest + 2 * parameters  # one tensor in several forms, the checkpoint's mapped file
        if compare:
            need = max(need, IN_TORCH * parameters)
        conditions = calibrated_with(module_of(name), own)
        if conditions:  # it denoises in torch, compared or not, after the conditions for that were made
            need = max(need, IN_TORCH * parameters, IN_TORCH * sum(_parameters(config, part) for part in conditions))
        if own.backend != "onnx":
            need = max(need, int(BUILDING * BYTES[own.precision] * most))
        memory = max(memory, PROCESS + need)
    precisions = tuple(own.precision for own in chosen)
    return Planned(component, parameters, names, precisions, files, memory, seconds)


def _parameters(config: ModelConfig, component: str) -> int:
    return sum(math.prod(shape) for shape in inventory(config, component).values())


def _shares(config: ModelConfig, component: str, parameters: int, names: tuple[str, ...]) -> list[int]:
    """Parameters that are written for each engine: those of a component make its parts, hardly any is in two."""
    if module_of(component) != LANGUAGE_MODEL:
        return [parameters // len(names)] * len(names)
    embedding = config.vocabulary.size * config.language_model.hidden_size
    return [parameters - embedding if module_of(name) == LANGUAGE_MODEL else embedding for name in names]


def _plans(name: str, settings: EngineSettings, config: ModelConfig) -> int:
    """How many files have an engine's weights: a TensorRT plan has one length of cache where that cannot be free."""
    if settings.backend == "onnx" or settings.attention == "plain" or module_of(name) != LANGUAGE_MODEL:
        return 1
    return len(capacities(config, settings.buckets))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
