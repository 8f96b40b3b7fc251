"""Commands of the model room."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import click

from runtime.commands.report import Report
from runtime.errors import CheckpointError, EnvironmentProblem, UsageError

GIB = 2**30


@click.command()
@click.argument("preset")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, envvar="VIDEOLAVIT_SEED")
@click.option("--layers", type=click.IntRange(min=1), help="Layers of the language model, instead of the preset's.")
@click.option("--force", is_flag=True, help="Replace an existing checkpoint.")
def init(preset: str, output: Path, seed: int, layers: int | None, force: bool) -> None:
    """Write a checkpoint of PRESET with random weights."""
    from videolavit.checkpoints import initialise

    initialise(preset, seed, layers).save(output, force=force)
    click.echo(f"{output}: {preset} with random weights from seed {seed}; it is not trained", err=True)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(min=1), required=True, help="Layers it gets, at most twice as many.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace an existing checkpoint.")
def deepen(checkpoint: Path, layers: int, output: Path, force: bool) -> None:
    """Write CHECKPOINT with more layers in its language model, which writes the same as before until it is trained."""
    from videolavit.checkpoints import load
    from videolavit.deepening import deepened

    source = load(checkpoint)
    deepened(source, layers).save(output, force=force)
    there = source.config.language_model.layers
    click.echo(f"{output}: the language model has {layers} layers instead of {there}, and writes the same", err=True)


@click.command()
@click.argument("checkpoints", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="CHECKPOINT...")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace an existing checkpoint.")
def average(checkpoints: tuple[Path, ...], output: Path, force: bool) -> None:
    """Write the mean of the weights of CHECKPOINTs that were trained apart from the same one."""
    from videolavit.averaging import averaged
    from videolavit.checkpoints import load

    averaged([load(folder) for folder in checkpoints]).save(output, force=force)
    click.echo(f"{output}: the mean of {len(checkpoints)} checkpoints", err=True)


@click.command()
@click.argument("snapshot", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--check", is_flag=True, help="Only say what is in SNAPSHOT and everything that is wrong with it.")
@click.option("--force", is_flag=True, help="Replace an existing checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Events and result as JSON lines on stdout.")
def convert(snapshot: Path, output: Path | None, check: bool, force: bool, as_json: bool) -> None:
    """Rewrite SNAPSHOT, a folder with the official weights, as a checkpoint of safetensors files.

    Values stay as they are, in 16 bits where they are stored so. `export` and `verify` take the snapshot as well.
    """
    from videolavit.checkpoints import from_snapshot
    from videolavit.snapshot import is_snapshot, read_snapshot
    from videolavit.snapshot.report import size_text

    if output is None and not check:
        raise UsageError("-o FOLDER is missing; add it, or --check to look only")
    if not is_snapshot(snapshot):
        raise CheckpointError(f"{snapshot}: no file of the official snapshot is in it; name its top folder")
    found = read_snapshot(snapshot)
    with Report(as_json) as report:
        if output is None or check:
            text, problems = found.report.text(), [asdict(problem) for problem in found.report.problems]
            report.result(
                text,
                usable=found.report.usable,
                components=found.components,
                files=[asdict(state) for state in found.report.files],
                problems=problems,
            )
            if not found.report.usable:
                raise CheckpointError(f"{snapshot}: cannot be used; see the list of problems")
            return
        checkpoint = from_snapshot(found)
        sizes = {component: found.weights.stored_bytes(component) for component in found.components}
        _check_space(output, sum(sizes.values()))
        checkpoint.save(output, force=force, observer=report.progress)
        sizes = {name: (output / f"{name}.safetensors").stat().st_size for name in sizes}
        lines = [f"{name:34}{size_text(size):>12}" for name, size in sizes.items()]
        total = f"{output}: {checkpoint.config.name}, {size_text(sum(sizes.values()))} in {len(sizes)} components"
        report.result("\n".join([*lines, total]), checkpoint=str(output), components=sizes)


def _check_space(output: Path, needed: int) -> None:
    """Raise EnvironmentProblem when the disk of `output` has not the room; better now than after an hour."""
    if output.parent.is_dir():
        free = shutil.disk_usage(output.parent).free
        if free < needed:
            raise EnvironmentProblem(
                f"{output}: needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free; choose another disk"
            )
