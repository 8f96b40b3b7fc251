"""`videolavit export` and `videolavit verify`.

Contract: both end in a table on stdout, or in JSON lines with `--json`; a disagreement with torch raises ParityError
after everything that agrees has been shown.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from runtime.bundle import Bundle, Parity, find
from runtime.commands.report import Report
from runtime.errors import BundleError, UsageError

MIB = 2**20


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Bundle folder to write.")
@click.option("--backend", type=click.Choice(["onnx"]), default="onnx", show_default=True, help="Kind of engines.")
@click.option(
    "--tasks", default="generate,understand", show_default=True, help="What the bundle is for, separated by commas."
)
@click.option("--plan", "plan_only", is_flag=True, help="Only say what would be built.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Events and result as JSON lines on stdout.")
def export(
    checkpoint: Path, output: Path, backend: str, tasks: str, plan_only: bool, force: bool, as_json: bool
) -> None:
    """Turn CHECKPOINT into a bundle of engines; each is compared with torch before anything is published.

    CHECKPOINT is a checkpoint of this project or a folder with the official weights.
    """
    from export.build import TASKS, export_bundle, plan
    from videolavit.checkpoints import load

    chosen = [task.strip() for task in tasks.split(",")]
    unknown = [task for task in chosen if task not in TASKS]
    if unknown:
        raise UsageError(f"--tasks {tasks}: {unknown[0]!r} is no task; choose from {', '.join(TASKS)}")
    source = load(checkpoint)
    with Report(as_json) as report:
        if plan_only:
            parts = plan(source, chosen)
            table = _table("component", "parameters", "float16 MiB", "engines")
            for part in parts:
                table.add_row(
                    part.component, f"{part.parameters:,}", f"{2 * part.parameters / MIB:.1f}", ", ".join(part.engines)
                )
            report.result(_text(table), plan=[asdict(part) for part in parts])
            return
        if not source.trained:
            report.note(f"{checkpoint} has random weights, it is not trained")
        built = export_bundle(source, output, tasks=chosen, force=force, observer=report.progress)
        table = _table("engine", "MiB", "largest error", "allowed", "export s", "load s", "compare s")
        for one in built:
            times = (one.export_seconds, one.load_seconds, one.parity_seconds)
            table.add_row(
                one.name, f"{one.bytes / MIB:.2f}", *_bounds(one.parity), *(f"{seconds:.2f}" for seconds in times)
            )
        report.result(
            _text(table) + f"\n{output}: {len(built)} engines, {sum(one.bytes for one in built) / MIB:.1f} MiB",
            bundle=str(output),
            engines=[
                {
                    "name": one.name,
                    "bytes": one.bytes,
                    "max_abs_error": one.parity.max_abs_error,
                    "tolerance": one.parity.tolerance,
                    "export_seconds": one.export_seconds,
                    "load_seconds": one.load_seconds,
                    "parity_seconds": one.parity_seconds,
                }
                for one in built
            ],
        )


@click.command()
@click.argument("bundle")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--engines-only", is_flag=True, help="Leave out the comparison of whole tasks.")
@click.option("--json", "as_json", is_flag=True, help="Events and result as JSON lines on stdout.")
def verify(bundle: str, checkpoint: Path, engines_only: bool, as_json: bool) -> None:
    """Compare every engine of BUNDLE, and every task, with CHECKPOINT in torch."""
    from export.build import verify_engines
    from runtime.engines import EngineSet
    from videolavit.checkpoints import load

    opened, source = Bundle.open(find(bundle)), load(checkpoint)
    if opened.manifest.source != source.digest:
        raise BundleError(
            f"{bundle}: was not made from the weights in {checkpoint}; export these or name their own checkpoint"
        )
    engine_table = _table("engine", "largest error", "allowed", "scale")
    task_table = _table("task", "ids", "latents, relative", "pictures, levels", "PSNR dB")
    results: dict[str, list[dict[str, Any]]] = {"engines": [], "tasks": []}

    def engine_agrees(name: str, parity: Parity) -> None:
        engine_table.add_row(name, *_bounds(parity), f"{parity.scale:.3g}")
        results["engines"].append({"name": name, "max_abs_error": parity.max_abs_error, "tolerance": parity.tolerance})

    with Report(as_json) as report, EngineSet(opened) as engines:
        try:
            verify_engines(engines, source, engine_agrees)
            if not engines_only:
                from export.end_to_end import compare

                for agreement in compare(opened, source):
                    task_table.add_row(
                        agreement.task,
                        str(agreement.tokens),
                        f"{agreement.latent_error:.2g}",
                        str(agreement.frame_error),
                        f"{agreement.psnr:.1f}",
                    )
                    results["tasks"].append(asdict(agreement))
        finally:
            report.result(_text(engine_table, task_table), **results)


def _bounds(parity: Parity) -> tuple[str, str]:
    """Error and tolerance as cells; integers have no tolerance."""
    return f"{parity.max_abs_error:.2g}", f"{parity.tolerance:.2g}" if parity.tolerance else "equal"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i and column != "engines" else "left")
    return table


def _text(*tables: Table) -> str:
    """The tables that have rows, as plain text as wide as they need."""
    console = Console(width=160, no_color=True)
    with console.capture() as capture:
        for table in tables:
            if table.row_count:
                console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
