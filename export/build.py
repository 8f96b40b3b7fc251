"""Checkpoint -> engine bundle.

Contract: every engine is written, loaded again and compared with torch before the bundle is published, all in a stage
beside it (`export.stage`): a failure, a parity error included, leaves the old bundle or none, and what was finished by
then is not built again by the next export. A component too large to stay in memory beside others is exported by a
process of its own. An engine is named as in `export.graphs.registry`, or `understanding/NAME` when the model has its
own weights for that task.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import msgspec

from export.calibration import CALIBRATION, calibrated_with
from export.engine import Built, build_apart, build_engine
from export.graphs.registry import ENGINES, LANGUAGE_MODEL, components_of
from export.parity import check_engine, check_language_model
from export.plan import Planned, plan_components
from export.settings import TASKS, ExportSettings
from export.stage import Stage, content_key
from runtime.backends import tensorrt_library
from runtime.bundle import FORMAT, Manifest, Parity, describe_file
from runtime.engines import EngineSet
from runtime.errors import ParityError
from runtime.progress import Observer, Progress, ignore
from runtime.settings import LanguageModelShape
from videolavit.checkpoints import Checkpoint
from videolavit.inventory import for_task, inventory

VERSION = 1  # of what the exporter writes: engines of another one are not taken up again
# Engines that answering a question needs; generation needs all.
ANSWERING = ("visual_encoder", "visual_merger", "motion_encoder", "token_embedding", LANGUAGE_MODEL)
LIBRARIES = ("torch", "onnx", "onnxruntime", "transformers", "diffusers", "numpy")
APART = 256 * 2**20  # bytes of a component's weights in float32 from which it is exported by a process of its own


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


def plan(
    checkpoint: Checkpoint,
    tasks: Sequence[str] = TASKS,
    settings: ExportSettings | None = None,
    *,
    compare: bool = True,
) -> list[Planned]:
    """What `export_bundle` would build, without building it."""
    names = engines_for(checkpoint, tasks)
    engines = {
        component: tuple(name for name in names if component in sources_of(checkpoint, name))
        for component in checkpoint.components
    }
    return plan_components(checkpoint.config, engines, settings or ExportSettings(), compare)


def export_bundle(
    checkpoint: Checkpoint,
    target: Path,
    *,
    tasks: Sequence[str] = TASKS,
    settings: ExportSettings | None = None,
    force: bool = False,
    compare: bool = True,
    observer: Observer = ignore,
) -> list[Built]:
    """Build the engines of `checkpoint` and publish them as the bundle `target`.

    Args:
        tasks: what the bundle is for, of `TASKS`.
        settings: backend, precision and shapes of the engines; None takes ONNX in float32.
        force: replace a bundle that is there.
        compare: compare with torch, which needs a component in float32 in memory.
        observer: told after every engine.

    Raises:
        UsageError: `target` exists or cannot be written.
        CheckpointError: the weights do not fit the configuration.
        ParityError: an engine disagrees with torch.
        EnvironmentProblem: a library or a device is missing, or memory did not suffice.
    """
    settings = settings or ExportSettings()
    names = engines_for(checkpoint, tasks)
    engines: dict[str, Built] = {}
    digest = cache(checkpoint.component_digest)
    with Stage(target, replace=force) as stage:
        for name in names:
            sources, own = sources_of(checkpoint, name), settings.for_engine(name)
            checkpoint.release(*sources)
            parts = (*sources, *calibrated_with(name, own))
            key = _key(checkpoint, name, settings, compare, {part: digest(part) for part in parts})
            built = stage.finished(key)
            if built is None:
                make = build_apart if _elements(checkpoint, sources) * 4 > APART else build_engine
                built = stage.build(key, lambda folder: make(checkpoint, name, folder, own, compare))  # noqa: B023
            engines[key] = built
            observer(Progress("export", len(engines), len(names)))
        stage.publish(engines, lambda folder: manifest_of(checkpoint, folder, list(engines.values())))
    return list(engines.values())


def verify_engines(
    engines: EngineSet, checkpoint: Checkpoint, report: Callable[[str, Parity | ParityError], None]
) -> None:
    """Compare every engine of a bundle with torch; `report` is told of each how near it is, or what it misses."""
    for name, entry in engines.bundle.manifest.engines.items():
        task, _, engine = name.rpartition("/")
        seen = checkpoint.for_task(task)
        try:
            if engine == LANGUAGE_MODEL:
                found = check_language_model(engines.language_model(task), seen, entry.precision)
            else:
                found = check_engine(engine, engines.get(engine, task), seen, entry.precision)
        except ParityError as miss:
            report(name, miss)
        else:
            report(name, found)


def _key(checkpoint: Checkpoint, name: str, settings: ExportSettings, compare: bool, digests: dict[str, str]) -> str:
    """Key of everything the files of an engine depend on."""
    versions = _versions()
    own = settings.for_engine(name)
    if own.backend != "onnx":  # asked first, so that a missing library is said before anything is written
        versions[own.backend] = tensorrt_library.version(own.backend)
    config = msgspec.to_builtins(checkpoint.config)
    return content_key([VERSION, versions, name, digests, config, own, compare, CALIBRATION])


def _versions() -> dict[str, str]:
    return {library: importlib.metadata.version(library) for library in LIBRARIES}


def _elements(checkpoint: Checkpoint, components: Sequence[str]) -> int:
    return sum(math.prod(shape) for name in components for shape in inventory(checkpoint.config, name).values())


def manifest_of(checkpoint: Checkpoint, folder: Path, engines: Sequence[Built], source: str | None = None) -> Manifest:
    """The manifest of the bundle in `folder`, which gets the tokenizer.

    `source` stands for the digest of the weights where that would take long and says nothing.
    """
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(checkpoint.tokenizer)
    config = checkpoint.config
    llm = config.language_model
    return Manifest(
        format=FORMAT,
        name=config.name,
        trained=checkpoint.trained,
        source=checkpoint.digest if source is None else source,
        versions=_versions(),
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
        engines={built.name: built.entry for built in engines},
    )
