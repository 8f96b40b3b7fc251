"""`videolavit inspect`: what is in a bundle, or how a generated file was made.

Contract: reads only; a bundle is verified (schema, sizes, hashes) before it is shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from runtime import recipe
from runtime.bundle import MANIFEST, Bundle, EngineEntry, TensorEntry, find
from runtime.commands.options import Bytes
from runtime.errors import MediaError, UsageError
from runtime.residency import MemoryPlan


@click.command()
@click.argument("target")
@click.option("--memory-budget", type=Bytes(), help="What a video would keep of a bundle in memory, e.g. under 8G.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(target: str, memory_budget: int | None, as_json: bool) -> None:
    """Show what is in a bundle (a folder or a name), or how TARGET, a generated file, was made."""
    path = Path(target)
    if path.is_file() and path.name != MANIFEST:
        document = read_recipe(path)
        click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())
        click.echo(f"make it again: {recipe.command_line(document, path)}", err=True)
        return
    if not path.exists() and path.suffix:
        raise UsageError(f"{target}: no such file or bundle")
    bundle = Bundle.open(path.parent if path.name == MANIFEST else find(target))
    if as_json:
        click.echo((bundle.path / MANIFEST).read_text())
        return
    _show(bundle, memory_budget)


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe stored in a generated file. Raises MediaError when it carries none."""
    from runtime.images import is_picture, picture_metadata
    from runtime.video import read_recipe as read_video_metadata

    metadata = picture_metadata(path) if is_picture(path) else read_video_metadata(path)
    text = metadata.get(recipe.KEY)
    if text is None:
        raise MediaError(f"{path}: carries no recipe; it was not made by videolavit, or its metadata was stripped")
    try:
        document: dict[str, Any] = msgspec.json.decode(text, type=dict)
    except msgspec.DecodeError as error:
        raise MediaError(f"{path}: its recipe is damaged: {error}") from error
    return document


def _show(bundle: Bundle, memory_budget: int | None) -> None:
    manifest = bundle.manifest
    geometry, vocabulary = manifest.geometry, manifest.vocabulary
    weights = "trained" if manifest.trained else "random, untrained"
    total = sum(entry.bytes for entry in bundle.files())
    click.echo(
        f"{bundle.path}: model {manifest.name}, {weights} weights, {total / 2**20:.1f} MiB, all hashes correct\n"
        f"clip: {geometry.frames} frames at {geometry.fps} fps, {geometry.video_size[0]}x{geometry.video_size[1]}, "
        f"up to {geometry.patches} image tokens and {geometry.motion_tokens} motion tokens\n"
        f"vocabulary: {vocabulary.text_size} text, {vocabulary.visual_codes} visual, {vocabulary.motion_codes} motion, "
        f"4 markers; {vocabulary.size} in all\n"
        f"memory of a clip from text: {_plan(bundle, memory_budget).line()}\n"
        f"made with: {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}"
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("engine", "backend", "precision", "MiB", "in", "out", "error to torch"):
        table.add_column(heading, justify="right" if heading == "MiB" else "left")
    for name, engine in manifest.engines.items():
        table.add_row(
            name,
            _backend(engine),
            engine.precision,
            f"{sum(f.bytes for f in engine.files) / 2**20:.2f}",
            _tensors(engine.inputs),
            _tensors(engine.outputs),
            _parity(engine),
        )
    Console(width=160).print(table, markup=False)


def _plan(bundle: Bundle, memory_budget: int | None) -> MemoryPlan:
    """What `generate` would load and release, by the sizes of the weights; what it computes with comes on top."""
    from runtime.engines import EngineSet
    from runtime.requests import VideoRequest, resolve
    from runtime.stages import stages_of

    settings = resolve(VideoRequest(prompt="-"), bundle.manifest.geometry, bundle.manifest.defaults)
    return EngineSet(bundle, memory_budget=memory_budget).expect(stages_of(settings), "generate")


def _backend(engine: EngineEntry) -> str:
    """Backend, and of a plan the GPUs it was built for."""
    if engine.built_for is None or not engine.built_for.compute_capabilities:
        return engine.backend
    return f"{engine.backend} for {', '.join(engine.built_for.compute_capabilities)}"


def _tensors(tensors: tuple[TensorEntry, ...]) -> str:
    shown = [t for t in tensors if not t.name.startswith(("past_key", "past_value", "present_"))]
    text = " ".join(f"{t.name}[{','.join(map(str, t.shape))}]" for t in shown)
    return text if len(shown) == len(tensors) else f"{text} + KV cache"


def _parity(engine: EngineEntry) -> str:
    if engine.parity is None:
        return "not measured"
    return f"{engine.parity.max_abs_error:.1e} (allowed {engine.parity.tolerance:.1e})"
