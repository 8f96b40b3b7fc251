"""Checkpoint -> engine bundle.

Contract: every engine is written, loaded again and compared with torch before the bundle is published, all in a
staging folder: a failure, a parity error included, leaves the old bundle or none. An engine is named as in
`export.graphs.registry`, or `understanding/NAME` when the model has its own weights for that task.
"""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.graphs.registry import ENGINES, LANGUAGE_MODEL, components_of
from export.onnx import engine_model, tensor_entries, write_model
from export.parity import check_engine, check_language_model
from runtime.backends.onnxruntime import OnnxRuntimeEngine, OnnxRuntimeLanguageModel
from runtime.bundle import FORMAT, EngineEntry, Manifest, Parity, describe_file, publish, write_manifest
from runtime.engines import EngineOptions, EngineSet
from runtime.progress import Observer, Progress, ignore
from runtime.settings import LanguageModelShape
from videolavit.checkpoints import Checkpoint
from videolavit.inventory import for_task, inventory

TASKS = ("generate", "understand")
# Engines that answering a question needs; generation needs all.
ANSWERING = ("visual_encoder", "visual_merger", "motion_encoder", "token_embedding", LANGUAGE_MODEL)
LIBRARIES = ("torch", "onnx", "onnxruntime", "transformers", "diffusers", "numpy")


@dataclass(frozen=True)
class Built:
    """One exported engine: bytes of its files, how near it is to torch, seconds to export, load and compare it."""

    name: str
    bytes: int
    parity: Parity
    export_seconds: float
    load_seconds: float
    parity_seconds: float


@dataclass(frozen=True)
class Planned:
    """What a component contributes: its tensors' elements and the engines made from it."""

    component: str
    parameters: int
    engines: tuple[str, ...]


def engines_for(checkpoint: Checkpoint, tasks: Sequence[str] = TASKS) -> list[str]:
    """Names of the engines that a bundle for `tasks` (of `TASKS`) holds, in the order in which they are built."""
    names = list(ENGINES) if "generate" in tasks else []
    for name in ENGINES if "understand" in tasks else ():
        own = for_task(name) if sources_of(checkpoint, for_task(name)) != components_of(name) else name
        if name in ANSWERING and own not in names:
            names.append(own)
    return names


def sources_of(checkpoint: Checkpoint, engine: str) -> tuple[str, ...]:
    """Components of `checkpoint` that an engine of its bundle is made from."""
    task, _, name = engine.rpartition("/")
    return tuple(checkpoint.resolve(component, task) for component in components_of(name))


def plan(checkpoint: Checkpoint, tasks: Sequence[str] = TASKS) -> list[Planned]:
    """What `export_bundle` would build, without building it."""
    names = engines_for(checkpoint, tasks)
    planned = []
    for component in checkpoint.components:
        engines = tuple(name for name in names if component in sources_of(checkpoint, name))
        if engines:
            sizes = inventory(checkpoint.config, component).values()
            planned.append(Planned(component, sum(math.prod(shape) for shape in sizes), engines))
    return planned


def export_bundle(
    checkpoint: Checkpoint,
    target: Path,
    *,
    tasks: Sequence[str] = TASKS,
    force: bool = False,
    observer: Observer = ignore,
) -> list[Built]:
    """Build the engines of `checkpoint` and publish them as the bundle `target`.

    Args:
        tasks: what the bundle is for, of `TASKS`.
        force: replace a bundle that is there.
        observer: told after every engine.

    Raises:
        UsageError: `target` exists or cannot be written.
        CheckpointError: the weights do not fit the configuration.
        ParityError: an engine disagrees with torch.
    """
    names = engines_for(checkpoint, tasks)
    built: list[Built] = []
    entries: dict[str, EngineEntry] = {}
    with publish(target, replace=force) as staging:
        tokenizer = staging / "tokenizer.model"
        tokenizer.write_bytes(checkpoint.tokenizer)
        for name in names:
            checkpoint.release(*sources_of(checkpoint, name))
            entries[name], result = _build_engine(checkpoint, name, staging)
            built.append(result)
            observer(Progress("export", len(built), len(names)))
        write_manifest(staging, _manifest(checkpoint, tokenizer, staging, entries))
    return built


def verify_engines(engines: EngineSet, checkpoint: Checkpoint, report: Callable[[str, Parity], None]) -> None:
    """Compare every engine of a bundle with torch; `report` is told of each. Raises ParityError at the first miss."""
    for name in engines.bundle.manifest.engines:
        task, _, engine = name.rpartition("/")
        seen = checkpoint.for_task(task)
        if engine == LANGUAGE_MODEL:
            report(name, check_language_model(engines.language_model(task), seen))
        else:
            report(name, check_engine(engine, engines.get(engine, task), seen))


def _build_engine(checkpoint: Checkpoint, name: str, folder: Path) -> tuple[EngineEntry, Built]:
    started = time.perf_counter()
    path = folder / f"{name}.onnx"
    path.parent.mkdir(exist_ok=True)
    task, _, name = name.rpartition("/")
    checkpoint = checkpoint.for_task(task)
    model = engine_model(checkpoint, name)
    files = write_model(model, path)
    exported = time.perf_counter()
    options = EngineOptions()
    if name == LANGUAGE_MODEL:
        llm = OnnxRuntimeLanguageModel(files[0], options, checkpoint.config.language_model.max_positions)
        loaded = time.perf_counter()
        parity = check_language_model(llm, checkpoint)
    else:
        engine = OnnxRuntimeEngine(files[0], options)
        loaded = time.perf_counter()
        parity = check_engine(name, engine, checkpoint)
    checked = time.perf_counter()
    entry = EngineEntry(
        files=tuple(describe_file(folder, path) for path in files),
        inputs=tensor_entries(model.graph.input),
        outputs=tensor_entries(model.graph.output),
        parity=parity,
    )
    size = sum(file.bytes for file in entry.files)
    return entry, Built(
        path.relative_to(folder).with_suffix("").as_posix(),
        size,
        parity,
        exported - started,
        loaded - exported,
        checked - loaded,
    )


def _manifest(checkpoint: Checkpoint, tokenizer: Path, folder: Path, entries: dict[str, EngineEntry]) -> Manifest:
    config = checkpoint.config
    llm = config.language_model
    return Manifest(
        format=FORMAT,
        name=config.name,
        trained=checkpoint.trained,
        source=checkpoint.digest,
        versions={library: importlib.metadata.version(library) for library in LIBRARIES},
        vocabulary=config.vocabulary,
        geometry=config.geometry,
        language_model=LanguageModelShape(
            hidden_size=llm.hidden_size,
            layers=llm.layers,
            kv_heads=llm.kv_heads,
            head_dim=llm.hidden_size // llm.heads,
            max_positions=llm.max_positions,
        ),
        keyframe_scheduler=config.keyframe_scheduler,
        video_scheduler=config.video_scheduler,
        keyframe_vae_scaling=config.keyframe_vae.scaling_factor,
        video_vae_scaling=config.video_vae.scaling_factor,
        defaults=config.defaults,
        tokenizer=describe_file(folder, tokenizer),
        engines=entries,
    )
